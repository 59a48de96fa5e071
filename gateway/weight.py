"""How many values a body holds, counted before any of them is made.

A decoder makes an object of each and keeps the interpreter to itself meanwhile: 16 MiB of `[],[],…` took it two
seconds, and a dozen such bodies held up heartbeats until the gateway was ended as hung. Text is cheap.
"""

import re
from typing import Final

from protocol.errors import LmxError

#: Objects and lists. Tools may have 1 MiB: a schema as dense as that has a third of this.
MAX_CONTAINERS: Final = 131_072
#: Texts, names of fields among them.
MAX_STRINGS: Final = 131_072
#: Values of any kind. The longest lists are of token ids: a million, for `/detokenize`.
MAX_VALUES: Final = 2_097_152
#: A body that is shorter than this cannot hold too much.
_SMALL_BYTES: Final = 2 * MAX_CONTAINERS
#: A text, or the begin of one that does not end. Possessive: it never goes back, so it takes linear time and no memory.
_STRING: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)


def check_weight(body: bytes) -> None:
    """Raise `invalid_value` for a body with more values than any request needs."""
    if len(body) < _SMALL_BYTES:
        return
    # A quote within a text has a backslash before it; one behind a text that ends with a backslash too, so a text
    # counts for one at least and for two at most.
    if body.count(b'"') - body.count(b'\\"') > 2 * MAX_STRINGS:
        raise _too_much()
    if not _exceeds(body):
        return
    # Much of that may be text, as of a program that is asked about.
    if _exceeds(_STRING.sub(b"", body)):
        raise _too_much()


def _exceeds(body: bytes) -> bool:
    return body.count(b"[") + body.count(b"{") > MAX_CONTAINERS or body.count(b",") > MAX_VALUES


def _too_much() -> LmxError:
    text = (
        f"The body holds more values than any request needs: at most {MAX_CONTAINERS} objects and lists, "
        f"{MAX_STRINGS} texts and {MAX_VALUES} values in all."
    )
    return LmxError("invalid_value", text)
