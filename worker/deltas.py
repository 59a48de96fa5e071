"""From the tokens of one request to what its gateway is told. IO thread only."""

from collections.abc import Sequence

from protocol.data import Delta, Finish, TokenLogprob, Usage
from worker.entry import Request
from worker.jobs import AT_LENGTH, AT_STOP, GOES_ON, NO_TOKEN, NOTHING, Said, Scored, Vocabulary


def make_delta(
    request: Request, token: int, end: int, scored: Sequence[Scored], vocabulary: Vocabulary | None
) -> Delta:
    """Return what one more token is worth, and count it.

    Its logprob comes with it, also where its text is held back. The two kinds of token that are no part of the answer
    have none: an end-of-sequence token, and one that completed a stop string without adding text in front of it.
    """
    tokens = [token] if token != NO_TOKEN else []
    request.completion_tokens += len(tokens)
    answer = request.answer
    said = NOTHING if end == AT_STOP or not tokens else answer.add(token)
    finish = None
    if answer.stopped:
        finish = Finish.STOP
        if not said.text:
            scored = scored[:-1]
    elif end != GOES_ON:
        if end == AT_STOP:
            scored = scored[:-1]
        said = _joined(said, answer.finish())
        finish = Finish.LENGTH if end == AT_LENGTH else Finish.STOP
    elif not (scored or request.echo or said.reasoning or said.tool_calls):
        return Delta(request.rid, said.text, tokens)
    logprobs = [] if vocabulary is None else [vocabulary.spell(one) for one in scored]
    return _delta(request, said, tokens, finish, logprobs)


def join(first: Delta, then: Delta) -> Delta:
    """Return what a request gained in two steps, as one; `first` is not its last."""
    return Delta(
        first.rid,
        first.text + then.text,
        first.token_ids + then.token_ids,
        then.finish,
        then.usage,
        first.reasoning + then.reasoning,
        first.tool_calls + then.tool_calls,
        first.logprobs + then.logprobs,
    )


def end_whole(request: Request) -> Delta:
    """Return the end of a request with nothing left to generate."""
    stopped = request.answer.stopped
    said = NOTHING if stopped else request.answer.finish()
    return _delta(request, said, [], Finish.STOP if stopped else Finish.LENGTH, [])


def _delta(
    request: Request, said: Said, tokens: list[int], finish: Finish | None, logprobs: list[TokenLogprob]
) -> Delta:
    usage = None
    if finish is not None:
        if request.answer.called and finish is Finish.STOP:
            finish = Finish.TOOL_CALLS
        usage = Usage(len(request.job.prompt), request.completion_tokens, request.job.reused.tokens)
    text = request.take_echo() + said.text
    return Delta(request.rid, text, tokens, finish, usage, said.reasoning, list(said.tool_calls), logprobs)


def _joined(first: Said, then: Said) -> Said:
    return Said(first.text + then.text, first.reasoning + then.reasoning, [*first.tool_calls, *then.tool_calls])
