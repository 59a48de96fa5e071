"""What the supervisor asks for while memory is short, and until when. IO thread only; pure policy."""

from protocol.control import Relieve
from protocol.logs import event
from worker.requests import NEVER, Book


class Relief:
    """Each wish ends by itself: a supervisor that is gone keeps nobody from working. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._closed_until = NEVER
        self._slots = 0
        self._slots_until = NEVER

    @property
    def due(self) -> float:
        """When `expire` has something to do."""
        return min(self._closed_until, self._slots_until)

    def ask(self, wish: Relieve, now: float, book: Book | None) -> None:
        """Take a wish in the place of the last one."""
        closed = wish.close_s > 0
        if closed != (self._closed_until != NEVER):
            event("admission_paused" if closed else "admission_resumed")
        self._closed_until = now + wish.close_s if closed else NEVER
        limited = wish.slots > 0 and wish.slots_s > 0
        self._slots = wish.slots if limited else 0
        self._slots_until = now + wish.slots_s if limited else NEVER
        if book is not None:
            self.apply(book, now)

    def expire(self, now: float, book: Book | None) -> None:
        """Forget what nobody has asked for again."""
        left_s, slots_s = self._closed_until - now, self._slots_until - now
        close_s = left_s if 0 < left_s < NEVER else 0.0
        limited = 0 < slots_s < NEVER
        self.ask(Relieve(close_s, slots=self._slots if limited else 0, slots_s=slots_s if limited else 0.0), now, book)

    def apply(self, book: Book, now: float) -> None:
        """Let the book keep to it; also one that is made only now."""
        book.limit(self._slots, now)
        book.pause(now, paused=self._closed_until != NEVER)
