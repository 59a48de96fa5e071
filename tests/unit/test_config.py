"""The configuration says what is wrong, where, and what was probably meant (exit 5 with these words)."""

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.config import Config
from protocol.config_load import BadConfigError, load_config

SECTIONS = {name: getattr(Config(), name) for name in Config.__struct_fields__}
KEYS = [(section, key, getattr(value, key)) for section, value in SECTIONS.items() for key in value.__struct_fields__]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "lmx.toml"


def load(file: Path, text: str | bytes | None = None, **environ: str) -> Config:
    if text is not None:
        file.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config(file, environ=environ)


def why_not(file: Path, otherwise: str = "", **environ: str) -> str:
    """The reason for a refusal; for none the file's name, or what is given."""
    try:
        load_config(file, environ=environ)
    except BadConfigError as error:
        return str(error)
    return otherwise or str(file)


def refused(file: Path, text: str | bytes | None = None, **environ: str) -> str:
    with pytest.raises(BadConfigError) as caught:
        load(file, text, **environ)
    message = str(caught.value)
    assert "\n" not in message.strip()
    return message


# -- defaults -------------------------------------------------------------------------------------------------------


def test_without_a_file_everything_has_its_documented_default(file: Path) -> None:
    config = load(file)
    assert config == Config()
    assert (config.gateway.host, config.gateway.port) == ("127.0.0.1", 1234)
    assert config.gateway.max_body_bytes == 16 * 1024 * 1024
    assert config.gateway.max_messages == 256
    assert config.gateway.max_tokens_limit == 32_768
    assert config.gateway.default_temperature == 0.7
    assert config.gateway.chat_timeout_s == 900
    assert (config.models.max_concurrent_requests, config.models.queue_depth) == (32, 128)
    assert config.models.slot_timeout_s == 30
    assert config.models.auto_load == ("smollm2-135m-instruct",)
    lifecycle = config.lifecycle
    assert lifecycle.restart_delays_s == (0, 1, 2, 5, 15, 30, 60)
    assert (lifecycle.hello_s, lifecycle.lease_s, lifecycle.heartbeat_hung_s) == (20, 120, 15)


def test_an_empty_file_is_the_defaults(file: Path) -> None:
    assert load(file, "") == Config()
    assert load(file, "# only a comment\n[gateway]\n") == Config()
    assert load(file, b"\xef\xbb\xbf[gateway]\r\nport = 9\r\n").gateway.port == 9


def test_a_named_file_has_to_be_there(file: Path) -> None:
    with pytest.raises(BadConfigError, match="there is no such file"):
        load_config(file, required=True, environ={})


def test_every_default_may_be_written_into_the_file(file: Path) -> None:
    text = ""
    for section, value in SECTIONS.items():
        text += f"[{section}]\n"
        for key in value.__struct_fields__:
            default = getattr(value, key)
            shown = list(default) if isinstance(default, tuple) else default
            text += f"{key} = {msgspec.json.encode(shown).decode()}\n"
    assert load(file, text) == Config()


# -- places and nearest keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[gateway]\nprot = 1\n", 2, ["unknown key gateway.prot", "did you mean gateway.port?"]),
        ("\n\n[gatway]\n", 3, ["unknown key gatway", "did you mean gateway?"]),
        ("# port\n[gateway]\n\n\nport = 'x'\n", 5, ["gateway.port", "Expected `int`, got `str`"]),
        ("[gateway]\nport = 1\n[models]\nauto_lod = []\n", 4, ["models.auto_lod", "models.auto_load"]),
        ("[models]\nqueue_depth = 3\n[gateway]\nport = 70000\n", 4, ["gateway.port", "65535"]),
        ("gateway.prot = 1\n", 1, ["gateway.prot", "gateway.port"]),
        ("\ngateway = {prot = 1}\n", 2, ["gateway.prot", "gateway.port"]),
        ("\n[[gateway]]\n", 2, ["gateway", "Expected `object`, got `array`"]),
        ("gateway = 5\n", 1, ["gateway", "Expected `object`, got `int`"]),
        ("prot = 5\n", 1, ["unknown key prot"]),
        ("['gateway']\n'prot' = 5\n", 2, ["gateway.prot", "gateway.port"]),
        ('["gateway"]\n"prot" = 5\n', 2, ["gateway.prot", "gateway.port"]),
        ("[gateway]\n  [ lifecycle ]  # why\n  helo_s=1\n", 3, ["lifecycle.helo_s", "lifecycle.hello_s"]),
        ("[lifecycle]\nrestart_delays_s = []\n", 2, ["lifecycle.restart_delays_s", "length >= 1"]),
        ("[lifecycle]\nrestart_delays_s = [1,\n -1]\n", 2, ["lifecycle.restart_delays_s", ">= 0"]),
        ("[log]\nlevel = 'LOUD'\n", 2, ["log.level", "LOUD"]),
        ("[worker]\nmodule = 'os; rm'\n", 2, ["worker.module", "regex"]),
    ],
)
def test_an_error_names_file_line_key_and_the_nearest_key(file: Path, text: str, line: int, words: list[str]) -> None:
    message = refused(file, text)
    assert message.startswith(f"{file}:{line}: "), message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not toml", "line 1"),
        ("[gateway]\nport = \n", "line 2"),
        ("[gateway]\nport = 1\nport = 2\n", "line 3"),
        ("[gateway]\n[gateway]\n", "line 2"),
        ("x = " + "[" * 20_000, "not valid TOML"),
        ("x = " + "9" * 20_000, "not valid TOML"),
        ("x = 2020-99-99T99:99:99", "not valid TOML"),
        ("\x00", "not valid TOML"),
        ("x = '\ufffe", "not valid TOML"),
    ],
    ids=lambda text: text[:12],
)
def test_text_that_is_not_toml_says_so_with_the_line(file: Path, text: str, words: str) -> None:
    message = refused(file, text)
    assert message.startswith(f"{file}: not valid TOML: ")
    assert words in message


def test_bytes_that_are_not_utf8_are_named_with_their_line(file: Path) -> None:
    assert refused(file, b"[gateway]\nhost = '\xff'\n") == f"{file}:2: cannot be read: not UTF-8"


def test_a_file_that_is_too_large_is_not_read(file: Path) -> None:
    file.write_bytes(b"#" * (1024 * 1024 + 1))
    assert "larger than" in refused(file)
    file.write_bytes(b"#" * (1024 * 1024))
    assert load(file) == Config()
    assert "larger than" in refused(Path("/dev/zero"))


def test_a_folder_or_a_closed_file_is_refused_with_the_reason(tmp_path: Path, file: Path) -> None:
    assert refused(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"
    file.symlink_to(file)
    assert "cannot be read" in refused(file)


# -- types ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("section", "key", "default"), KEYS, ids=[f"{s}.{k}" for s, k, _ in KEYS])
def test_every_key_refuses_another_type_and_can_be_set_by_a_variable(
    file: Path, section: str, key: str, default: Any
) -> None:
    wrong = "{}" if isinstance(default, str | tuple | bool) else "'text'"
    message = refused(file, f"[{section}]\n{key} = {wrong}\n")
    assert message.startswith(f"{file}:2: {section}.{key}: ")
    shown = default if isinstance(default, str) else msgspec.json.encode(default).decode()
    variable = f"LMX_{section}__{key}".upper()
    config = load(file, "", **{variable: shown})
    assert getattr(getattr(config, section), key) == default


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "0.0", "1e300"])
def test_no_duration_is_negative_endless_or_not_a_number(file: Path, value: str) -> None:
    assert "lifecycle.hello_s" in refused(file, f"[lifecycle]\nhello_s = {value}\n")
    if value != "0.0":
        assert "restart_delays_s" in refused(file, f"[lifecycle]\nrestart_delays_s = [1, {value}]\n")


def test_whole_numbers_serve_as_durations_and_fractions_do_not_serve_as_counts(file: Path) -> None:
    assert load(file, "[lifecycle]\nhello_s = 3\n").lifecycle.hello_s == 3.0
    assert "Expected `int`" in refused(file, "[gateway]\nbacklog = 3.5\n")
    assert "Expected `int`" in refused(file, "[gateway]\nport = true\n")


# -- the environment ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["heartbeat_hung_s", "gateway_hung_s", "lease_s"])
def test_a_silence_shorter_than_the_time_between_heartbeats_is_refused(file: Path, key: str) -> None:
    file.write_text(f"[lifecycle]\nheartbeat_s = 2\n{key} = 2.5\n")
    assert load_config(file, environ={}).lifecycle.heartbeat_s == 2
    with pytest.raises(BadConfigError, match=rf"heartbeat_s \(3\) has to be less than lifecycle\.{key} \(2\.5\)"):
        load_config(file, environ={"LMX_LIFECYCLE__HEARTBEAT_S": "3"})


def test_a_variable_beats_the_file(file: Path) -> None:
    assert load(file, "[gateway]\nport = 1\nhost = 'h'\n", LMX_GATEWAY__PORT="18234").gateway.port == 18234
    assert load(file, LMX_GATEWAY__HOST="::").gateway == msgspec.structs.replace(Config().gateway, host="::", port=1)


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("LMX_GATEWAY__HOST", "1234", "1234"),
        ("LMX_GATEWAY__HOST", "'quoted'", "'quoted'"),
        ("LMX_GATEWAY__PORT", "0x10", 16),
        ("LMX_LIFECYCLE__HELLO_S", "2", 2.0),
        ("LMX_LIFECYCLE__HELLO_S", "2.5", 2.5),
        ("LMX_WORKER__PRELOAD_BLAS", "false", False),
        ("LMX_WORKER__PRELOAD_BLAS", "False", False),
        ("LMX_WORKER__PRELOAD_BLAS", "0", False),
        ("LMX_WORKER__PRELOAD_BLAS", " 1 ", True),
        ("LMX_WORKER__PRELOAD_BLAS", "TRUE", True),
        ("LMX_MODELS__AUTO_LOAD", "[]", ()),
        ("LMX_MODELS__AUTO_LOAD", "", ()),
        ("LMX_MODELS__AUTO_LOAD", '["a", "b/c"]', ("a", "b/c")),
        ("LMX_MODELS__AUTO_LOAD", "a, b/c,", ("a", "b/c")),
        ("LMX_MODELS__AUTO_LOAD", "7", ("7",)),
        ("LMX_MODELS__AUTO_LOAD", "true", ("true",)),
        ("LMX_LIFECYCLE__RESTART_DELAYS_S", "[0, 1.5]", (0.0, 1.5)),
        ("LMX_LIFECYCLE__RESTART_DELAYS_S", "0, 1.5", (0.0, 1.5)),
        ("LMX_LIFECYCLE__RESTART_DELAYS_S", "3", (3.0,)),
        ("LMX_LIFECYCLE__PROBE_DELAYS_S", "", ()),
    ],
)
def test_a_variable_is_read_as_the_type_of_its_key(file: Path, variable: str, text: str, value: object) -> None:
    section, _, key = variable.removeprefix("LMX_").lower().partition("__")
    assert getattr(getattr(load(file, **{variable: text}), section), key) == value


def test_a_list_is_read_alike_when_the_file_empties_it(file: Path) -> None:
    assert load(file, "[models]\nauto_load = []\n", LMX_MODELS__AUTO_LOAD="7").models.auto_load == ("7",)


@pytest.mark.parametrize(
    ("variable", "text", "words"),
    [
        ("LMX_GATEWAY__PORT", "http", ["gateway.port", "Expected `int`, got `str`"]),
        ("LMX_GATEWAY__PORT", "", ["gateway.port", "Expected `int`"]),
        ("LMX_GATEWAY__PORT", "1\n[gateway]", ["gateway.port", "Expected `int`"]),
        ("LMX_GATEWAY__PORT", "70000", ["gateway.port", "65535"]),
        ("LMX_GATEWAY__PORT", "[" * 20_000, ["gateway.port", "Expected `int`"]),
        ("LMX_GATEWAY__PORT", "9" * 20_000, ["gateway.port", "Expected `int`"]),
        ("LMX_GATEWAY__PROT", "1", ["unknown key gateway.prot", "did you mean gateway.port?"]),
        ("LMX_GATWAY__PORT", "1", ["unknown key gatway", "did you mean gateway?"]),
        ("LMX___PORT", "1", ["unknown key"]),
        ("LMX_GATEWAY__", "1", ["unknown key gateway."]),
        ("LMX_GATEWAY__PORT__X", "1", ["unknown key gateway.port__x", "gateway.port"]),
        ("LMX_WORKER__PRELOAD_BLAS", "maybe", ["worker.preload_blas", "Expected `bool`"]),
        ("LMX_MODELS__AUTO_LOAD", "[1]", ["models.auto_load", "Expected `str`"]),
        ("LMX_LIFECYCLE__RESTART_DELAYS_S", "1, soon", ["lifecycle.restart_delays_s", "Expected `float`"]),
        ("LMX_GATEWAY__HOST", "\udcff", ["not UTF-8"]),
        ("LMX_LOG__LEVEL", "loud", ["log.level", "loud"]),
    ],
)
def test_a_wrong_variable_is_named_with_its_key(file: Path, variable: str, text: str, words: list[str]) -> None:
    message = refused(file, **{variable: text})
    assert f"environment variable {variable}" in message
    for word in words:
        assert word in message, message


def test_other_variables_of_ours_and_of_others_are_left_alone(file: Path) -> None:
    assert load(file, LMX_HOME="/x", LMX_FAULT="{}", PATH="/bin", lmx_gateway__port="9", A__B="c") == Config()


def test_the_process_environment_is_used_when_none_is_given(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LMX_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LMX_GATEWAY__PORT", "4321")
    assert load_config(file).gateway.port == 4321


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
@settings(max_examples=150, deadline=None)
def test_any_file_is_a_configuration_or_a_reason(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_bytes(data)
    assert str(file) in why_not(file)


@given(st.sampled_from(KEYS), st.text(alphabet=st.characters(blacklist_categories=()), max_size=30))
@settings(max_examples=300, deadline=None)
def test_any_value_of_a_variable_is_taken_or_refused_with_its_name(key: tuple[str, str, Any], text: str) -> None:
    variable = f"LMX_{key[0]}__{key[1]}".upper()
    assert variable in why_not(Path("/nonexistent"), otherwise=variable, **{variable: text})
