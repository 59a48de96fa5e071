"""Reads `lmx.toml` and `LMX_SECTION__KEY` variables into a `Config`, or says file, line, key and the nearest key."""

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from protocol.config import Config, LifecycleConfig

_MAX_FILE_BYTES: Final = 1024 * 1024
_PREFIX: Final = "LMX_"
#: Keys that people look for here, and where what they want is.
_ELSEWHERE: Final = {
    "security.admin_key": "keys are never in the configuration: this one is in $LMX_HOME/admin.key or LMX_ADMIN_KEY",
    "security.api_keys": "keys are never in the configuration: lmx-supervisor keys create makes one",
    "security.api_key": "keys are never in the configuration: lmx-supervisor keys create makes one",
}
_SWITCH: Final = {"true": True, "1": True, "false": False, "0": False}


class BadConfigError(Exception):
    """The configuration cannot be used. The text names the place and what to change; it goes with exit code 5."""


def load_config(file: Path, *, required: bool = False, environ: Mapping[str, str] | None = None) -> Config:
    """Return the configuration of `file` (defaults where it does not exist), overridden by the environment."""
    text = _read(file, required=required)
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of 5,000 digits and brackets 10,000 deep
        msg = f"{file}: not valid TOML: {error}"
        raise BadConfigError(msg) from None
    config = _decode(tables, lambda path: _place(file, text, path))
    overrides = _from_environment(os.environ if environ is None else environ)
    for variable, (section, key, value) in overrides.items():
        _check_known(section, key, variable)
        tables.setdefault(section, {})[key] = _parse_value(value, getattr(getattr(Config(), section), key), variable)
        config = _decode(tables, _named(f"environment variable {variable}"))
    _check_silences(config.lifecycle)
    return config


def _check_silences(lifecycle: LifecycleConfig) -> None:
    """Refuse deadlines that every healthy process would miss, again and again."""
    for key in ("heartbeat_hung_s", "gateway_hung_s", "lease_s"):
        longest = getattr(lifecycle, key)
        if lifecycle.heartbeat_s >= longest:
            msg = (
                f"lifecycle.heartbeat_s ({lifecycle.heartbeat_s:g}) has to be less than lifecycle.{key} ({longest:g}): "
                "who is heard only so often would be ended for being silent"
            )
            raise BadConfigError(msg)


def _named(place: str) -> Callable[[str], str]:
    """Return a place function for values that do not stand in the file."""
    return lambda _path: place


def _read(file: Path, *, required: bool) -> str:
    try:
        with file.open("rb") as stream:
            raw = stream.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        if required:
            msg = f"{file}: there is no such file"
            raise BadConfigError(msg) from None
        return ""
    except OSError as error:
        msg = f"{file}: cannot be read: {error.strerror}"
        raise BadConfigError(msg) from None
    if len(raw) > _MAX_FILE_BYTES:
        msg = f"{file}: larger than {_MAX_FILE_BYTES} bytes"
        raise BadConfigError(msg)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        msg = f"{file}:{line}: cannot be read: not UTF-8"
        raise BadConfigError(msg) from None


def _decode(tables: dict[str, Any], place: Callable[[str], str]) -> Config:
    try:
        return msgspec.convert(tables, Config)
    except msgspec.ValidationError as error:
        raise BadConfigError(_explain(str(error), place)) from None


def _explain(problem: str, place: Callable[[str], str]) -> str:
    """Turn msgspec's text ("… unknown field `prot` - at `$.gateway`") into place, key and the nearest key."""
    at = re.search(r" - at `\$?\.?([^`]*)`$", problem)
    path = re.sub(r"\[.*", "", at[1]) if at else ""
    words = problem[: at.start()] if at else problem
    unknown = re.search(r"unknown field `([^`]*)`", problem)
    if unknown is None:
        return f"{place(path)}: {path}: {words}"
    key = unknown[1]
    full = f"{path}.{key}" if path else key
    return f"{place(full)}: unknown key {full}" + _hint(path, key)


def _hint(path: str, key: str) -> str:
    """Return what is said of a key that is not there."""
    full = _join(path, key)
    if full in _ELSEWHERE:
        return f"; {_ELSEWHERE[full]}"
    near = difflib.get_close_matches(key, _keys(path), n=1, cutoff=0.0)
    return f"; did you mean {_join(path, near[0])}?" if near else ""


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _keys(path: str) -> list[str]:
    if not path:
        return list(Config.__struct_fields__)
    section = getattr(Config(), path, None)
    return list(section.__struct_fields__) if isinstance(section, msgspec.Struct) else []


def _place(file: Path, text: str, path: str) -> str:
    """Return `file:line` of a dotted key: tomllib reports no positions for values that parse."""
    section, _, key = path.partition(".")
    current = ""
    section_line = 0
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[{1,2}\s*[\"']?([^\]\s\"']+)[\"']?\s*\]", line)
        if header:
            current = header[1]
            if current == section:
                section_line = number
                if not key:
                    return f"{file}:{number}"
            continue
        name = re.match(r"\s*[\"']?([A-Za-z0-9_.-]+)[\"']?\s*=", line)
        if name and _join(current, name[1]) == path:
            return f"{file}:{number}"
        if name and _join(current, name[1]) == section:  # section = {key = …}
            section_line = number
    return f"{file}:{section_line}" if section_line else str(file)


def _from_environment(environ: Mapping[str, str]) -> dict[str, tuple[str, str, str]]:
    found = {}
    for variable, value in sorted(environ.items()):
        if variable.startswith(_PREFIX) and "__" in variable:
            section, _, key = variable[len(_PREFIX) :].lower().partition("__")
            found[variable] = (section, key, value)
    return found


def _check_known(section: str, key: str, variable: str) -> None:
    for path, name in (("", section), (section, key)):
        if name not in _keys(path):
            msg = f"environment variable {variable}: unknown key {_join(path, name)}{_hint(path, name)}"
            raise BadConfigError(msg)


def _parse_value(text: str, default: object, variable: str) -> object:
    """Read a variable as the type of the key: words as they are, everything else as TOML would.

    A list may also be written as words with commas between them, and true and false in any case or as 1 and 0.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        msg = f"environment variable {variable}: not UTF-8"
        raise BadConfigError(msg) from None
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        return _SWITCH.get(text.strip().lower(), text)
    value = _parse_toml(text)
    if isinstance(default, tuple) and not isinstance(value, list):
        parts = [part.strip() for part in text.split(",") if part.strip()]
        return parts if not default or isinstance(default[0], str) else [_parse_toml(part) for part in parts]
    return value


def _parse_toml(text: str) -> object:
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text  # the decoder then says which type was expected
    return table["value"] if len(table) == 1 else text
