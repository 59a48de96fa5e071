"""Promises that the repository keeps about itself."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.chaos.mutate import MUTATIONS, Mutation

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("protocol", "gateway", "worker", "supervisor")
#: Of the extras, imported only where they are asked for.
OPTIONAL = {"opentelemetry"}
MLX = {"mlx", "mlx_lm"}
HTTP = {"http", "starlette", "uvicorn", "httpx", "aiohttp", "requests"}


@cache
def tracked() -> tuple[Path, ...]:
    """What is in git or about to be: rules should fail before the commit, not after it."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listing.stdout.split("\0") if name]
    return tuple(REPOSITORY / name for name in names if (REPOSITORY / name).is_file())


def python_files(*folders: str) -> list[Path]:
    return [path for path in tracked() if path.suffix == ".py" and path.relative_to(REPOSITORY).parts[0] in folders]


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """`(where, top-level module)` of every import in a file, at whatever depth it stands."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [path.relative_to(REPOSITORY).parts[0] if node.level else node.module or ""]
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in {"import_module", "importlib.import_module", "__import__"}
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            names = [str(node.args[0].value)]
        else:
            continue
        for name in names:
            yield f"{path.relative_to(REPOSITORY)}:{node.lineno}", name.partition(".")[0]


def offenders(files: list[Path], forbidden: set[str]) -> list[str]:
    return [f"{where} imports {name}" for path in files for where, name in imports(path) if name in forbidden]


@pytest.mark.parametrize("name", ["pyproject.toml", *PACKAGES, "tests", "deploy", "bench", "docs"])
def test_the_layout_of_the_design_is_there(name: str) -> None:
    assert [path for path in tracked() if path.relative_to(REPOSITORY).parts[0] == name]


@pytest.mark.parametrize("package", ["gateway", "worker", "supervisor"])
def test_processes_import_the_protocol_and_never_each_other(package: str) -> None:
    others = {"gateway", "worker", "supervisor"} - {package}
    assert offenders(python_files(package), others | {"tests", "bench"}) == []


def test_the_protocol_imports_no_process() -> None:
    assert offenders(python_files("protocol"), {"gateway", "worker", "supervisor", "tests", "bench"}) == []


def test_only_the_worker_imports_mlx() -> None:
    assert offenders(python_files("protocol", "gateway", "supervisor"), MLX) == []


def test_only_the_data_plane_links_import_zeromq() -> None:
    links = {REPOSITORY / "gateway/link.py", REPOSITORY / "worker/link.py"}
    assert offenders([path for path in python_files(*PACKAGES) if path not in links], {"zmq"}) == []


def test_the_supervisor_speaks_no_http() -> None:
    assert offenders(python_files("supervisor"), HTTP) == []


def test_nothing_uses_multiprocessing_or_pickle() -> None:
    files = python_files(*PACKAGES, "tests", "bench", "scripts", "deploy")
    assert offenders(files, {"multiprocessing", "pickle", "cPickle", "cloudpickle", "dill"}) == []


def test_nothing_uses_base_http_middleware() -> None:
    """It hides disconnects and buffers streams."""
    name = "BaseHTTPMiddleware"
    found = [
        f"{path.relative_to(REPOSITORY)}:{node.lineno}"
        for path in python_files(*PACKAGES)
        for node in ast.walk(ast.parse(path.read_bytes()))
        if (isinstance(node, ast.Name) and node.id == name)
        or (isinstance(node, ast.Attribute) and node.attr == name)
        or (isinstance(node, ast.alias) and node.name == name)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("gateway", MLX | OPTIONAL | {"transformers", "tokenizers", "worker", "supervisor", "prometheus_client"}),
        ("supervisor", MLX | OPTIONAL | {"transformers", "zmq", "starlette", "uvicorn", "worker", "gateway"}),
        ("protocol", MLX | OPTIONAL | {"transformers", "zmq", "starlette", "uvicorn"}),
    ],
)
def test_importing_a_whole_package_pulls_in_nothing_it_must_not_have(package: str, forbidden: set[str]) -> None:
    """Also through others: what a process never loads cannot crash it or slow its start."""
    program = f"""
import importlib, pkgutil, sys
import {package}
for module in pkgutil.walk_packages({package}.__path__, "{package}."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(*sorted({forbidden!r} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_no_file_names_a_package_registry_or_a_path_of_this_machine() -> None:
    # In pieces, so that this file passes too.
    hosts = ["pypi" + ".org", "python" + "hosted.org", "registry." + "npmjs", "conda" + ".anaconda.org"]
    paths = ["work/", "root/", "opt/pypi", "opt/wheels"]
    pattern = re.compile("|".join([*map(re.escape, hosts), rf"(?<![\w.\-/}}~])/(?:{'|'.join(paths)})"]).encode())
    found = [
        f"{path.relative_to(REPOSITORY)}: {match.group().decode()}"
        for path in tracked()
        for match in pattern.finditer(path.read_bytes())
    ]
    assert found == []


def requirement_name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    return match.group().lower()


def project() -> dict[str, list[str]]:
    table = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {"runtime": table["dependencies"], "dev": table["optional-dependencies"]["dev"]}


def test_every_runtime_dependency_has_its_reason_in_the_decisions() -> None:
    decisions = (REPOSITORY / "docs/decisions.md").read_text(encoding="utf-8").lower()
    names = sorted({requirement_name(requirement) for requirement in project()["runtime"]})
    missing = [name for name in names if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", decisions)]
    assert missing == []


def locked(name: str) -> dict[str, set[str]]:
    """Requirement names of a lock file with their versions; every one must carry hashes."""
    versions: dict[str, set[str]] = {}
    for block in re.split(r"\n(?=[A-Za-z])", (REPOSITORY / name).read_text(encoding="utf-8")):
        match = re.match(r"([A-Za-z0-9._-]+)==(\S+)", block)
        if match is not None:
            assert "--hash=sha256:" in block, f"{match.group()} has no hash"
            versions.setdefault(match.group(1).lower(), set()).add(match.group(2))
    return versions


def test_the_locks_hold_every_dependency_and_agree_with_each_other() -> None:
    runtime, dev = locked("requirements.lock"), locked("requirements-dev.lock")
    assert {requirement_name(requirement) for requirement in project()["runtime"]} <= runtime.keys()
    assert {requirement_name(requirement) for requirement in project()["dev"]} <= dev.keys()
    assert {name: dev.get(name) for name in runtime} == runtime


def test_the_locks_serve_macs_and_linux() -> None:
    lock = (REPOSITORY / "requirements.lock").read_text(encoding="utf-8")
    assert re.search(r"^mlx-metal==\S+ ; sys_platform == 'darwin'", lock, re.MULTILINE)
    for name in ("mlx-cpu", "cmeel-openblas", "cmeel"):
        assert re.search(rf"^{name}==\S+ ; sys_platform == 'linux'", lock, re.MULTILINE)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_each_mutation_of_the_failure_matrix_still_finds_its_place(mutation: Mutation) -> None:
    assert (REPOSITORY / mutation.file).read_text().count(mutation.old) == 1
    file, test = mutation.test.split("::")
    assert f"def {test.partition('[')[0]}(" in (REPOSITORY / "tests" / "chaos" / file).read_text()
