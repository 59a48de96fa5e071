"""Requests that were there when their model's process ended: how often, and which are refused for a while.

Pure policy: time is an argument. A request is known by a digest of what makes it do the same thing again; nothing of
its content is kept, and of the digest no more than `shown` is ever logged.
"""

import hashlib
from collections import OrderedDict
from typing import Final

import msgspec

from protocol.data import Submit
from protocol.errors import LmxError

_MAX_KNOWN: Final = 1024
_SHOWN_DIGITS: Final = 8


def digest_of(model: str, submit: Submit) -> bytes:
    """Return what two requests have in common if and only if a model would do the same with both."""
    asked = (model, submit.kind, submit.messages, submit.sampling, submit.options, submit.inputs)
    return hashlib.sha256(msgspec.msgpack.encode(asked)).digest()


def shown(digest: bytes) -> str:
    """Return as much of a digest as may be logged."""
    return digest.hex()[:_SHOWN_DIGITS]


class _Record(msgspec.Struct):
    named_at: list[float]
    refused_until: float = 0.0


class Quarantine:
    """Who was named by a crash, how often, and who is refused. Holds at most 1,024 digests, those named last."""

    def __init__(self, after: int, for_s: float) -> None:
        self._after = after
        self._for_s = for_s
        self._records: OrderedDict[bytes, _Record] = OrderedDict()

    def __bool__(self) -> bool:
        """Whether anyone is known at all: as long as not, no digest needs to be made."""
        return bool(self._records)

    def name(self, digest: bytes, now: float) -> bool:
        """A crash names this request. Return whether it is refused from now on."""
        record = self._records.pop(digest, None)
        if record is None or now - record.named_at[-1] >= self._for_s:
            record = _Record([])
        self._records[digest] = record
        if len(self._records) > _MAX_KNOWN:
            self._records.popitem(last=False)
        recent = [at for at in record.named_at if now - at < self._for_s]
        record.named_at = [*recent, now][-self._after :]
        if len(record.named_at) >= self._after:
            record.refused_until = now + self._for_s
        return now < record.refused_until

    def acquit(self, digest: bytes, now: float) -> None:
        """A request of this digest came to its normal end: the crashes it was in were not of its making.

        One that is refused stays so: that it ran to its end once more beside the last crash proves little.
        """
        record = self._records.get(digest)
        if record is not None and now >= record.refused_until:
            del self._records[digest]

    def refuses(self, digest: bytes, now: float) -> bool:
        """Return whether the request is not to be run now. What is over is forgotten."""
        record = self._records.get(digest)
        if record is None:
            return False
        if now < record.refused_until:
            return True
        if now - record.named_at[-1] >= self._for_s:
            del self._records[digest]
        return False

    def refusal(self) -> LmxError:
        """Return what the client is told."""
        text = (
            f"This request was running {self._after} times when the model's process ended; it is refused for "
            f"{self._for_s:g} s. Change it, or send it later."
        )
        return LmxError("request_quarantined", text)
