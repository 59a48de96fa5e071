"""Which address a request comes from: the connection's, or what trusted proxies say. Pure."""

import ipaddress
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from starlette.types import Scope

from protocol.profiles import Address, Network

_FORWARDED: Final = b"x-forwarded-for"
#: Hops that are looked at; nobody has a longer chain of proxies of their own.
_MAX_HOPS: Final = 32
#: An IPv6 network of this size is one customer, who may change addresses within it at will.
_CUSTOMER_BITS: Final = 64
#: An entry is an address with brackets, port and zone at most.
_MAX_ENTRY: Final = 80
#: A connection that has no address: a unix socket.
UNKNOWN: Final = "unknown"


def client_address(scope: Scope, proxies: Sequence[Network]) -> Address | None:
    """Return the address of the client; None if the connection has none.

    `X-Forwarded-For` counts only as far as trusted proxies wrote it: walked from the right, where the nearest proxy
    writes, up to the first hop that is no proxy of ours. What stands left of that is the client's own word. An entry
    that is no address ends the walk too: then it is the proxy that is called the client, never a made-up one.
    """
    peer = peer_address(scope)
    if peer is None or not proxies or not within(peer, proxies):
        return peer
    lines = [value for name, value in scope["headers"] if name == _FORWARDED]
    hops = b",".join(lines).rsplit(b",", _MAX_HOPS)
    client = peer
    for entry in reversed(hops[-_MAX_HOPS:]):
        hop = parse_hop(entry)
        if hop is None:
            break
        client = hop
        if not within(hop, proxies):
            break
    return client


def peer_address(scope: Scope) -> Address | None:
    """Return the address at the other end of the connection."""
    peer = scope.get("client")
    return None if not peer else parse_hop(peer[0].encode("ascii", "replace"))


@lru_cache(maxsize=4096)
def parse_hop(entry: bytes) -> Address | None:
    """Return the address in `1.2.3.4`, `1.2.3.4:80`, `2001:db8::1`, `[2001:db8::1]:80` or with a zone; else None."""
    if len(entry) > _MAX_ENTRY or not entry.isascii():
        return None
    text = entry.decode("ascii").strip(" \t")
    if text.startswith("["):
        text, bracket, port = text[1:].partition("]")
        if not bracket or (port and not (port[0] == ":" and _is_port(port[1:]))):
            return None
        if ":" not in text:
            return None
    elif text.count(":") == 1:
        text, _, port = text.partition(":")
        if not _is_port(port):
            return None
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    # The same machine, whichever way it is written.
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def within(address: Address, networks: Sequence[Network]) -> bool:
    """Return whether the address is in one of the networks."""
    return any(address.version == network.version and address in network for network in networks)


@lru_cache(maxsize=4096)
def client_name(address: Address | None) -> str:
    """Return whom limits count: the address, for IPv6 the network that one customer has."""
    if address is None:
        return UNKNOWN
    if isinstance(address, ipaddress.IPv6Address) and not address.is_loopback:
        return str(ipaddress.ip_network((int(address), _CUSTOMER_BITS), strict=False))
    return str(address)


def _is_port(text: str) -> bool:
    return text.isdigit() and len(text) <= 5
