"""Errors of parsers, and their messages in one line."""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib

from lockstep.common.errors import printable

# What parsers let through when they stumble over a damaged file.
PARSE_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    SyntaxError,
    ArithmeticError,
    MemoryError,
)
PARSE_ERRORS += (RuntimeError, struct.error, tokenize.TokenError, zlib.error, zipfile.BadZipFile)


def one_line(error: BaseException) -> str:
    """The message of an error in one line, without control characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return printable(text)
