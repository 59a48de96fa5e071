"""Client ids that a proxy signs for: who is counted, and that no other header ever counts."""

import ast
import hashlib
import hmac
import inspect
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway import signed_client
from gateway.auth import Access
from gateway.signed_client import MAX_AGE_S, SignedClients
from protocol.config import LimitsConfig
from protocol.errors import LmxError
from tests.harness import Lmx
from tests.logkit import logged
from tests.security.doorkit import ADMIN_KEY, CHAT, PROXIES, DoorKit

SECRET = b"c" * 64
NAME = "X-LMX-Client"
NOW = 1_800_000_000
REPOSITORY = Path(__file__).parents[2]


def signed(client: str, *, at: float | None = None, nonce: str = "", secret: bytes = SECRET) -> str:
    """What the proxy sends, made without our code."""
    text = f"{client};t={int(time.time() if at is None else at)};n={nonce or 'any-nonce'}"
    return f"{text};s={hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()}"


def secret_file(folder: Path) -> str:
    file = folder / "client.secret"
    file.write_bytes(SECRET + b"\n")
    file.chmod(0o600)
    return str(file)


@pytest.fixture
def nonces() -> Callable[[str], tuple[str, str]]:
    count = iter(range(10_000))
    return lambda client: (NAME, signed(client, nonce=f"a-nonce-{next(count)}"))


def scope_with(*values: str | bytes, **more: Any) -> dict[str, Any]:
    headers = [(b"x-lmx-client", value if isinstance(value, bytes) else value.encode()) for value in values]
    return {"type": "http", "headers": headers, **more}


def named(checker: SignedClients, *values: str | bytes, now: float = NOW) -> str:
    return checker.named(Access("192.0.2.7"), scope_with(*values), now).client


def refusal(checker: SignedClients, *values: str | bytes, now: float = NOW) -> str:
    with pytest.raises(LmxError) as refused:
        named(checker, *values, now=now)
    assert not any(str(value) in refused.value.message for value in values if value)
    return refused.value.code


@pytest.mark.usefixtures("no_minute_ends")
async def test_clients_of_one_proxy_are_counted_each_and_it_alone_by_its_key(
    tmp_path: Path, nonces: Callable[[str], tuple[str, str]]
) -> None:
    kit = DoorKit(tmp_path, LimitsConfig(inference_per_minute=2), client_secret_file=secret_file(tmp_path))
    key = kit.key("proxy")
    for client in ("anna", "user@example.com"):
        answers = [await kit.ask(CHAT, nonces(client), key=key) for _ in range(3)]
        assert [answer.status for answer in answers] == [200, 200, 429]
        assert answers[0].body["client"] == f"signed:{client}"
        assert kit.seen[-1]["client"][0] == f"signed:{client}"  # what the worker shares turns by
    own = [await kit.ask(key=key) for _ in range(3)]
    assert [(answer.status, answer.body.get("client")) for answer in own] == [
        (200, "key:id-proxy"), (200, "key:id-proxy"), (429, None),
    ]  # fmt: skip


async def test_a_name_keeps_the_rights_of_its_key_and_opens_nothing(
    tmp_path: Path, nonces: Callable[[str], tuple[str, str]]
) -> None:
    kit = DoorKit(
        tmp_path, profile="internet", cors_origins=(), trusted_proxies=PROXIES, client_secret_file=secret_file(tmp_path)
    )
    few = kit.key("few", models=("a",))
    outcomes = [
        (await kit.ask(path, nonces("anna"), key=key, peer="10.0.0.1", body=b'{"model": "b"}')).status
        for path, key in ((CHAT, ""), (CHAT, "wrong"), (CHAT, few), ("/admin/x", ""), ("/admin/x", few))
    ]
    assert outcomes == [401, 401, 403, 401, 403]
    admin = await kit.ask("/admin/x", nonces("anna"), key=ADMIN_KEY, peer="10.0.0.1")
    assert (admin.status, admin.body["client"]) == (200, "admin")  # the journal says who it was, not who it says it is


@pytest.mark.usefixtures("no_minute_ends")
async def test_bad_ones_are_401_counted_by_address_and_never_written_down(tmp_path: Path) -> None:
    kit = DoorKit(tmp_path, LimitsConfig(inference_per_minute=3), client_secret_file=secret_file(tmp_path))
    with logged() as lines:
        forged = [
            await kit.ask(CHAT, (NAME, signed("mallory", secret=b"d" * 64, nonce=f"a-nonce-{n}"))) for n in range(5)
        ]
    assert [answer.status for answer in forged] == [401] * 3 + [429] * 2
    assert forged[0].code == "invalid_client_signature"
    assert kit.seen == []
    assert "mallory" not in str(lines) + str(forged)


async def test_without_a_secret_the_header_counts_for_nothing(tmp_path: Path) -> None:
    answer = await DoorKit(tmp_path).ask(CHAT, (NAME, signed("anna")))
    assert (answer.status, answer.body["client"]) == (200, "192.0.2.7")


async def test_a_secret_that_cannot_be_read_refuses_who_depends_on_it(tmp_path: Path) -> None:
    with logged() as lines:
        kit = DoorKit(tmp_path, client_secret_file=str(tmp_path / "gone"))
    assert "client_secret_unreadable" in str(lines)
    answers = [await kit.ask(CHAT, (NAME, signed("anna"))), await kit.ask()]
    assert [answer.status for answer in answers] == [503, 200]


@pytest.mark.parametrize("away", [-MAX_AGE_S - 1, MAX_AGE_S + 1, 10**11])
def test_a_header_of_another_time_is_refused(away: int) -> None:
    assert refusal(SignedClients(SECRET), signed("anna", at=NOW + away)) == "invalid_client_signature"
    assert named(SignedClients(SECRET), signed("anna", at=NOW + max(-MAX_AGE_S, min(away, MAX_AGE_S)))) == "signed:anna"


def test_a_header_is_good_once_for_as_long_as_it_could_be_good_at_all() -> None:
    checker, header = SignedClients(SECRET), signed("anna", at=NOW + MAX_AGE_S)
    assert named(checker, header) == "signed:anna"
    for later in (0, 1, MAX_AGE_S, 2 * MAX_AGE_S):
        named(checker, signed("other", at=NOW + later, nonce=f"a-nonce-{later}"), now=NOW + later)
        assert refusal(checker, header, now=NOW + later) == "invalid_client_signature"


def test_what_is_remembered_is_bounded_and_forgotten() -> None:
    checker = SignedClients(SECRET, max_seen=3)
    for number in range(3):
        named(checker, signed("anna", at=NOW, nonce=f"a-nonce-{number}"))
    assert refusal(checker, signed("anna", at=NOW, nonce="one-more")) == "access_check_failed"
    later = NOW + 2 * MAX_AGE_S + 1
    assert named(checker, signed("anna", at=later, nonce="one-more"), now=later) == "signed:anna"
    assert len(checker._seen) == 1


@pytest.mark.parametrize(
    "values",
    [
        ("",),
        ("anna",),
        (signed("anna", at=NOW), signed("anna", at=NOW)),
        (signed("anna", at=NOW, nonce="short"),),
        (signed("an na", at=NOW),),
        (signed("änna", at=NOW),),
        (signed("a" * 65, at=NOW),),
        (signed("lmx-" + "a" * 43, at=NOW),),
        (signed("anna", at=NOW).upper(),),
        (signed("anna", at=NOW) + " ",),
        (signed("anna", at=NOW).encode() + b"\xff",),
    ],
)
def test_what_is_malformed_double_or_a_key_is_refused(values: tuple[str | bytes, ...]) -> None:
    assert refusal(SignedClients(SECRET), *values) == "invalid_client_signature"


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.integers(0, 200), st.integers(1, 255))
def test_no_byte_of_it_can_be_changed(place: int, change: int) -> None:
    raw = bytearray(signed("anna", at=NOW).encode())
    raw[place % len(raw)] ^= change
    assert refusal(SignedClients(SECRET), bytes(raw)) == "invalid_client_signature"


@given(st.binary(max_size=200))
def test_nothing_that_was_not_signed_is_taken(raw: bytes) -> None:
    assert refusal(SignedClients(SECRET), raw) == "invalid_client_signature"


def test_signatures_are_compared_in_constant_time() -> None:
    tree = ast.parse(inspect.getsource(signed_client))
    calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert "hmac.compare_digest(expected, form['mac'])" in calls
    compared = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    assert not [
        words for words in compared if "expected" in words or "secret" in words.replace("self._secret is None", "")
    ]


def test_the_program_in_the_documentation_signs_what_is_taken(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/security.md").read_text(), re.DOTALL)
    file = secret_file(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", f"{program.replace('/etc/lmx/client.secret', file)}\nprint(sign('anna'))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert named(SignedClients(SECRET), done.stdout.strip(), now=time.time()) == "signed:anna"


@pytest.mark.parametrize("harm", ["missing", "chmod", "short", "link", "relative", "folder"])
def test_a_secret_that_cannot_be_trusted_fails_the_start(
    new_lmx: Callable[..., Lmx], tmp_path: Path, harm: str
) -> None:
    path = secret_file(tmp_path)
    file = Path(path)
    if harm == "missing":
        file.unlink()
    elif harm == "chmod":
        file.chmod(0o640)
    elif harm == "short":
        file.write_text("ccccccccc")
    elif harm == "link":
        path = str(tmp_path / "link")
        Path(path).symlink_to(file)
    elif harm == "folder":
        path = str(tmp_path)
    else:
        path = "client.secret"
    lmx = new_lmx(LMX_SECURITY__CLIENT_SECRET_FILE=path)
    done = lmx.cli("run", check=False, within_s=30)
    assert (done.returncode, "security.client_secret_file" in done.stderr, "ccc" in done.stderr) == (5, True, False)
    assert "Traceback" not in done.stderr
