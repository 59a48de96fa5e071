"""One slot with the process, the connection and the reports that belong to it."""

from dataclasses import dataclass, field

from protocol import control
from protocol.channel import Channel, ChannelClosedError
from protocol.messages import Message, encode
from supervisor.account import Account
from supervisor.blackbox import BlackBox
from supervisor.children import Child
from supervisor.reclaim import Owed
from supervisor.slot import Settings, Slot


@dataclass(eq=False)
class Managed:
    """`model` is empty for the gateway."""

    name: str
    settings: Settings
    model: str = ""
    path: str = ""
    created_at: float = 0.0
    slot: Slot = field(default_factory=Slot)
    child: Child | None = None
    channel: Channel | None = None
    endpoint: str = ""
    capabilities: control.Capabilities | None = None
    heartbeat: control.Heartbeat | None = None
    memory_bytes: int | None = None
    last_words: str = ""
    #: The class of its end, if we end it for what others saw of it.
    verdict: str = ""
    box: BlackBox | None = None
    #: The process speaks another protocol version: it can only be replaced.
    foreign: bool = False
    #: Memory that has to be free before the next process; and, once that takes too long, the words for it.
    owed: Owed | None = None
    blocked: str = ""
    account: Account = field(default_factory=Account)

    def tell(self, message: Message) -> bool:
        """Send the process a message; return whether there was a connection."""
        if self.channel is None:
            return False
        try:
            self.channel.send(encode(message))
        except ChannelClosedError:
            return False
        return True
