from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from worker.detok import AnswerText, StopStrings, TokenText

SPECIAL = 256


def byte_tokenizer() -> Tokenizer:
    """256 tokens, one per byte, in GPT-2's spelling, and one special token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    vocab = {chr(byte) if byte in printable else chr(next(spare)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


TOKENIZER = byte_tokenizer()


def token_text() -> TokenText:
    return TokenText(lambda tokens: TOKENIZER.decode(tokens, skip_special_tokens=False), {SPECIAL})


def reference(text: str, stops: Sequence[str]) -> str:
    """The non-streaming result, by the rule: cut before the stop string that is complete first."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if stop and text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    points = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in pairwise(points)]


few_letters = st.text(alphabet="abé🌍", max_size=30)
stop_strings = st.lists(st.text(alphabet="abé🌍", min_size=1, max_size=5), max_size=4)


@settings(deadline=None)
@given(text=few_letters, stops=stop_strings, cuts=st.lists(st.integers(0, 100), max_size=12))
def test_however_the_text_is_cut_the_answer_is_the_same(text: str, stops: list[str], cuts: list[int]) -> None:
    scanner = StopStrings(stops)
    shown = [scanner.add(piece) for piece in pieces_of(text, cuts)]
    if not scanner.hit:
        shown.append(scanner.finish())
    assert "".join(shown) == reference(text, stops)
    assert scanner.hit == any(stop in text for stop in stops)


@settings(deadline=None)
@given(text=few_letters, stops=stop_strings)
def test_nothing_of_a_stop_string_is_ever_shown(text: str, stops: list[str]) -> None:
    scanner = StopStrings(stops)
    shown = ""
    whole = reference(text, stops)
    for letter in text:
        shown += scanner.add(letter)
        assert whole.startswith(shown)


@settings(deadline=None)
@given(text=st.text(max_size=40), stops=st.lists(st.text(min_size=1, max_size=4), max_size=4))
def test_tokens_that_cut_characters_make_the_same_text(text: str, stops: list[str]) -> None:
    answer = AnswerText(token_text(), StopStrings(stops))
    shown = ""
    for byte in text.encode():
        piece = answer.add(byte).text
        assert "\ufffd" not in piece or "\ufffd" in text
        shown += piece
        if answer.stopped:
            break
    if not answer.stopped:
        shown += answer.finish().text
    assert shown == reference(text, stops)


@settings(deadline=None)
@given(data=st.binary(max_size=60))
def test_any_bytes_give_what_decoding_them_at_once_gives(data: bytes) -> None:
    text = token_text()
    shown = "".join(text.add(byte) for byte in data)
    whole = data.decode("utf-8", "replace")
    assert whole.startswith(shown)
    assert set(whole[len(shown) :]) <= {"\ufffd"}  # only an unfinished character may be missing


def test_an_unfinished_character_is_held_and_then_dropped() -> None:
    answer = AnswerText(token_text(), StopStrings(()))
    assert [answer.add(byte).text for byte in "a🌍".encode()[:-1]] == ["a", "", "", ""]
    assert answer.finish().text == ""


def test_bytes_that_never_become_a_character_are_not_held_for_ever() -> None:
    text = token_text()
    shown = "".join(text.add(0xFF) for _ in range(100))
    assert 80 <= len(shown) <= 100


def test_special_tokens_leave_no_text_and_no_trace() -> None:
    text = token_text()
    tokens = [SPECIAL, *b" a", SPECIAL, *b" b", SPECIAL]
    assert "".join(text.add(token) for token in tokens) == " a b"


def test_a_leading_space_that_the_decoder_strips_is_stripped_once() -> None:
    vocab = {"▁Hello": 0, "▁you": 1, "<unk>": 2}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    text = TokenText(lambda tokens: tokenizer.decode(tokens, skip_special_tokens=False), {2})
    assert [text.add(token) for token in (2, 0, 2, 1, 1)] == ["", "Hello", "", " you", " you"]


def test_the_window_stays_short() -> None:
    longest = 0

    def decode(tokens: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return TOKENIZER.decode(tokens, skip_special_tokens=False)

    text = TokenText(decode, {SPECIAL})
    for byte in b"the quick brown fox " * 100:
        text.add(byte)
    assert longest == 2


def test_the_stop_string_that_is_complete_first_counts_and_of_two_the_longer() -> None:
    scanner = StopStrings(("abc", "b"))
    assert scanner.add("xabc") == "xa"
    scanner = StopStrings(("bc", "abc"))
    assert scanner.add("xabc") == "x"
    assert scanner.add("more") == ""
