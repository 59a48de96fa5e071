"""What an ended process means: the table in `crash_classes.json`, and the record of one end that it leads to.

The table is read from top to bottom and the first rule that fits decides. What Metal and MLX said beats the bare exit
code or signal, and the errors of a process itself stand above those that follow from them. Every pattern is made of
literals, digits and bounded repeats, so that a search is linear in the text and what it matched can be shown to anyone:
nothing else of what a process wrote gets into `reason`, which ends up in status, journal and errors.
"""

import builtins
import re
import signal
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Final, Literal

import msgspec

#: What is searched of a process's output, in characters, from its end.
MAX_TAIL: Final = 64 * 1024
_MAX_LAST_WORDS: Final = 300
_MAX_TRACEBACK_LINE: Final = 400
_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")

TRACEBACK: Final = "Traceback (most recent call last):"


class ExitClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kind of end. `counted`: adds to the crash loop. `permanent`: trying again cannot help. `probe`: when set aside
    it is tried again by itself. `degrade`: the next try runs with less. `extra_delay_s`: the least time until then.
    """

    words: str
    hint: str
    counted: bool
    permanent: bool
    degrade: bool
    extra_delay_s: float
    probe: bool


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One row: everything that is given has to fit. `words` and `hint` are the class's unless given here."""

    name: str = msgspec.field(name="class")
    pattern: str = ""
    codes: tuple[int, ...] = ()
    signals: tuple[str, ...] = ()
    how: Literal["", "code", "signal", "unknown"] = ""
    jetsam: bool = False
    words: str = ""
    hint: str = ""
    #: Whether the matched text says more than the words do.
    quote: bool = True
    source: str = ""


class PanicKind(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kernel panic that is known, by a part of its text."""

    kind: str
    pattern: str
    words: str
    source: str = ""


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The data file. `exceptions`: types, besides Python's own, whose names may be shown."""

    schema: Literal["lmx.crash_classes/1"]
    classes: dict[str, ExitClass]
    rules: tuple[Rule, ...]
    panics: tuple[PanicKind, ...]
    exceptions: frozenset[str]


class ExitRecord(msgspec.Struct, frozen=True):
    """How one process ended. `code` or `signal` is set, neither if the process was not our child."""

    name: str
    reason: str
    at: float
    code: int | None = None
    signal: str | None = None
    counted: bool = True
    permanent: bool = False
    hint: str = ""
    degrade: bool = False
    extra_delay_s: float = 0.0
    probe: bool = True


@cache
def table() -> Table:
    """Return the table of crash classes."""
    return msgspec.json.decode(files("supervisor").joinpath("crash_classes.json").read_bytes(), type=Table)


@cache
def _patterns() -> Mapping[str, re.Pattern[str]]:
    patterns = [*(rule.pattern for rule in table().rules), *(panic.pattern for panic in table().panics)]
    return {pattern: re.compile(pattern) for pattern in patterns if pattern}


@cache
def _any_pattern() -> re.Pattern[str]:
    """Return all of them as one: a text in which it finds nothing need not be searched forty times."""
    return re.compile("|".join(_patterns()))


def classify(
    returncode: int | None,
    *,
    at: float,
    asked: bool,
    hung: bool,
    last_words: str = "",
    stderr_tail: str = "",
    jetsam: bool = False,
    verdict: str = "",
) -> ExitRecord:
    """Return what the end of a process means.

    `returncode` is `Popen.returncode` (negative: a signal), None if unknown. `asked` says that we told it to stop,
    `hung` that we ended it for lack of progress, `jetsam` that a report of the system names it, `verdict` the class if
    we ended it for a fault that we saw ourselves. `last_words` is what the worker itself gave as the reason;
    `stderr_tail` the end of what this process wrote, which is only compared with what is known.
    """
    last_words = _CONTROLS.sub(" ", last_words).strip()[:_MAX_LAST_WORDS]
    by_signal = signal_name(-returncode) if returncode is not None and returncode < 0 else None
    code = returncode if returncode is not None and returncode >= 0 else None
    how = by_signal or ("" if code is None else f"exit code {code}")
    name = verdict if verdict in table().classes else "hang" if hung or verdict else "asked" if asked else ""
    if name:
        says = f": {last_words}" if last_words and name != "asked" else ""
        return record(name, at=at, detail=says, how="" if name == "asked" else how, code=code, by_signal=by_signal)
    text = f"{last_words}\n{stderr_tail[-MAX_TAIL:]}"
    rule, matched = _first_rule(text, code, by_signal, jetsam=jetsam)
    known = matched if rule.quote else ""
    if not known and rule.name in {"python_error", "thread_died"}:
        known = exception_type(stderr_tail[-MAX_TAIL:])
    says = last_words or known
    found = record(
        rule.name, at=at, detail=f": {says}" if says else "", how=how, code=code, by_signal=by_signal, words=rule.words
    )
    return msgspec.structs.replace(found, hint=rule.hint or found.hint)


def record(
    name: str,
    *,
    at: float,
    detail: str = "",
    how: str = "",
    code: int | None = None,
    by_signal: str | None = None,
    words: str = "",
) -> ExitRecord:
    """Return the record of an end of class `name`, also for ends that no exit status shows (start_failed, panic).

    `detail` and `how` complete the words of the class: `{words}{detail} ({how})`.
    """
    kind = table().classes[name]
    return ExitRecord(
        name=name,
        reason=f"{words or kind.words}{detail}{f' ({how})' if how else ''}",
        at=at,
        code=code,
        signal=by_signal,
        counted=kind.counted,
        permanent=kind.permanent,
        hint=kind.hint,
        degrade=kind.degrade,
        extra_delay_s=kind.extra_delay_s,
        probe=kind.probe,
    )


def _first_rule(text: str, code: int | None, by_signal: str | None, *, jetsam: bool) -> tuple[Rule, str]:
    how = "signal" if by_signal else "unknown" if code is None else "code"
    says_something = _any_pattern().search(text) is not None
    for rule in table().rules:
        if (
            (rule.codes and code not in rule.codes)
            or (rule.signals and by_signal not in rule.signals)
            or (rule.how and rule.how != how)
            or (rule.jetsam and not jetsam)
            or (rule.pattern and not says_something)
        ):
            continue
        if not rule.pattern:
            return rule, ""
        match = _patterns()[rule.pattern].search(text)
        if match is not None:
            return rule, match.group().strip()
    msg = "the table's last rules fit everything"
    raise AssertionError(msg)


def known_text(line: str) -> str:
    """Return the part of a line that is a known message of Metal, MLX, the system or a kernel panic; "" if none is."""
    for pattern in _patterns().values() if _any_pattern().search(line) else ():
        match = pattern.search(line)
        if match is not None:
            return match.group().strip()
    return ""


def known_panic(text: str) -> PanicKind | None:
    """Return the kind of a kernel panic, None if it is none that we know."""
    return next((kind for kind in table().panics if _patterns()[kind.pattern].search(text)), None)


def exception_type(text: str) -> str:
    """Return the type that the last traceback in a text ends with; "" if there is none, or none that may be shown.

    The type stands in the first line after the traceback's indented ones. The lines after it belong to the message,
    which may hold anything, a made-up traceback too: only known names are returned.
    """
    start = text.rfind(TRACEBACK)
    if start < 0:
        return ""
    for line in text[start + len(TRACEBACK) :].lstrip("\n").splitlines():
        if line[:1] not in {" ", "\t"}:
            return shown_type(line[:_MAX_TRACEBACK_LINE].partition(":")[0].strip())
    return ""


def shown_type(name: str) -> str:
    """Return the name of an exception type if it is Python's or in the table, else ""."""
    if name in table().exceptions:
        return name
    kind = getattr(builtins, name, None) if name.isidentifier() else None
    return name if isinstance(kind, type) and issubclass(kind, BaseException) else ""


def signal_name(number: int) -> str:
    """Return SIGABRT and the like."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
