"""The door of a whole running system: keys that come and go under load, files, secrets, TLS."""

import asyncio
import contextlib
import itertools
import shlex
import shutil
import socket
import ssl
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from protocol.config import LimitsConfig, SecurityConfig
from protocol.keys import KeyFile, KeyRecord, digest_of, new_key
from protocol.spec import GatewaySpec, read_spec
from tests.e2e.gateway_harness import chat_body, stack
from tests.harness import Lmx, chat, deadline, read_stream

INTERNET = {
    "LMX_SECURITY__PROFILE": "internet",
    "LMX_SECURITY__TRUSTED_PROXIES": "127.0.0.1/32",
    "LMX_SECURITY__CORS_ORIGINS": "[]",
    "LMX_LIMITS__INFERENCE_PER_MINUTE": "0",
}
CHAT = "/v1/chat/completions"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def create(lmx: Lmx, name: str, *options: str) -> str:
    return lmx.cli("keys", "create", "--name", name, *options).stdout.strip()


def shown_line(lmx: Lmx) -> list[str]:
    """The words of the line that `run` prints to be tried, once it is there."""
    for _ in deadline(20):
        lines = [line for line in lmx.output.read_text().splitlines() if line.startswith("  curl ")]
        if lines:
            return shlex.split(lines[0])
    raise AssertionError(lmx.tail())


def test_what_run_shows_to_be_tried_works_once_the_key_is_filled_in(
    new_lmx: Callable[..., Lmx], tiny_model: Path
) -> None:
    lmx = new_lmx(**INTERNET)
    key = create(lmx, "mine")
    lmx.start()
    lmx.load(tiny_model, "alpha")
    curl, url, *options = shown_line(lmx)
    given = [value for name, value in itertools.pairwise(options) if name == "-H"]
    body = options[options.index("-d") + 1]
    assert curl == "curl"

    def status(headers: list[str]) -> int:
        pairs = [(name, value) for name, _, value in (header.partition(": ") for header in headers)]
        return httpx.post(url, headers=pairs, content=body, timeout=60, trust_env=False).status_code

    assert status([header.replace("KEY", key) for header in given]) == 200
    assert status([header for header in given if "KEY" not in header]) == 401
    assert lmx.stop() == 0


async def test_keys_come_and_go_under_load_and_nobody_else_notices(
    new_lmx: Callable[..., Lmx], tiny_model: Path
) -> None:
    lmx = new_lmx(**INTERNET)
    refused = lmx.cli("run", check=False)
    assert (refused.returncode, "keys create" in refused.stderr) == (5, True)
    steady = create(lmx, "steady")
    lmx.start()
    lmx.load(tiny_model, "alpha")
    admin = (lmx.home / "admin.key").read_text().strip()
    done = asyncio.Event()
    async with httpx.AsyncClient(base_url=lmx.url, timeout=60, trust_env=False) as http:

        async def load() -> int:
            answered = 0
            while not done.is_set():
                headers = bearer(steady)
                got = await http.post(CHAT, json=chat("alpha", max_tokens=8, stream=False), headers=headers)
                assert got.status_code == 200, got.text
                answered += 1
            return answered

        async def status(key: str, path: str = "/v1/models") -> int:
            return (await http.get(path, headers=bearer(key) if key else {})).status_code

        loads = [asyncio.create_task(load()) for _ in range(4)]
        secrets = [steady, admin]
        for number in range(3):
            key = await asyncio.to_thread(create, lmx, f"bot-{number}", "--models", "alpha,beta", "--expires", "1h")
            secrets.append(key)
            assert await status(key) == 200
            other = await http.post(CHAT, json=chat("gamma", max_tokens=8, stream=False), headers=bearer(key))
            assert (other.status_code, other.json()["error"]["code"]) == (403, "forbidden")
            async with httpx.AsyncClient(base_url=lmx.url, timeout=60, headers=bearer(key)) as mine:
                let_in = asyncio.Event()
                running = read_stream(mine, chat("alpha", max_tokens=300, stream=True), lambda _, e=let_in: e.set())
                stream = asyncio.create_task(running)
                await asyncio.wait_for(let_in.wait(), 60)
                await asyncio.to_thread(lmx.cli, "keys", "revoke", f"bot-{number}")
                assert await status(key) == 401
                assert (await stream).done  # what ran goes on
        assert [await status(key) for key in ("", "wrong", admin)] == [401, 401, 200]
        assert [await status(key, "/admin/x") for key in ("", "wrong", steady, admin)] == [401, 403, 403, 404]
        done.set()
        assert min(await asyncio.gather(*loads)) > 0
        # What is revoked stays so, also for the next gateway and the next supervisor.
        psutil.Process(lmx.wait_status(lambda doc: True)["gateway"]["pid"]).kill()
        lmx.wait_status(lambda doc: doc["gateway"]["state"] == "ready" and doc["gateway"]["incarnation"] > 2)
        assert [await status(key) for key in (secrets[2], steady)] == [401, 200]
    listed = lmx.cli("keys", "list", "--json").stdout + lmx.cli("keys", "list").stdout
    assert "steady" in listed
    check_files(lmx, secrets, listed)
    assert lmx.stop() == 0
    check_files(lmx, secrets, lmx.tail())


def check_files(lmx: Lmx, secrets: list[str], *texts: str) -> None:
    """No file but `admin.key` holds a key, and nobody but their owner can read any."""
    for path in lmx.home.rglob("*"):
        inner = path.relative_to(lmx.home)
        if inner.parts[0] == "models" or inner.name == "terminal.txt":
            continue
        mode = path.lstat().st_mode
        assert not stat.S_ISLNK(mode) or inner.parts[:2] == ("run", "lib"), path
        if not stat.S_ISLNK(mode):
            assert stat.S_IMODE(mode) & 0o077 == 0, (path, oct(mode))
        if stat.S_ISREG(mode) and inner.name != "admin.key":
            texts = (*texts, path.read_bytes().decode("utf-8", "replace"))
    for text in (*texts, lmx.output.read_text()):
        assert not [secret[:8] for secret in secrets if secret in text]
    assert stat.S_IMODE((lmx.home / "admin.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((lmx.home / "state" / "keys").stat().st_mode) == 0o600


def test_the_admin_key_is_made_once_and_reaches_no_other_process(new_lmx: Callable[..., Lmx]) -> None:
    lmx = new_lmx().start()
    key = (lmx.home / "admin.key").read_text().strip()
    assert key.startswith("lmx-")
    assert len(key) == 47
    (file,) = (lmx.home / "run").glob("gateway.*.json")
    assert read_spec(file, GatewaySpec).admin_digest == digest_of(key.encode()).hex()
    assert httpx.get(f"{lmx.url}/admin", headers=bearer(key)).status_code == 404
    assert lmx.stop() == 0
    mine = "a-key-from-the-environment"
    lmx.start(LMX_ADMIN_KEY=mine)
    assert (lmx.home / "admin.key").read_text().strip() == key
    assert [httpx.get(f"{lmx.url}/admin", headers=bearer(each)).status_code for each in (key, mine)] == [403, 404]
    assert lmx.process is not None
    children = [process for process in lmx.processes() if process.pid != lmx.process.pid]
    assert children
    assert not [child for child in children if "LMX_ADMIN_KEY" in child.environ()]
    assert lmx.stop() == 0


def test_a_gateway_that_was_taken_over_does_not_keep_an_older_and_wider_door(new_lmx: Callable[..., Lmx]) -> None:
    lmx = new_lmx(LMX_SECURITY__PROFILE="lan").start()
    url, before = lmx.url, lmx.wait_status(lambda doc: True)["gateway"]["pid"]
    assert httpx.get(f"{url}/v1/models").status_code == 200
    lmx.kill_supervisor()
    lmx.start(LMX_GATEWAY__PORT=url.rpartition(":")[2], LMX_SECURITY__INFERENCE_KEYS="required")
    lmx.wait_event("gateway_outdated", pid=before)
    lmx.wait_status(lambda doc: doc["gateway"]["state"] == "ready" and doc["gateway"]["pid"] != before)
    for _ in deadline(20):
        # Until the old one has been told to accept nothing more, either may take a connection.
        if {httpx.get(f"{url}/v1/models").status_code for _ in range(10)} == {401}:
            break
    else:
        raise AssertionError(lmx.tail())
    assert lmx.stop() == 0


def test_the_gateway_speaks_tls(new_lmx: Callable[..., Lmx], tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make a certificate with")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    words = ["req", "-x509", "-newkey", "rsa:2048", "-days", "2", "-nodes", "-subj", "/CN=localhost"]
    words += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([openssl, *words], check=True, capture_output=True)
    lmx = new_lmx(LMX_SECURITY__TLS_CERTIFICATE=str(certificate), LMX_SECURITY__TLS_KEY=str(key)).start()
    assert lmx.url.startswith("https://")
    assert httpx.get(f"{lmx.url}/healthz", verify=ssl.create_default_context(cafile=certificate)).status_code == 200
    with socket.create_connection(("127.0.0.1", httpx.URL(lmx.url).port or 0)) as plain:
        plain.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert not plain.recv(100).startswith(b"HTTP/1.1 200")
    assert lmx.stop() == 0


async def test_the_worker_is_told_the_key_and_never_a_forged_address(tmp_path: Path) -> None:
    key = new_key()
    record = KeyRecord("k1", "bot", digest_of(key.encode()).hex(), 0.0)
    KeyFile(tmp_path / "keys").write((record,))
    security = SecurityConfig(profile="lan", trusted_proxies=("127.0.0.0/8",))
    async with stack(security=security, limits=LimitsConfig(0, 0), keys_file=str(tmp_path / "keys")) as lmx:
        worker = await lmx.start_worker()
        for headers, client in (
            (bearer(key), "key:k1"),
            ({"X-Forwarded-For": "1.1.1.1, 198.51.100.9"}, "198.51.100.9"),
            ({"X-Real-IP": "1.1.1.1"}, "127.0.0.1"),
        ):
            asking = asyncio.create_task(lmx.client.post(CHAT, json=chat_body(), headers=headers))
            assert (await worker.answer("hello")).client == client
            assert (await asking).status_code == 200


async def test_a_stream_holds_its_place_to_its_end_and_no_longer(tmp_path: Path) -> None:
    async with stack(security=SecurityConfig(profile="lan"), limits=LimitsConfig(concurrent_requests=1)) as lmx:
        worker = await lmx.start_worker()
        accepting = asyncio.create_task(worker.accept())
        async with lmx.client.stream("POST", CHAT, json=chat_body(stream=True)) as stream:
            submit = await accepting
            await worker.step(submit.rid, "begun")
            refused = await lmx.client.post(CHAT, json=chat_body())
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
            assert stream.headers["x-ratelimit-limit-requests"] == "60"
        await worker.aborted(submit.rid)
        # The client left: its place is free as soon as the gateway has seen it.
        asking = lmx.chat()
        await worker.answer("next")
        assert (await asking).status_code == 200


@pytest.mark.parametrize(("number", "status"), [(200, b"200"), (300, b"400"), (60_000, b"400")])
async def test_headers_are_counted(number: int, status: bytes) -> None:
    async with stack() as lmx:
        reader, writer = await asyncio.open_connection("127.0.0.1", lmx.gateway.port)
        writer.write(b"GET /healthz HTTP/1.1\r\nconnection: close\r\n" + b"a:\r\n" * number + b"\r\n")
        answer = b""
        with contextlib.suppress(ConnectionError):
            answer = await reader.read(12)
        writer.close()
        assert answer in {b"HTTP/1.1 " + status, b""} if number > 1000 else answer == b"HTTP/1.1 " + status
