"""Decodes the formats that the extension does not, through libsndfile.

Sound is decoded in blocks, so that no header can make it allocate. libsndfile trusts wrong and missing
lengths; all that works around this is here.
"""

from clsp_fast.sndfile.errors import DecodeError
from clsp_fast.sndfile.stream import UNKNOWN_LENGTH, Stream, check_magic, open_stream, read_mono

__all__ = ["UNKNOWN_LENGTH", "DecodeError", "Stream", "check_magic", "open_stream", "read_mono"]
