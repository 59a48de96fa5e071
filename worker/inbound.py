"""Frames of gateways: decoded, checked, handed to the book. IO thread only."""

from time import monotonic
from typing import Final

from protocol.data import Abort, Refused, Submit, to_worker_decoder
from protocol.errors import LmxError
from protocol.logs import event
from protocol.messages import MalformedMessageError
from worker.intake import Intake
from worker.link import DataLink
from worker.requests import Book

#: Time given to frames in one turn of the IO thread: short prompts are tokenized in it, and tokens of others wait.
_RECEIVE_S: Final = 0.005


class Inbound:
    """What gateways send. Frames that are unreadable or meant for another incarnation are dropped and counted."""

    def __init__(self, link: DataLink, incarnation: int) -> None:
        self._link = link
        self._incarnation = incarnation
        self._decoder = to_worker_decoder()
        self._dropped = 0
        self._dropped_logged = 0
        #: None until the model serves.
        self.book: Book | None = None
        self.intake: Intake | None = None

    def receive(self) -> None:
        """Handle the frames that are there, for a few milliseconds; what is left is found in the next turn."""
        until = monotonic() + _RECEIVE_S
        while (received := self._link.receive()) is not None:
            self._on_frame(*received)
            if monotonic() >= until:
                return

    def log_dropped(self) -> None:
        """Log what was dropped since the last call; called with each heartbeat, so a flood makes few lines."""
        if self._dropped > self._dropped_logged:
            self._dropped_logged = self._dropped
            event("frames_dropped", level="WARNING", total=self._dropped)

    def _on_frame(self, gateway: bytes, frame: bytes) -> None:
        try:
            message = self._decoder.decode(frame)
        except MalformedMessageError:
            self._dropped += 1
            return
        if message.incarnation != self._incarnation:
            self._dropped += 1
        elif isinstance(message, Submit):
            self._on_submit(gateway, message, monotonic())
        else:
            self._on_abort(gateway, message, monotonic())

    def _on_submit(self, gateway: bytes, submit: Submit, now: float) -> None:
        if self.book is not None and self.intake is not None:
            self.intake.submit(self.book, gateway, submit, now)
            return
        error = LmxError("model_loading", "The model is being loaded")
        refused = Refused(self._incarnation, submit.rid, error.code, error.message, None, error.retry_after_s)
        self._link.send(gateway, refused)

    def _on_abort(self, gateway: bytes, message: Abort, now: float) -> None:
        if self.book is not None and self.intake is not None:
            self.intake.abort(gateway, message.rids)
            self.book.abort(gateway, message, now)
        for rid in message.rids:
            self._link.forget(gateway, rid)
