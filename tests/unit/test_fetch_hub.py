"""Fetching a repository of the Hugging Face hub, from a hub of our own and from none."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from protocol.modelfolder import inspect_model_folder
from tests.modelkit import REPOSITORY, make_tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "some-org/tiny"


class FakeHub(http.server.ThreadingHTTPServer):
    """Speaks as much of the hub's HTTP as its client asks for, over the files of one folder."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.served: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        name = path.rpartition("/")[2]
        if path.startswith(f"/api/models/{REPO}/tree/"):
            listing = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.server.files.items()
            ]
            self.answer(200, json.dumps(listing).encode())
        elif path.startswith(f"/api/models/{REPO}"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.server.files.items()]
            self.answer(200, json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith(f"/{REPO}/resolve/{COMMIT}/") and name in self.server.files:
            if self.command == "GET":
                self.server.served.append(name)
            self.answer(200, self.server.files[name])
        else:
            self.answer(404, b"{}", error="RepoNotFound")

    def answer(self, status: int, body: bytes, error: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    folder = make_tiny_model(tmp_path / "repo", layers=1)
    (folder / "modeling.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    server = FakeHub(folder)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(name: str, models: Path, endpoint: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", "worker.tools", "fetch", name, "--models-dir", str(models)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=REPOSITORY,
        env=inherited | {"HF_ENDPOINT": endpoint, "HF_HOME": str(models / "hf"), **environment},
    )


def test_a_repository_is_fetched_without_its_code_and_pickles(hub: FakeHub, tmp_path: Path) -> None:
    done = fetch(REPO, tmp_path / "models", hub.url)
    folder = tmp_path / "models" / "some-org--tiny"

    assert (done.returncode, done.stdout) == (0, f"{folder}\n"), done.stderr
    assert inspect_model_folder(folder).model_type == "llama"
    assert {path.name for path in folder.iterdir()} == set(hub.files) - {"modeling.py", "pytorch_model.bin"}
    assert not {"modeling.py", "pytorch_model.bin"} & set(hub.served)
    assert "download: 100 %" in done.stderr

    served = len(hub.served)
    assert fetch(REPO, tmp_path / "models", hub.url).returncode == 0
    assert len(hub.served) == served


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.safetensors": None}, "has no safetensors weights"),
        ({"config.json": b'{"model_type": "x", "model_file": "m.py"}'}, "remote code refused"),
        ({"tokenizer.json": None}, "no tokenizer"),
    ],
)
def test_what_could_not_be_served_is_not_kept(
    change: dict[str, bytes | None], words: str, hub: FakeHub, tmp_path: Path
) -> None:
    hub.files = {name: data for name, data in (hub.files | change).items() if data is not None}
    done = fetch(REPO, tmp_path / "models", hub.url)
    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr.splitlines()[-1]
    assert [path.name for path in (tmp_path / "models").iterdir() if path.name != "hf"] == []


def test_an_unknown_repository(hub: FakeHub, tmp_path: Path) -> None:
    done = fetch("some-org/other", tmp_path / "models", hub.url)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: the hub has no repository some-org/other")


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    done = fetch(REPO, tmp_path / "models", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the hub cannot be reached at http://127.0.0.1:9 (")
    assert done.stderr.count("\n") == 1
    assert list((tmp_path / "models").iterdir()) == []


def test_a_hub_that_is_switched_off(tmp_path: Path) -> None:
    done = fetch(REPO, tmp_path / "models", "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: HF_HUB_OFFLINE is set, so nothing is fetched from the hub\n"
