"""Reads `lmx.toml` and `LMX_SECTION__KEY` variables into a `Config`, or says file, line, key and the nearest key."""

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from protocol.config import Config

_MAX_FILE_BYTES: Final = 1024 * 1024
_PREFIX: Final = "LMX_"


class BadConfigError(Exception):
    """The configuration cannot be used. The text names the place and what to change; it goes with exit code 5."""


def load_config(file: Path, *, required: bool = False, environ: Mapping[str, str] | None = None) -> Config:
    """Return the configuration of `file` (defaults where it does not exist), overridden by the environment."""
    text = _read(file, required=required)
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        msg = f"{file}: not valid TOML: {error}"
        raise BadConfigError(msg) from None
    config = _decode(tables, lambda path: _place(file, text, path))
    overrides = _from_environment(os.environ if environ is None else environ)
    for variable, (section, key, value) in overrides.items():
        _check_known(section, key, variable)
        tables.setdefault(section, {})[key] = _parse_value(value, getattr(getattr(config, section), key))
        config = _decode(tables, _named(f"environment variable {variable}"))
    return config


def _named(place: str) -> Callable[[str], str]:
    """Return a place function for values that do not stand in the file."""
    return lambda _path: place


def _read(file: Path, *, required: bool) -> str:
    try:
        if file.stat().st_size > _MAX_FILE_BYTES:
            msg = f"{file}: larger than {_MAX_FILE_BYTES} bytes"
            raise BadConfigError(msg)
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        if required:
            msg = f"{file}: there is no such file"
            raise BadConfigError(msg) from None
        return ""
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        msg = f"{file}: cannot be read: {why}"
        raise BadConfigError(msg) from None


def _decode(tables: dict[str, Any], place: Callable[[str], str]) -> Config:
    try:
        config = msgspec.convert(tables, Config)
    except msgspec.ValidationError as error:
        raise BadConfigError(_explain(str(error), place)) from None
    if not config.lifecycle.restart_delays_s or min(config.lifecycle.restart_delays_s) < 0:
        msg = f"{place('lifecycle.restart_delays_s')}: lifecycle.restart_delays_s needs numbers of 0 or more"
        raise BadConfigError(msg)
    return config


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
    known = _keys(path)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"{place(full)}: unknown key {full}" + (f"; did you mean {_join(path, near[0])}?" if near else "")


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
        header = re.match(r"\s*\[\s*([^\]\s]+)\s*\]", line)
        if header:
            current = header[1]
            if current == section:
                section_line = number
                if not key:
                    return f"{file}:{number}"
            continue
        name = re.match(r"\s*\"?([A-Za-z0-9_.-]+)\"?\s*=", line)
        if name and (_join(current, name[1]) == path or (not key and not current and name[1] == section)):
            return f"{file}:{number}"
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
        known = _keys(path)
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            nearest = f"{section}.{near[0]}" if path else near[0]
            msg = f"environment variable {variable}: unknown key {_join(path, name)}; did you mean {nearest}?"
            raise BadConfigError(msg)


def _parse_value(text: str, default: object) -> object:
    """Read a variable as the type of the key: words as they are, everything else as TOML would."""
    if isinstance(default, str):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if isinstance(default, tuple):
            return [part.strip() for part in text.split(",") if part.strip()]
        return text  # the decoder then says which type was expected
