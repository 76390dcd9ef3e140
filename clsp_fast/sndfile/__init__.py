"""Decodes, through libsndfile, the formats that the extension does not decode.

Sound is decoded in blocks of fixed size: a wrong length in a header cannot make it allocate much memory.
libsndfile trusts wrong lengths, and guesses missing ones. This package corrects both.
"""

from clsp_fast.sndfile.errors import DecodeError
from clsp_fast.sndfile.stream import UNKNOWN_LENGTH, Stream, check_magic, open_stream, read_mono

__all__ = ["UNKNOWN_LENGTH", "DecodeError", "Stream", "check_magic", "open_stream", "read_mono"]
