"""The listening socket and the lock of a home: what cannot be had is told in words, and who has it (design 2, 4)."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from protocol.config import GatewayConfig
from supervisor.listener import PortTakenError, listen, serves, url_of
from supervisor.lock import AlreadyRunningError, HomeLock


def config(host: str = "127.0.0.1", port: int = 0) -> GatewayConfig:
    return GatewayConfig(host=host, port=port)


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def test_clients_connect_before_any_gateway_accepts() -> None:
    with listen(config()) as sock:
        url = url_of(sock)
        assert url == f"http://127.0.0.1:{sock.getsockname()[1]}"
        with socket.create_connection(sock.getsockname()):
            pass


def test_a_taken_port_is_named_with_who_holds_it() -> None:
    with listen(config()) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(PortTakenError, match=f"cannot listen on 127.0.0.1:{port}: ") as caught:
            listen(config(port=port))
        if sys.platform == "linux":
            assert f"held by pid {os.getpid()}" in str(caught.value)


def test_a_port_is_free_again_at_once() -> None:
    with listen(config()) as sock:
        port = sock.getsockname()[1]
        client = socket.create_connection(sock.getsockname())
        server, _ = sock.accept()
        server.close()
        client.close()
    with listen(config(port=port)) as again:
        assert again.getsockname()[1] == port


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "x" * 100, "256.1.1.1", "h\u00f6st\udc80"])
def test_a_host_that_is_none_is_told_in_words(host: str) -> None:
    with pytest.raises(PortTakenError) as caught:
        listen(config(host))
    assert "gateway.host" in str(caught.value)
    assert "None" not in str(caught.value)
    with listen(config()) as sock:
        assert not serves(sock, config(host))


def test_an_address_of_another_machine_is_told_in_words() -> None:
    with pytest.raises(PortTakenError, match=r"cannot listen on 192\.0\.2\.1:0: ") as caught:
        listen(config("192.0.2.1"))
    assert "held by" not in str(caught.value)


def test_a_system_without_ipv6_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_family(*_: object, **__: object) -> socket.socket:
        raise OSError(97, "Address family not supported by protocol")

    monkeypatch.setattr(socket, "socket", no_family)
    with pytest.raises(PortTakenError, match="Address family not supported"):
        listen(config("::1"))


def test_a_socket_handed_back_is_used_only_where_the_configuration_says() -> None:
    with listen(config()) as sock:
        port = sock.getsockname()[1]
        assert serves(sock, config(port=0))
        assert serves(sock, config(port=port))
        assert serves(sock, config("localhost", port))
        assert not serves(sock, config(port=port + 1 if port < 65535 else 1))
        assert not serves(sock, config("0.0.0.0", port))


def test_the_url_is_one_that_works_on_this_machine() -> None:
    with listen(config("0.0.0.0")) as sock:
        assert url_of(sock).startswith("http://127.0.0.1:")


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
@pytest.mark.parametrize("host", ["::", "::1"])
def test_an_ipv6_url_has_brackets(host: str) -> None:
    with listen(config(host)) as sock:
        assert url_of(sock).startswith("http://[::1]:")


# -- the lock -------------------------------------------------------------------------------------------------------


@pytest.fixture
def lock_file(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "supervisor.lock"


def test_a_second_supervisor_is_told_the_pid_of_the_first(lock_file: Path, tmp_path: Path) -> None:
    lock = HomeLock(lock_file)
    with pytest.raises(AlreadyRunningError, match=rf"\(pid {os.getpid()}\) already runs on {tmp_path}"):
        HomeLock(lock_file)
    lock.release()
    HomeLock(lock_file).release()
    assert lock_file.stat().st_mode & 0o777 == 0o600


def test_a_holder_that_is_killed_holds_nothing(lock_file: Path) -> None:
    program = "import sys, time; from pathlib import Path; from supervisor.lock import HomeLock\n"
    program += "lock = HomeLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program, str(lock_file)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(AlreadyRunningError, match=str(holder.pid)):
            HomeLock(lock_file)
        holder.kill()
        holder.wait()
    HomeLock(lock_file).release()


def test_children_do_not_inherit_the_lock(lock_file: Path) -> None:
    lock = HomeLock(lock_file)
    program = "print('there', flush=True); input()"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"there\n"
        lock.release()
        HomeLock(lock_file).release()
        child.communicate(b"\n")


def test_a_full_disk_does_not_keep_a_supervisor_from_starting(lock_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    lock = HomeLock(lock_file)
    with pytest.raises(AlreadyRunningError, match="pid unknown"):
        HomeLock(lock_file)
    lock.release()


def test_a_link_in_the_place_of_the_lock_is_refused(lock_file: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    lock_file.symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=r"symbolic links|Too many levels"):
        HomeLock(lock_file)
    assert (tmp_path / "precious").read_text() == "data"
