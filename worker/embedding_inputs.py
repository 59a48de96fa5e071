"""From texts or tokens to the sequences of an encoder, with every check before a request may wait. IO thread only."""

from collections.abc import Iterator, Sequence
from typing import Final

from tokenizers import Tokenizer

from protocol.data import MAX_FRAME_BYTES, Kind, Submit, TokenLogprob
from protocol.encoder import Encoder
from protocol.errors import LmxError
from worker.jobs import Scored
from worker.whole import NoText, PreparedEncode

#: Texts that are tokenized between two looks at their lengths: one that is too long is told before all are done.
_CHUNK: Final = 32
#: A word of more characters is one token to BERT, so a text has no more than this for each token but for white space.
_MAX_CHARS_PER_TOKEN: Final = 128
_FLOAT_BYTES: Final = 4
#: What an answer holds besides its vectors: some bytes for each.
_ROOM_BYTES: Final = 1024 * 1024

#: Tokens, and from which one on they are of the second text.
Sequenced = tuple[list[int], int]


class InputMaker:
    """Turns `Submit`s into sequences with one model's tokenizer; it is the model's `worker.jobs.Vocabulary` too."""

    def __init__(self, tokenizer: Tokenizer, encoder: Encoder) -> None:
        # Files of sentence-transformers cut at 128 tokens and fill up to them.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._encoder = encoder

    @property
    def kinds(self) -> list[str]:
        """What a model with this encoder can be asked for."""
        return ["rerank", "tokenize"] if self._encoder.scores_pairs else ["embedding", "rerank", "tokenize"]

    def prepare(self, submit: Submit) -> PreparedEncode:
        """Return the request ready for the engine; raise `LmxError` with words for the client."""
        if submit.kind is Kind.EMBED and not self._encoder.scores_pairs:
            self._check_vectors(len(submit.inputs), submit.dimensions)
            sequences = self._sequences(submit.inputs, ["input"])
        elif submit.kind is Kind.RERANK:
            if len(submit.inputs) < 2:
                raise LmxError("invalid_value", "There must be at least one document", param="documents")
            make = self._pairs if self._encoder.scores_pairs else self._sequences
            sequences = make(submit.inputs, ["query", "documents"])
        else:
            kinds = ", ".join(self.kinds)
            raise LmxError("invalid_value", f"This model is for {kinds}, and for nothing else", param="model")
        prompt: list[int] = []
        ends: list[int] = []
        seconds: list[int] = []
        for tokens, second in sequences:
            prompt += tokens
            ends.append(len(prompt))
            seconds.append(second)
        return PreparedEncode(
            prompt=prompt,
            max_tokens=1,
            answer=NoText(),
            ends=ends,
            seconds=seconds,
            dimensions=submit.dimensions,
            ranks=submit.kind is Kind.RERANK,
        )

    def tokenize(self, submit: Submit) -> tuple[list[int], str]:
        """Answer `Kind.TOKENIZE` and `Kind.DETOKENIZE` with both sides; raise `LmxError`."""
        match submit.kind, submit.inputs:
            case Kind.TOKENIZE, [str(text)]:
                return self._tokenizer.encode(text).ids, text
            case Kind.DETOKENIZE, [list(tokens)]:
                if tokens:
                    self._checked(tokens, ("tokens", ""), 0)
                return tokens, self._tokenizer.decode(tokens, skip_special_tokens=False)
        if submit.messages:
            raise LmxError("invalid_value", "This model has no conversations: send 'prompt'", param="messages")
        param = "prompt" if submit.kind is Kind.TOKENIZE else "tokens"
        raise LmxError("invalid_value", f"'{param}' must be given, once", param=param)

    def spell(self, scored: Scored) -> TokenLogprob:
        """Return a token in words; an encoder predicts none, so there is nothing more to say of it."""
        text = self._tokenizer.id_to_token(scored.token) or ""
        return TokenLogprob(text, scored.logprob, text.encode())

    def _check_vectors(self, count: int, dimensions: int) -> None:
        own = self._encoder.shape.hidden_size
        if not count:
            raise LmxError("invalid_value", "There must be at least one input", param="input")
        if not 0 <= dimensions <= own:
            text = f"This model's vectors have {own} dimensions; ask for 1 to {own}"
            raise LmxError("invalid_value", text, param="dimensions")
        most = (MAX_FRAME_BYTES - _ROOM_BYTES) // (_FLOAT_BYTES * (dimensions or own))
        if count > most:
            text = f"With vectors of {dimensions or own} dimensions a request may have at most {most} inputs"
            raise LmxError("invalid_value", text, param="input")

    def _sequences(self, inputs: Sequence[str | list[int]], names: Sequence[str]) -> Iterator[Sequenced]:
        for start in range(0, len(inputs), _CHUNK):
            chunk = inputs[start : start + _CHUNK]
            for number, text in enumerate(chunk, start):
                if isinstance(text, str):
                    self._check_chars(len(text), names, number)
            encoded = iter(self._tokenizer.encode_batch_fast([text for text in chunk if isinstance(text, str)]))
            for number, given in enumerate(chunk, start):
                tokens = next(encoded).ids if isinstance(given, str) else self._checked(given, names, number)
                self._check_tokens(len(tokens), names, number)
                yield tokens, len(tokens)

    def _pairs(self, inputs: Sequence[str | list[int]], names: Sequence[str]) -> Iterator[Sequenced]:
        query, *documents = inputs
        for start in range(0, len(documents), _CHUNK):
            pairs = []
            for number, document in enumerate(documents[start : start + _CHUNK], start + 1):
                if not isinstance(query, str) or not isinstance(document, str):
                    raise LmxError("invalid_type", "A reranker takes texts", param=_param(names, number))
                self._check_chars(len(query) + len(document), names, number)
                pairs.append((query, document))
            for number, encoding in enumerate(self._tokenizer.encode_batch_fast(pairs), start + 1):
                self._check_tokens(len(encoding.ids), names, number)
                types = encoding.type_ids
                yield encoding.ids, types.index(1) if 1 in types else len(types)

    def _checked(self, tokens: list[int], names: Sequence[str], number: int) -> list[int]:
        last = self._encoder.shape.vocab_size - 1
        if not tokens:
            raise LmxError("invalid_value", "An input must not be empty", param=_param(names, number))
        if not 0 <= min(tokens) <= max(tokens) <= last:
            # An id past the end would be read from memory that is not the model's.
            text = (
                f"Token ids of this model are 0 to {last}; those of another model's tokenizer mean nothing here. "
                "Send text (LangChain: check_embedding_ctx_length=False)"
            )
            raise LmxError("invalid_value", text, param=_param(names, number))
        return tokens

    def _check_chars(self, chars: int, names: Sequence[str], number: int) -> None:
        if chars > _MAX_CHARS_PER_TOKEN * self._encoder.max_tokens:
            raise self._too_long(f"{chars} characters", names, number)

    def _check_tokens(self, tokens: int, names: Sequence[str], number: int) -> None:
        if tokens > self._encoder.max_tokens:
            raise self._too_long(f"{tokens} tokens", names, number)

    def _too_long(self, size: str, names: Sequence[str], number: int) -> LmxError:
        param = _param(names, number)
        what = f"'{param}', with the query," if self._encoder.scores_pairs else f"'{param}'"
        text = f"{what} has {size}; this model reads at most {self._encoder.max_tokens} tokens at once. Split it"
        return LmxError("context_length_exceeded", text, param=param)


def _param(names: Sequence[str], number: int) -> str:
    """Return the field that the `number`-th input came in."""
    if len(names) == 1:
        return f"{names[0]}[{number}]"
    return names[0] if number == 0 else f"{names[1]}[{number - 1}]"
