"""Who may ask for which priority."""

from typing import Any

import pytest

from gateway.priority import priority_of
from protocol.errors import LmxError


def scope(value: str | None) -> dict[str, Any]:
    return {"headers": [] if value is None else [(b"x-lmx-priority", value.encode())]}


@pytest.mark.parametrize(
    ("own", "asked", "found"),
    [
        (0, None, 0),
        (7, None, 7),
        (-5, None, -5),
        (7, "high", 7),
        (7, " High ", 7),
        (7, "normal", 0),
        (7, "batch", -1),
        (0, "batch", -1),
        (-5, "normal", -5),
        (-5, "batch", -5),
    ],
)
def test_a_request_may_ask_for_less_than_its_key_has(own: int, asked: str | None, found: int) -> None:
    assert priority_of(scope(asked), own) == found


@pytest.mark.parametrize("own", [0, -5])
def test_high_is_only_for_keys_that_may(own: int) -> None:
    with pytest.raises(LmxError) as caught:
        priority_of(scope("high"), own)
    assert (caught.value.code, caught.value.param) == ("forbidden", "X-LMX-Priority")
    assert "keys create --priority" in caught.value.message


def test_anything_else_is_a_400_that_names_the_header() -> None:
    with pytest.raises(LmxError) as caught:
        priority_of(scope("urgent"), 7)
    assert (caught.value.code, caught.value.param) == ("invalid_value", "X-LMX-Priority")
