"""`lmx-supervisor audit`: filters, a table, and exports that nobody's spreadsheet runs."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gateway.audit_file import AuditFile
from protocol.audit import AuditRow
from supervisor.cli import cli


@pytest.fixture
def home(tmp_path: Path) -> Path:
    now = time.time()

    def row(number: int, **fields: Any) -> AuditRow:
        known: dict[str, Any] = {
            "request_id": f"r{number}", "timestamp": now - 3600 * number, "endpoint": "/v1/chat/completions",
            "status": "success", "http_status": 200, "duration_ms": 1500.0, "client": "10.0.0.1",
        }  # fmt: skip
        return AuditRow(**{**known, **fields})

    file = AuditFile(tmp_path / "audit.db")
    file.append(
        [
            row(
                48,
                model="alpha",
                incarnation=3,
                backend_type="local",
                ttft_ms=80.4,
                prompt_tokens=9,
                completion_tokens=4,
                total_tokens=13,
            ),
            row(3, status="error", http_status=401, error_type="invalid_api_key", count=7),
            row(2, model="beta", key_id="ab12", client="key:ab12", client_id="@mailer", priority=-5),
        ]
    )
    file.close()
    return tmp_path


def audit(home: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["--home", str(home), "audit", *arguments])


def test_the_table_shows_who_asked_what_and_how_it_ended(home: Path) -> None:
    lines = audit(home).output.splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["r48", "r3", "r2"]
    assert {"alpha#3", "success", "1500", "80", "9+4"} <= set(lines[1].split())
    assert lines[2].endswith("invalid_api_key ×7")
    assert "key:ab12 (@mailer)" in lines[3]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--model", "beta"], ["r2"]),
        (["--status", "error"], ["r3"]),
        (["--key", "ab12"], ["r2"]),
        (["--client", "@mailer"], ["r2"]),
        (["--client", "10.0.0.1"], ["r3", "r48"]),
        (["--request-id", "r48"], ["r48"]),
        (["--error", "invalid_api_key"], ["r3"]),
        (["--backend", "local"], ["r48"]),
        (["--backend", "openai"], []),
        (["--since", "24h"], ["r2", "r3"]),
        (["--until", "24h"], ["r48"]),
        (["--limit", "1"], ["r2"]),
        (["--since", "2020-01-01", "--model", "none"], []),
    ],
)
def test_filters_choose_rows(home: Path, arguments: list[str], found: list[str]) -> None:
    document = json.loads(audit(home, "--json", *arguments).output)
    assert document["schema"] == "lmx.audit/1"
    assert [row["request_id"] for row in document["rows"]] == found


def test_an_export_is_whole_and_oldest_first(home: Path) -> None:
    rows = [json.loads(line) for line in audit(home, "--export", "jsonl").output.splitlines()]
    assert [row["request_id"] for row in rows] == ["r48", "r3", "r2"]
    assert rows[0]["total_tokens"] == 13
    assert rows[0]["time"].endswith("Z")


def test_no_cell_of_an_exported_table_is_a_formula(home: Path) -> None:
    table = list(csv.DictReader(audit(home, "--export", "csv").output.splitlines()))
    assert [row["request_id"] for row in table] == ["r48", "r3", "r2"]
    assert (table[2]["client_id"], table[2]["priority"], table[0]["model"]) == ("'@mailer", "-5", "alpha")


def test_what_cannot_be_shown_is_said(home: Path, tmp_path: Path) -> None:
    wrong = audit(home, "--since", "yesterday")
    assert (wrong.exit_code, "24h" in wrong.output) == (2, True)
    (home / "audit.db").write_bytes(os.urandom(4096))
    broken = audit(home)
    assert (broken.exit_code, "is it an audit file" in broken.output) == (1, True)
    missing = audit(tmp_path / "nowhere")
    assert (missing.exit_code, "there is none" in missing.output) == (1, True)


def test_a_reader_that_goes_away_is_no_error(home: Path) -> None:
    command = [sys.executable, "-m", "supervisor", "--home", str(home), "audit", "--export", "csv"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
