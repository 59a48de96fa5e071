"""The listening socket, wherever it comes from: a gateway hands it back, or it is opened here."""

import asyncio
import socket
from typing import Final

from protocol.config import Config
from protocol.logs import event
from supervisor import events as ev
from supervisor.host import GATEWAY, Host
from supervisor.listener import PortTakenError, listen, serves, url_of

_PORT_RETRY_S: Final = 1.0


class Front:
    """Owns the socket and sees to it that the gateway has it. One per supervisor."""

    def __init__(self, host: Host, config: Config) -> None:
        self._host = host
        self._config = config
        self._listener: socket.socket | None = None

    @property
    def url(self) -> str:
        """Where clients find the gateway; "" as long as there is no socket."""
        if self._listener is None:
            return ""
        return url_of(self._listener, tls=bool(self._config.security.tls_certificate))

    def handed_back(self, descriptor: int) -> None:
        """A gateway of an earlier supervisor returns the listening socket."""
        sock = socket.socket(fileno=descriptor)
        if self._listener is None and serves(sock, self._config.gateway):
            self._use(sock)
        else:
            sock.close()

    async def open(self, *, handed_over: bool) -> None:
        """Open the listening socket, again and again while somebody else holds the port.

        A gateway that is there already is replaced if it belongs to an image that `handed_over`, or is not what would
        be started now.
        """
        told = ""
        gateway = self._host.slots[GATEWAY]
        if self._listener is None and gateway.child is not None:
            # It listens where the configuration no longer says; the next one gets the right socket.
            self._host.feed(gateway, ev.Restart())
        while self._listener is None:
            try:
                self._use(listen(self._config.gateway))
            except PortTakenError as error:
                if told != str(error):
                    told = str(error)
                    event("port_taken", level="CRITICAL", reason=told, hint="trying again every second")
                await asyncio.sleep(_PORT_RETRY_S)
        event("listening", url=self.url, profile=self._config.security.profile)
        current = gateway.child is None or self._host.launcher.is_current(GATEWAY, gateway.slot.incarnation)
        if gateway.child is not None and (handed_over or gateway.foreign or not current):
            if not current:
                self._host.journal.write("gateway_outdated", pid=gateway.slot.pid)
            self._host.replace_gateway()
        self._host.wake()

    def close(self) -> None:
        """Close the socket in this process."""
        if self._listener is not None:
            self._listener.close()

    def _use(self, sock: socket.socket) -> None:
        self._listener = sock
        self._host.listen_fd = sock.fileno()
