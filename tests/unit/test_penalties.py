"""Penalties on logits, compared with their definitions in float64 (real MLX, small arrays)."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from worker.penalties import Bias, Penalties, PenaltyGroup

VOCABULARY = 50
PROMPT = [3, 7, 7, 11, 40]
ANSWER = [7, 20, 20, 40, 5, 20]
PARAMETERS = [
    {"repetition": 1.3, "frequency": 0.0, "presence": 0.0},
    {"repetition": 1.0, "frequency": 0.7, "presence": 0.0},
    {"repetition": 1.0, "frequency": 0.0, "presence": -1.1},
    {"repetition": 0.8, "frequency": -0.4, "presence": 0.9},
]


def random_logits(seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal((1, VOCABULARY)) * 5


def expected(logits: Any, answer: list[int], *, repetition: float, frequency: float, presence: float) -> Any:
    row = logits[0].copy()
    for token in set(PROMPT) | set(answer):
        row[token] = row[token] / repetition if row[token] > 0 else row[token] * repetition
    for token in set(answer):
        row[token] -= frequency * answer.count(token) + presence
    return row


@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("said", range(len(ANSWER)))
def test_every_token_counts_once_from_the_first_and_from_any_later_one(parameters: dict[str, float], said: int) -> None:
    """The first call's last token is the prompt's or one of those said: it is not counted a second time."""
    penalties = Penalties(PROMPT, ANSWER[:said], **parameters)
    for count in range(said, len(ANSWER) + 1):
        logits = random_logits(count)
        before = mx.array([(PROMPT + ANSWER[:count])[-1]])
        (row,) = penalties(before, mx.array(logits.astype(np.float32))).tolist()
        assert row == pytest.approx(expected(logits, ANSWER[:count], **parameters).tolist(), abs=1e-4)


def test_rows_together_are_as_each_alone_also_when_the_group_changes() -> None:
    rows = [Penalties(PROMPT, [], **parameters) for parameters in PARAMETERS]
    of_row: list[list[int]] = [[], [], [], []]
    for members in ([0, 1], [0, 1], [0, 1, 2, 3], [3, 1], [3, 1], [2], [0, 3]):
        group = PenaltyGroup([rows[row] for row in members])
        for turn in range(2):
            logits = random_logits(turn + 10 * len(members))
            tokens = mx.array([(PROMPT + of_row[row])[-1] for row in members])
            batch = mx.array(np.repeat(logits, len(members), axis=0).astype(np.float32))
            for row, got in zip(members, group(tokens, batch).tolist(), strict=True):
                assert got == pytest.approx(expected(logits, of_row[row], **PARAMETERS[row]).tolist(), abs=1e-4)
                of_row[row].append(ANSWER[len(of_row[row]) % len(ANSWER)])
        group.release()


def test_a_prompt_of_ids_past_the_logits_is_no_harm() -> None:
    penalties = Penalties([VOCABULARY, 10**6, 3], [VOCABULARY + 1], repetition=1.5, frequency=0.5, presence=0.5)
    logits = random_logits(1)
    (row,) = penalties(mx.array([3]), mx.array(logits.astype(np.float32))).tolist()
    changed = [token for token in range(VOCABULARY) if abs(row[token] - logits[0][token]) > 1e-4]
    assert changed == [3]


def test_a_bias_is_added_and_nothing_else_moves() -> None:
    logits = random_logits(1)
    (row,) = Bias({5: 2.5, 6: -100.0})(mx.array([1]), mx.array(logits.astype(np.float32))).tolist()
    wanted = logits[0].copy()
    wanted[5] += 2.5
    wanted[6] -= 100.0
    assert row == pytest.approx(wanted.tolist(), abs=1e-4)
