"""The profiles: what each demands is one table, documented as it is, and a start that breaks it fails."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from protocol.config import Config, GatewayConfig, LimitsConfig, SecurityConfig
from protocol.profiles import ADMIN_PER_MINUTE, INFERENCE_PER_MINUTE, PROFILES, Profile, is_loopback, problems, rules
from tests.harness import Lmx
from tests.security.doorkit import ADMIN_KEY, PROXIES, DoorKit

PAGE = Path(__file__).resolve().parents[2] / "docs/security.md"
#: What makes each profile whole, beyond its name.
WHOLE: dict[str, dict[str, Any]] = {
    "local": {},
    "lan": {},
    "trusted-gateway": {"trusted_proxies": ("10.0.0.0/8",)},
    "internet": {"trusted_proxies": ("10.0.0.0/8",), "cors_origins": ()},
}


def config(profile: str, host: str = "127.0.0.1", **changes: Any) -> Config:
    security = SecurityConfig(profile=profile, **{**WHOLE[profile], **changes})  # type: ignore[arg-type]
    return Config(gateway=GatewayConfig(host=host), security=security)


def found(profile: str, host: str = "127.0.0.1", *, admin_key: bool = True, keys: int = 1, **changes: Any) -> str:
    return "\n".join(problems(config(profile, host, **changes), admin_key=admin_key, inference_keys=keys))


def cells(name: str, profile: Profile) -> list[str]:
    """A profile in the words of the documentation."""
    who = {"no": "everybody", "always": "trusted proxies, this machine"}
    return [
        "no" if profile.loopback_only else "yes",
        "needed",
        "needed" if profile.keys_required else "optional",
        "no" if profile.keys_required else "yes",
        who.get(profile.behind_proxy, "without TLS: trusted proxies, this machine"),
        profile.cors or "refused",
        "yes" if profile.wildcards else "no",
        f"{INFERENCE_PER_MINUTE}, {ADMIN_PER_MINUTE}" if profile.limits else "none",
    ]


def test_the_table_in_the_documentation_is_the_one_in_the_code() -> None:
    text = re.search(r"^## Profiles$.*?(?=^## )", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert text
    lines = [line for line in text[0].splitlines() if line.startswith("|") and not set(line) <= set("|-")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    columns = list(zip(*table, strict=True))[1:]
    assert {name.strip("`"): column for name, *column in columns} == {n: cells(n, p) for n, p in PROFILES.items()}


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_that_has_what_it_demands_starts(profile: str) -> None:
    host = "127.0.0.1" if profile == "local" else "0.0.0.0"
    assert found(profile, host) == ""


def test_local_needs_nothing_at_all() -> None:
    assert found("local", admin_key=False, keys=0) == ""


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.5", "mymac.local", "", "127.0.0.1.example.com", "2130706433"]
)
def test_nothing_but_loopback_is_listened_on_without_saying_so(host: str) -> None:
    assert "listens on this machine only" in found("local", host)


@pytest.mark.parametrize(("profile", "host"), [*itertools.product(PROFILES, ["0.0.0.0", "::", "10.1.2.3"])])
def test_no_profile_listens_beyond_loopback_without_an_admin_key(profile: str, host: str) -> None:
    assert "needs an admin key" in found(profile, host, admin_key=False)


@pytest.mark.parametrize("profile", ["trusted-gateway", "internet"])
def test_protected_profiles_need_inference_keys_and_cannot_be_relaxed(profile: str) -> None:
    assert "keys create" in found(profile, keys=0)
    assert "may not be optional" in found(profile, inference_keys="optional")
    assert rules(config(profile).security, LimitsConfig()).keys_required


def test_internet_needs_chosen_origins_and_tls_or_a_proxy() -> None:
    assert "security.cors_origins" in found("internet", cors_origins=("auto",))
    assert "security.cors_origins may not hold '*'" in found("internet", cors_origins=("*",))
    assert "security.trusted_proxies" in found("internet", trusted_proxies=())
    assert found("internet", trusted_proxies=(), tls_certificate="a", tls_key="b") == ""
    assert "set both or none" in found("internet", tls_certificate="a")


def test_internet_without_tls_is_reached_through_the_proxy_only() -> None:
    assert rules(config("internet").security, LimitsConfig()).proxies_only
    tls = config("internet", tls_certificate="a", tls_key="b")
    assert not rules(tls.security, LimitsConfig()).proxies_only


def test_a_trusted_gateway_has_a_network() -> None:
    assert "security.trusted_proxies" in found("trusted-gateway", trusted_proxies=())
    # TLS does not replace it there.
    assert found("trusted-gateway", trusted_proxies=(), tls_certificate="a", tls_key="b")


@pytest.mark.parametrize("profile", ["trusted-gateway", "internet"])
def test_protected_profiles_name_their_hosts(profile: str) -> None:
    assert "security.allowed_hosts may not hold '*'" in found(profile, allowed_hosts=("*",))


@pytest.mark.parametrize(
    "network", ["10.0.0.1/8", "10.0.0.0/33", "proxy.lan", "", "fd00::/200", "0.0.0.0/0", "::/0", "10.0.0.0/8 "]
)
def test_a_network_that_is_none_or_everybody_fails_the_start(network: str) -> None:
    assert "security.trusted_proxies" in found("lan", trusted_proxies=(network,))


@pytest.mark.parametrize(
    "origin",
    ["192.168.188.*", "http://localhost:*", "https://a.com/", "https://A.com", "null", "a.com", "https://a.com\n", ""],
)
def test_an_origin_that_would_never_match_fails_the_start(origin: str) -> None:
    assert "security.cors_origins" in found("lan", cors_origins=(origin,))
    assert found("lan", cors_origins=("https://a.com", "http://10.0.0.1:3000", "http://[::1]:80")) == ""


@pytest.mark.parametrize("host", ["*.example.com", "a.com:80", "A.com", "http://a.com", "", "a b"])
def test_a_host_that_would_never_match_fails_the_start(host: str) -> None:
    assert "security.allowed_hosts" in found("lan", allowed_hosts=(host,))


def test_limits_are_the_profiles_unless_they_are_set() -> None:
    def per_minute(profile: str, **limits: int) -> tuple[int, int]:
        each = rules(config(profile).security, LimitsConfig(**limits))
        return each.inference_per_minute, each.admin_per_minute

    assert per_minute("local") == (0, 0)
    assert per_minute("local", inference_per_minute=7, admin_per_minute=3) == (7, 3)
    assert per_minute("lan") == per_minute("internet") == per_minute("trusted-gateway") == (60, 10)
    assert per_minute("internet", inference_per_minute=0, admin_per_minute=0) == (0, 0)


def test_loopback_is_what_only_this_machine_reaches() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.9.9.9", "::1", "localhost", "LOCALHOST"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "", "localhost.example.com", "10.0.0.1", "0", "127.1"]))


# -- the real start -------------------------------------------------------------------------------------------------


def start(lmx: Lmx, **settings: str) -> tuple[int, str]:
    lmx.environ.update(settings)
    done = lmx.cli("run", check=False, within_s=30)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"LMX_GATEWAY__HOST": "0.0.0.0"}, "profile local listens on this machine only"),
        ({"LMX_SECURITY__PROFILE": "internet"}, "lmx-supervisor keys create"),
        ({"LMX_SECURITY__PROFILE": "trusted-gateway"}, "security.trusted_proxies"),
        ({"LMX_SECURITY__PROFILE": "cloud"}, "security.profile"),
        ({"LMX_SECURITY__TRUSTED_PROXIES": "10.0.0.0/40"}, "security.trusted_proxies"),
        ({"LMX_SECURITY__TLS_CERTIFICATE": "/dev/null", "LMX_SECURITY__TLS_KEY": "/nope"}, "security.tls_key: /nope"),
        ({"LMX_SECURITY__ADMIN_KEY": "short"}, "keys are never in the configuration"),
        ({"LMX_SECURITY__CLIENT_SECRET_FILE": "short"}, "begin with /"),
        ({"LMX_ADMIN_KEY": "short"}, "LMX_ADMIN_KEY"),
        ({"LMX_SECURITY__TLS_CERTIFICATE": "/nope", "LMX_SECURITY__TLS_KEY": "/nope"}, "No such file"),
        ({"LMX_LIMITS__INFERENCE_PER_MINUTE": "-2"}, "limits.inference_per_minute"),
    ],
    ids=str,
)
def test_a_start_that_breaks_its_profile_fails_with_words_and_5(
    new_lmx: Callable[..., Lmx], settings: dict[str, str], words: str
) -> None:
    code, said = start(new_lmx(), **settings)
    assert code == 5
    assert words in said
    assert "Traceback" not in said
    assert "short" not in said.replace("shorter", "")


@pytest.mark.parametrize("harm", ["chmod", "empty", "link", "folder", "garbage"])
def test_an_admin_key_that_cannot_be_trusted_fails_the_start(new_lmx: Callable[..., Lmx], harm: str) -> None:
    lmx = new_lmx()
    file = lmx.home / "admin.key"
    if harm == "folder":
        file.mkdir()
    elif harm == "link":
        (lmx.home / "elsewhere").write_text("lmx-" + "a" * 43)
        (lmx.home / "elsewhere").chmod(0o600)
        file.symlink_to(lmx.home / "elsewhere")
    else:
        file.write_bytes({"chmod": b"lmx-" + b"a" * 43, "empty": b"", "garbage": b"\xff" * 50}[harm])
        file.chmod(0o644 if harm == "chmod" else 0o600)
    code, said = start(lmx)
    assert (code, "admin.key" in said, "aaaa" in said) == (5, True, False)


def test_a_damaged_file_of_keys_stops_every_start_but_a_local_one(new_lmx: Callable[..., Lmx]) -> None:
    lmx = new_lmx()
    lmx.cli("keys", "create", "--name", "bot")
    (lmx.home / "state" / "keys").write_text("{}")
    code, said = start(lmx, LMX_SECURITY__PROFILE="lan")
    assert code == 5
    assert "keys" in said


def test_every_profile_of_the_configuration_has_its_row() -> None:
    (field,) = (each for each in msgspec.structs.fields(SecurityConfig) if each.name == "profile")
    assert set(field.type.__args__) == set(PROFILES)


@pytest.mark.parametrize("profile", ["local", "lan", "trusted-gateway", "internet"])
async def test_metrics_are_for_who_may_use_every_model_wherever_others_can_connect(
    profile: str, tmp_path: Path
) -> None:
    kit = DoorKit(tmp_path, profile=profile, trusted_proxies=PROXIES, cors_origins=())
    keys = ("", "unused", kit.key("all"), kit.key("some", models=("a",)), kit.key("boss", scope="admin"), ADMIN_KEY)
    peer = "10.0.0.7" if profile != "local" else "127.0.0.1"
    found = [(await kit.ask("/metrics", key=key, method="GET", peer=peer)).status for key in keys]
    assert found == ([200] * 6 if profile == "local" else [401, 401, 200, 403, 200, 200])
