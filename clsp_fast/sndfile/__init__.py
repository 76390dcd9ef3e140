"""Decodes what the extension does not, through libsndfile in blocks, so that no header can make it allocate.

libsndfile trusts wrong and missing lengths. Everything that works around this is in this room.
"""

from clsp_fast.sndfile.stream import (
    UNKNOWN_LENGTH,
    DecodeError,
    Stream,
    check_magic,
    open_stream,
    read_mono,
)

__all__ = ["UNKNOWN_LENGTH", "DecodeError", "Stream", "check_magic", "open_stream", "read_mono"]
