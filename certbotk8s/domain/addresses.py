"""Where this process connects on behalf of others: to a CA that a tenant names, to what a tenant's DNS name points to.

Neither must lead it to where only the cluster itself may go. Decided after the name is resolved, for each address.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

# Link-local addresses, and where clouds serve credentials to their machines (AWS, Google, Alibaba, Azure). No public
# name points there in good faith. Loopback and private networks are where clusters, and their own CAs, live.
_NEVER = [
    (ip_network(network), why)
    for network, why in (
        ("169.254.0.0/16", "it is link-local"),
        ("fe80::/10", "it is link-local"),
        ("fd00:ec2::254/128", "it is a cloud's own"),
        ("fd20:ce::254/128", "it is a cloud's own"),
        ("100.100.100.200/32", "it is a cloud's own"),
        ("168.63.129.16/32", "it is a cloud's own"),
        ("0.0.0.0/8", "it is no address of anybody"),
        ("::/128", "it is no address of anybody"),
        ("224.0.0.0/4", "it is a multicast address"),
        ("ff00::/8", "it is a multicast address"),
    )
]


class Egress:
    """Which addresses are asked. `allowed` are networks (CIDR) that are asked whatever else is said of them.

    `cluster` are those of the cluster's Services; filled in once, before the first question. ValueError for a network
    that is none.
    """

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        self._allowed = [ip_network(text) for text in allowed]
        self.cluster: tuple[Network, ...] = ()

    def refusal(self, address: Address) -> str:
        """Why that address is never asked, as a sentence part ("it is link-local"), or ""."""
        plain = (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
        if any(plain in network for network in self._allowed):
            return ""
        if any(plain in network for network in self.cluster):
            return "it is a Service of this cluster"
        return next((why for network, why in _NEVER if plain in network), "")
