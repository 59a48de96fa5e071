"""The TCP listening socket. The supervisor owns it, so a dead gateway means waiting connections, not refused ones."""

import errno
import socket

import psutil

from protocol.config import GatewayConfig


class PortTakenError(Exception):
    """The address cannot be bound; the text names who holds it, where the system tells."""


def listen(config: GatewayConfig) -> socket.socket:
    """Return a listening socket for the configured address; raise `PortTakenError` with what to do."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:  # UnicodeError: "a..b" cannot be a name at all
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        msg = f"gateway.host {config.host!r} is not an address of this machine: {why}"
        raise PortTakenError(msg) from None
    sock: socket.socket | None = None
    try:
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(config.backlog)
    except OSError as error:
        if sock is not None:
            sock.close()
        holder = _holder(config.port) if error.errno == errno.EADDRINUSE else ""
        msg = f"cannot listen on {config.host}:{config.port}: {error.strerror}{holder}"
        raise PortTakenError(msg) from None
    return sock


def serves(sock: socket.socket, config: GatewayConfig) -> bool:
    """Return whether a listening socket is the configured one; port 0 is any."""
    host, port = sock.getsockname()[:2]
    try:
        wanted = {info[4][0] for info in socket.getaddrinfo(config.host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return False
    return host in wanted and config.port in {0, port}


def url_of(sock: socket.socket, *, tls: bool = False) -> str:
    """Return the URL clients on this machine use."""
    host, port = sock.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    scheme = "https" if tls else "http"
    return f"{scheme}://[{shown}]:{port}" if ":" in shown else f"{scheme}://{shown}:{port}"


def _holder(port: int) -> str:
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid:
                return f" (held by pid {connection.pid}, {psutil.Process(connection.pid).name()})"
    except psutil.Error:
        return ""  # macOS tells only root
    return ""
