"""One table of errors: each row is complete, and each answer made from it has every key clients read (design 10)."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ERRORS, MAX_RETRY_AFTER_S, ErrorSpec, LmxError, envelope, from_peer, problem

ROWS = list(ERRORS.values())
OPENAI_TYPES = {
    "invalid_request_error", "authentication_error", "permission_error", "rate_limit_error", "server_error",
}  # fmt: skip
#: The table of the design: situation to status and code.
DESIGN = {
    "context_length_exceeded": 400,
    "invalid_json": 400,
    "invalid_value": 400,
    "invalid_api_key": 401,
    "forbidden": 403,
    "model_not_found": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "body_too_large": 413,
    "request_quarantined": 422,
    "rate_limit_exceeded": 429,
    "server_busy": 429,
    "load_shedding": 503,
    "insufficient_memory": 503,
    "model_loading": 503,
    "model_restarting": 503,
    "model_quarantined": 503,
    "worker_crashed": 503,
    "timeout": 504,
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.code)
def test_every_row_is_complete(row: ErrorSpec) -> None:
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", row.code)
    assert ERRORS[row.code] is row
    assert 400 <= row.status <= 599
    assert row.type in OPENAI_TYPES
    assert (row.type == "server_error") == (row.status >= 500)
    assert row.title[0].isupper()
    assert not row.title.endswith(".")
    assert row.retry_after_s is None or 1 <= row.retry_after_s <= MAX_RETRY_AFTER_S


def test_the_rows_of_the_design_are_there() -> None:
    assert {code: ERRORS[code].status for code in DESIGN} == DESIGN
    assert ERRORS["server_busy"].retry_after_s == 5
    assert ERRORS["load_shedding"].retry_after_s == 10


def test_everything_a_client_should_try_again_says_when() -> None:
    for row in ROWS:
        if row.status in {429, 502, 503}:
            assert row.retry_after_s is not None, row.code


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        ERRORS["new"] = ROWS[0]  # type: ignore[index]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.code)
def test_the_envelope_has_exactly_openais_four_keys_and_the_request_id(row: ErrorSpec) -> None:
    answer = envelope(LmxError(row.code, "words", param="messages"), "req-1")
    assert answer == {
        "error": {
            "message": "words",
            "type": row.type,
            "param": "messages",
            "code": row.code,
            "request_id": "req-1",
        }
    }
    assert list(envelope(LmxError(row.code, "words"), "r")["error"]) == list(answer["error"])
    assert envelope(LmxError(row.code, "words"), "r")["error"]["param"] is None


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.code)
def test_problem_details_have_the_members_of_rfc_9457(row: ErrorSpec) -> None:
    answer = problem(LmxError(row.code, "words"), "req-1")
    assert answer["type"] == f"urn:lmx:error:{row.code}"
    assert (answer["title"], answer["status"], answer["detail"]) == (row.title, row.status, "words")
    assert (answer["code"], answer["param"], answer["request_id"]) == (row.code, None, "req-1")
    json.dumps(answer)


@given(st.sampled_from(ROWS), st.none() | st.integers(-(10**12), 10**12))
def test_retry_after_is_between_1_and_120_or_absent(row: ErrorSpec, wait: int | None) -> None:
    error = LmxError(row.code, "words", retry_after_s=wait)
    if wait is None:
        assert error.retry_after_s == row.retry_after_s
    else:
        assert error.retry_after_s == max(1, min(wait, 120))


@given(st.text())
def test_a_code_of_another_version_is_an_internal_error_with_its_words(code: str) -> None:
    error = from_peer(code, "words", param="p", retry_after_s=7)
    assert error.code == (code if code in ERRORS else "internal_error")
    assert (error.message, error.param, error.retry_after_s) == ("words", "p", 7)


def test_a_code_that_is_not_in_the_table_cannot_be_raised_by_us() -> None:
    with pytest.raises(KeyError):
        LmxError("invented", "words")
