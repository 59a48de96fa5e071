"""From the bytes of a request to something a worker can be given, or to a 400 that names the field."""

from typing import Final

import msgspec

from gateway.decode import bad, missing, read
from gateway.messages import conversation
from gateway.parameters import CHAT, COMPLETION, DETOKENIZE, TOKENIZE, settle
from gateway.sampling import MAX_TOKEN_ID, choices, sampling, stream_usage, whole_number
from gateway.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from gateway.tools import definitions, options, template_args
from protocol.config import GatewayConfig
from protocol.data import ChatMessage, ChatOptions, Sampling
from protocol.rules import MAX_TOP_LOGPROBS

_CHAT: Final = msgspec.json.Decoder(ChatRequest)
_COMPLETION: Final = msgspec.json.Decoder(CompletionRequest)
_TOKENIZE: Final = msgspec.json.Decoder(TokenizeRequest)
_DETOKENIZE: Final = msgspec.json.Decoder(DetokenizeRequest)
MAX_PROMPTS: Final = 128
#: Prompts times answers for each.
MAX_ANSWERS: Final = 512
MAX_BEST_OF: Final = 20
MAX_LEGACY_LOGPROBS: Final = 5
#: OpenAI's, for `/v1/completions` alone.
DEFAULT_COMPLETION_TOKENS: Final = 16
#: Tokens that may be turned back into text at once: eight times the longest context of today's small models.
MAX_DETOKENIZE: Final = 1_048_576


class ChatCall(msgspec.Struct):
    """A chat completion request that has passed every check."""

    model: str
    messages: list[ChatMessage]
    sampling: Sampling
    options: ChatOptions
    n: int
    stream: bool
    include_usage: bool
    #: Names of fields that nobody here knows, for the `X-LMX-Ignored` header.
    ignored: list[str]


class CompletionCall(msgspec.Struct):
    """A completion request that has passed every check. `best_of` answers are made for each prompt, `n` shown."""

    model: str
    prompts: list[str | list[int]]
    sampling: Sampling
    n: int
    best_of: int
    echo: bool
    #: Whether log probabilities were asked for, rather than needed to find the best answers.
    logprobs: bool
    stream: bool
    include_usage: bool
    ignored: list[str]


class TokenizeCall(msgspec.Struct):
    """A request for the tokens of a text, or of a conversation when `prompt` is None."""

    model: str
    prompt: str | None
    messages: list[ChatMessage]
    options: ChatOptions
    ignored: list[str]


class DetokenizeCall(msgspec.Struct):
    """A request for the text of tokens."""

    model: str
    tokens: list[int]
    ignored: list[str]


def parse_chat(body: bytes, config: GatewayConfig) -> ChatCall:
    """Return the call in `body`; raise `LmxError` with a 400 code for anything that is not one."""
    fields, request = read(body, _CHAT)
    _check_model(request.model)
    ignored = settle(CHAT, fields, strict=config.strict)
    return ChatCall(
        model=request.model,
        messages=conversation(request.messages, config.max_messages),
        sampling=sampling(
            request, config, max_tokens=_chat_max_tokens(request, config), logprobs=_chat_logprobs(request)
        ),
        options=options(request, fields, config),
        n=choices(request),
        stream=request.stream or False,
        include_usage=stream_usage(request),
        ignored=ignored,
    )


def parse_completion(body: bytes, config: GatewayConfig) -> CompletionCall:
    """The same for a completion."""
    fields, request = read(body, _COMPLETION)
    _check_model(request.model)
    ignored = settle(COMPLETION, fields, strict=config.strict)
    prompts = _prompts(request.prompt)
    n = choices(request)
    best_of = whole_number(request.best_of, "best_of", n, MAX_BEST_OF, n)
    if len(prompts) * best_of > MAX_ANSWERS:
        raise bad("prompt", f"times the number of answers to each may be at most {MAX_ANSWERS}")
    stream, echo = request.stream or False, request.echo or False
    if stream and best_of > n:
        raise bad("best_of", "must not be above 'n' in a stream: the best is known at the end")
    max_tokens = whole_number(
        request.max_tokens, "max_tokens", int(not echo), config.max_tokens_limit, DEFAULT_COMPLETION_TOKENS
    )
    top = None if request.logprobs is None else whole_number(request.logprobs, "logprobs", 0, MAX_LEGACY_LOGPROBS, 0)
    return CompletionCall(
        model=request.model,
        prompts=prompts,
        sampling=sampling(request, config, max_tokens=max_tokens, logprobs=0 if top is None and best_of > n else top),
        n=n,
        best_of=best_of,
        echo=echo,
        logprobs=top is not None,
        stream=stream,
        include_usage=stream_usage(request),
        ignored=ignored,
    )


def parse_tokenize(body: bytes, config: GatewayConfig) -> TokenizeCall:
    """The same for a text or conversation whose tokens are wanted."""
    fields, request = read(body, _TOKENIZE)
    _check_model(request.model)
    ignored = settle(TOKENIZE, fields, strict=config.strict)
    if (request.prompt is None) is (request.messages is None):
        raise missing("prompt") if request.prompt is None else bad("prompt", "and 'messages' exclude each other")
    messages = [] if request.messages is None else conversation(request.messages, config.max_messages)
    made = ChatOptions(tools=definitions(request.tools, fields), template_args=template_args(fields))
    return TokenizeCall(request.model, request.prompt, messages, made, ignored)


def parse_detokenize(body: bytes, config: GatewayConfig) -> DetokenizeCall:
    """The same for tokens whose text is wanted."""
    fields, request = read(body, _DETOKENIZE)
    _check_model(request.model)
    ignored = settle(DETOKENIZE, fields, strict=config.strict)
    if len(request.tokens) > MAX_DETOKENIZE:
        raise bad("tokens", f"may hold at most {MAX_DETOKENIZE} tokens")
    _check_tokens(request.tokens, "tokens")
    return DetokenizeCall(request.model, request.tokens, ignored)


def _check_model(model: str) -> None:
    if not model:
        raise bad("model", "must not be empty")


def _chat_max_tokens(request: ChatRequest, config: GatewayConfig) -> int | None:
    limit = config.max_tokens_limit
    names = ("max_tokens", "max_completion_tokens")
    given = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    for name, value in given.items():
        whole_number(value, name, 1, limit, 1)
    if len(set(given.values())) > 1:
        raise bad("max_tokens", "differs from 'max_completion_tokens', which replaces it; send one of them")
    return next(iter(given.values()), None)


def _chat_logprobs(request: ChatRequest) -> int | None:
    top = whole_number(request.top_logprobs, "top_logprobs", 0, MAX_TOP_LOGPROBS, 0)
    if top and not request.logprobs:
        raise bad("top_logprobs", "is only allowed with 'logprobs': true")
    return top if request.logprobs else None


def _prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """Return each prompt, a text or tokens. A list of numbers is one prompt."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise bad("prompt", "must not be empty")
    tokens = [item for item in prompt if isinstance(item, int)]
    if tokens:
        if len(tokens) != len(prompt):
            raise bad("prompt", "must not mix tokens with prompts")
        _check_tokens(tokens, "prompt")
        return [tokens]
    if len(prompt) > MAX_PROMPTS:
        raise bad("prompt", f"may hold at most {MAX_PROMPTS} prompts")
    found: list[str | list[int]] = []
    for index, item in enumerate(prompt):
        if isinstance(item, list):
            if not item:
                raise bad(f"prompt[{index}]", "must not be empty")
            _check_tokens(item, f"prompt[{index}]")
            found.append(item)
        elif isinstance(item, str):
            found.append(item)
    return found


def _check_tokens(tokens: list[int], where: str) -> None:
    if tokens and not (min(tokens) >= 0 and max(tokens) <= MAX_TOKEN_ID):
        raise bad(where, f"must hold token ids, 0 to {MAX_TOKEN_ID}")
