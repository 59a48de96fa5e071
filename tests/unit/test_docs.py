"""The documentation says what the code does: keys, commands, errors, events and modules are compared with it.

A failure prints the rows that are missing; the meaning in the last column is for a person to write.
"""

import ast
import itertools
import json
import re
import tomllib
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import msgspec
import pytest

from protocol.builtin_models import DEFAULT_MODEL_ID
from protocol.config import Config
from protocol.config_load import BadConfigError, load_config
from protocol.errors import ERRORS
from protocol.states import CliExit, ModelState, WorkerExit
from supervisor import exits
from supervisor.cli import cli

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("protocol", "gateway", "worker", "supervisor")
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "deploy/README.md", *(f"docs/{p.name}" for p in (
    REPOSITORY / "docs").glob("*.md")))  # fmt: skip


def page(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def rows(text: str) -> list[tuple[str, ...]]:
    """The cells of every table row that is not a ruler; `\\|` is a bar within a cell."""
    lines = [line for line in text.splitlines() if line.startswith("|") and set(line) - set("|-: ")]
    return [tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]) for line in lines]


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next of the same level."""
    level = heading.split(" ", 1)[0]
    found = re.search(rf"^{re.escape(heading)}$\n(.*?)(?=^{level} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"there is no heading {heading!r}"
    return found[1]


def code(text: str) -> str:
    """What a code span holds; one with backticks in it is fenced by two."""
    found = re.fullmatch(r"(`+) ?(.*?) ?\1", text)
    return found[2] if found else text


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


# -- configuration ----------------------------------------------------------------------------------------------


def bounds(meta: msgspec.Meta | None) -> str:
    if meta is None:
        return ""
    if meta.pattern:
        return ", a module name"
    if meta.max_length is not None:
        return f", {meta.min_length or 0} to {meta.max_length} of them"
    low = f"above {meta.gt}" if meta.gt is not None else str(meta.ge)
    return f", {low} or more" if meta.le is None else f", {low} to {meta.le}"


def type_words(annotation: Any) -> str:
    meta = next(iter(getattr(annotation, "__metadata__", ())), None)
    plain = annotation.__origin__ if meta is not None else annotation
    if get_origin(plain) is Literal:
        return ", ".join(f'"{choice}"' for choice in get_args(plain))
    if get_origin(plain) is tuple:
        return ("list of " + type_words(get_args(plain)[0])).replace("number,", "numbers,") + bounds(meta)
    return {str: "text", int: "integer", float: "number", bool: "true or false"}[plain] + bounds(meta)


def unit(key: str) -> str:
    for end, name in (("_per_gib_s", "s/GiB"), ("_s", "s"), ("_bytes", "bytes"), ("_tokens", "tokens")):
        if key.endswith(end):
            return name
    return ""


def default(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, tuple):
        return f"[{', '.join(default(item) for item in value)}]"
    return json.dumps(value)


def configuration_rows() -> Iterator[tuple[str, str, str, str]]:
    """The key, type, unit and default of everything that can be configured."""
    for table in msgspec.structs.fields(Config):
        for field in msgspec.structs.fields(table.type):
            words = type_words(field.type)
            yield f"`{table.name}.{field.name}`", words, unit(field.name), f"`{default(field.default)}`"


def test_every_configuration_key_is_documented_with_its_type_unit_and_default() -> None:
    documented = {cells[0]: cells[:4] for cells in rows(page("docs/configuration.md")) if "." in cells[0]}
    wanted = {cells[0]: cells for cells in configuration_rows()}
    wrong = [row(*cells, "…") for key, cells in wanted.items() if documented.get(key) != cells]
    assert wrong == [], "rows for docs/configuration.md:\n" + "\n".join(wrong)
    assert [key for key in documented if key not in wanted] == []
    meanings = [cells[4] for cells in rows(page("docs/configuration.md")) if cells[0] in wanted]
    assert all(len(text) > 10 for text in meanings)


def readers(word: str) -> list[str]:
    """The modules that have this word as a quoted string or an attribute."""
    pattern = re.compile(rf"[\"'.]{re.escape(word)}\b")
    files = itertools.chain.from_iterable((REPOSITORY / package).rglob("*.py") for package in PACKAGES)
    return [path.name for path in files if path.name != "config.py" and pattern.search(path.read_text("utf-8"))]


def test_what_is_said_not_to_be_in_effect_yet_is_not() -> None:
    waiting = [cells[0] for cells in rows(page("docs/configuration.md")) if cells[-1].startswith("Not in effect yet")]
    assert {key: found for key in waiting if (found := readers(code(key).partition(".")[2]))} == {}
    paragraph = page("docs/errors.md").partition("Codes that nothing uses yet")[2].partition("\n\n")[0]
    unused = set(re.findall(r"`([a-z_]+)`", paragraph))
    assert unused <= ERRORS.keys()
    assert {name: found for name in unused if set(found := readers(name)) - {"errors.py"}} == {}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", PAGES)
def test_configuration_examples_are_accepted(name: str, tmp_path: Path) -> None:
    for number, text in enumerate(blocks(page(name), "toml")):
        file = tmp_path / f"{number}.toml"
        file.write_text(text, encoding="utf-8")
        load_config(file, required=True, environ={})


def test_the_configuration_errors_that_are_shown_are_those_that_are_given(tmp_path: Path) -> None:
    """Each example: the file or variable, and the error with `lmx.toml` for the whole path."""
    shown = section(page("docs/configuration.md"), "## When something is wrong")
    examples = [(code(cells[0]), code(cells[1])) for cells in rows(shown)[1:]]
    assert len(examples) >= 5
    for given, words in examples:
        file = tmp_path / "lmx.toml"
        environ = {}
        if given.startswith("LMX_"):
            name, _, value = given.partition("=")
            environ[name] = value
            file.write_text("")
        else:
            file.write_text(given.replace("⏎", "\n"))
        with pytest.raises(BadConfigError) as raised:
            load_config(file, environ=environ)
        assert str(raised.value).replace(str(file), "lmx.toml") == words


# -- errors, exit codes, states -----------------------------------------------------------------------------------


def test_the_error_table_is_the_one_of_the_code() -> None:
    documented = {cells[0]: cells[:5] for cells in rows(section(page("docs/errors.md"), "## The table"))[1:]}
    wanted = {
        f"`{e.code}`": (f"`{e.code}`", str(e.status), f"`{e.type}`", e.title, str(e.retry_after_s or ""))
        for e in ERRORS.values()
    }
    wrong = [row(*cells) for key, cells in wanted.items() if documented.get(key) != cells]
    assert wrong == [], "rows for docs/errors.md:\n" + "\n".join(wrong)
    assert documented.keys() == wanted.keys()


def documented_numbers(name: str, heading: str) -> dict[str, tuple[str, ...]]:
    return {cells[0]: cells[1:] for cells in rows(section(page(name), heading))[1:]}


def test_exit_codes_of_the_command_line_are_documented() -> None:
    assert documented_numbers("docs/cli.md", "## Exit codes").keys() == {str(int(each)) for each in CliExit}


def consequence(*, counted: bool, permanent: bool) -> str:
    return "set aside at once" if permanent else "counted" if counted else "not counted"


def test_exit_codes_of_workers_are_documented_with_their_class_and_consequence() -> None:
    ends = {each: exits.classify(int(each), at=0, asked=False, hung=False) for each in WorkerExit}
    wanted = {
        str(int(each)): (f"`{end.name}`", consequence(counted=end.counted, permanent=end.permanent))
        for each, end in ends.items()
    }
    documented = documented_numbers("docs/operations.md", "## Exit codes of workers and the gateway")
    assert {number: cells[:2] for number, cells in documented.items()} == wanted


def test_every_class_of_end_is_documented_with_what_follows() -> None:
    wanted = {
        f"`{name}`": (kind.words, consequence(counted=kind.counted, permanent=kind.permanent), "yes" * kind.degrade)
        for name, kind in exits.table().classes.items()
    }
    documented = documented_numbers("docs/operations.md", "## Classes of ends")
    wrong = [row(name, *cells) for name, cells in wanted.items() if documented.get(name) != cells]
    assert wrong == [], "rows for docs/operations.md:\n" + "\n".join(wrong)
    assert documented.keys() == wanted.keys()


def test_every_state_of_a_model_is_explained() -> None:
    documented = documented_numbers("docs/operations.md", "## States of a model")
    assert documented.keys() == {f"`{each.value}`" for each in ModelState}


# -- command line -------------------------------------------------------------------------------------------------


def command_headings() -> set[str]:
    return set(re.findall(r"^## `([a-z-]+)[^`]*`$", page("docs/cli.md"), re.MULTILINE))


def test_every_command_has_its_section() -> None:
    assert command_headings() == set(cli.commands)


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_option_and_argument_of_a_command_is_documented(name: str) -> None:
    command = cli.commands[name]
    heading = next(line for line in page("docs/cli.md").splitlines() if re.match(rf"## `{name}[ `]", line))
    text = section(page("docs/cli.md"), heading)
    options = {o for p in command.params if isinstance(p, click.Option) for o in p.opts}
    assert set(re.findall(r"(?<![\w-])--[a-z-]+", heading)) == options
    assert {f"`{option}`" for option in options if f"`{option}`" not in text} == set()
    arguments = [p.make_metavar(click.Context(command)) for p in command.params if isinstance(p, click.Argument)]
    assert [word for word in arguments if word not in heading] == []


def subcommands() -> list[tuple[str, str]]:
    return [(n, sub) for n, group in cli.commands.items() if isinstance(group, click.Group) for sub in group.commands]


@pytest.mark.parametrize(("name", "sub"), subcommands())
def test_every_option_and_argument_of_a_subcommand_is_documented(name: str, sub: str) -> None:
    group = cli.commands[name]
    assert isinstance(group, click.Group)
    command = group.commands[sub]
    heading = next(line for line in page("docs/cli.md").splitlines() if re.match(rf"### `{name} {sub}[ `]", line))
    text = section(page("docs/cli.md").replace("\n## ", "\n### "), heading)
    options = {o for p in command.params if isinstance(p, click.Option) for o in p.opts}
    assert set(re.findall(r"(?<![\w-])--[a-z-]+", heading)) == options
    assert {f"`{option}`" for option in options if f"`{option}`" not in text} == set()
    arguments = [p.make_metavar(click.Context(command)) for p in command.params if isinstance(p, click.Argument)]
    assert [word for word in arguments if word not in heading] == []


def test_options_of_the_program_are_documented() -> None:
    text = page("docs/cli.md")
    assert [o for p in cli.params for o in p.opts if f"`{o}`" not in text] == []


def test_the_readme_names_every_command() -> None:
    named = {re.split(r"[ `]", code(cells[0]))[0] for cells in rows(section(page("README.md"), "## More models"))[1:]}
    assert named == set(cli.commands)


@pytest.mark.parametrize("name", PAGES)
def test_commands_that_are_named_exist(name: str) -> None:
    named = re.findall(r"(?:^|[`/( ])lmx-supervisor ([a-z][a-z-]+)\b(?! \|)", page(name), re.MULTILINE)
    assert set(named) <= set(cli.commands)


# -- events, modules, dependencies --------------------------------------------------------------------------------


def logged_events() -> set[str]:
    """The names that the code gives to `event`, `exception_event` and the journal."""
    names = set()
    for path in itertools.chain.from_iterable((REPOSITORY / package).rglob("*.py") for package in PACKAGES):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            called = ast.unparse(node.func)
            if called in {"event", "exception_event"} or called.endswith("ournal.write"):
                first = node.args[0]
                chosen = [first.body, first.orelse] if isinstance(first, ast.IfExp) else [first]
                names |= {each.value for each in chosen if isinstance(each, ast.Constant)}
    return names


def test_every_log_event_is_in_the_list_and_no_other() -> None:
    listed = section(page("docs/operations.md"), "## Log events")
    documented = {code(name) for cells in rows(listed) for name in cells[0].split(", ") if name.startswith("`")}
    names = logged_events() | {"library_log"}
    assert (sorted(names - documented), sorted(documented - names)) == ([], [])


def test_every_module_has_its_line_in_the_architecture() -> None:
    documented = {code(cells[0]) for cells in rows(page("docs/architecture.md")) if code(cells[0]).endswith(".py")}
    modules = {
        str(path.relative_to(REPOSITORY))
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert (sorted(modules - documented), sorted(documented - modules)) == ([], [])


def test_every_dependency_has_a_line_with_its_reason() -> None:
    project = tomllib.loads(page("pyproject.toml"))["project"]
    wanted = {
        re.split(r"[^a-z0-9-]", requirement.lower())[0]
        for requirement in [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    }
    documented = {
        code(name): cells[1:]
        for cells in rows(section(page("docs/decisions.md"), "## Dependencies"))
        for name in cells[0].split(", ")
        if name.startswith("`")
    }
    assert (sorted(wanted - documented.keys()), sorted(documented.keys() - wanted)) == ([], [])
    assert all(len(cells) == 2 and all(cells) for cells in documented.values())


# -- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_links_within_the_repository_lead_somewhere(name: str) -> None:
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page(name))
    broken = [
        target for target in targets
        if "://" not in target and not ((REPOSITORY / name).parent / target).resolve().exists()
    ]  # fmt: skip
    assert broken == []


@pytest.mark.parametrize("name", PAGES)
def test_files_that_are_named_exist(name: str) -> None:
    """`gateway/chat.py` and the like, in code spans."""
    folders = "|".join([*PACKAGES, "tests", "docs", "deploy", "scripts", "bench"])
    named = re.findall(rf"`((?:{folders})/[\w/.-]+\.(?:py|md|plist|sh))`", page(name))
    assert [path for path in named if not (REPOSITORY / path).exists()] == []


def test_the_readme_uses_the_default_port_and_model() -> None:
    text = page("README.md")
    config = Config()
    assert f"http://{config.gateway.host}:{config.gateway.port}/v1" in text
    assert f'"model": "{DEFAULT_MODEL_ID}"' in text
    assert config.models.auto_load == (DEFAULT_MODEL_ID,)


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", page("Makefile"), re.MULTILINE))
    spans = [span for name in PAGES for span in re.findall(r"`(make [a-z][a-z-]*)", page(name))]
    assert {span.removeprefix("make ") for span in spans} <= targets
    assert {"run", "test", "setup"} <= targets


def test_enums_are_documented_by_value_and_not_by_hand() -> None:
    """A guard for the tables above: they would pass on an empty enum."""
    each: type[Enum]
    for each in (CliExit, WorkerExit, ModelState):
        assert len(each) > 5
