"""What was logged, for tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loguru import logger


@contextmanager
def logged() -> Iterator[list[dict[str, Any]]]:
    """Yield a list that fills with the events logged meanwhile: their fields, and `event` and `level`."""
    seen: list[dict[str, Any]] = []

    def sink(message: Any) -> None:
        record = message.record
        fields = {key: value for key, value in record["extra"].items() if not key.startswith("_")}
        seen.append({**fields, "event": record["message"], "level": record["level"].name})

    number = logger.add(sink, level="TRACE")
    try:
        yield seen
    finally:
        logger.remove(number)
