"""JSON that stays on one line, whoever reads it: some take characters for line ends that JSON leaves as they are."""

from typing import Final

#: In UTF-8, and how JSON escapes them: httpx `iter_lines`, `str.splitlines` and many log readers cut lines there.
_LINE_ENDS: Final = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))


def escape_line_ends(data: bytes) -> bytes:
    """Return JSON without any byte sequence that some reader takes for a line end."""
    if not data.isascii():
        for char, escaped in _LINE_ENDS:
            data = data.replace(char, escaped)
    return data
