"""Addresses and ports that no other lab on this machine uses.

Reservations are names of abstract UNIX sockets: exactly the processes that share the loopback device share them,
whatever their user or cache folder, and the kernel drops them when their holder dies.
"""

import random
import socket
from collections.abc import Iterable

from tests.lab.errors import LabError

NETWORKS = range(96, 127)
# Below the range from which kernels take ports for outgoing connections: none of those takes one of ours between its
# choice and its use.
_PORTS = range(20000, 30000)


class Network:
    """127.N.0.0/16, held until `close` or the end of the process."""

    def __init__(self, numbers: Iterable[int] = NETWORKS) -> None:
        """Takes the first free number. LabError when none is free."""
        for number in numbers:
            held = reserve(f"network-{number}")
            if held is not None:
                self._held = held
                self.number = number
                return
        raise LabError(
            "Every address range of the lab (127.96.0.0 to 127.126.255.255) is in use. End a lab that still runs."
        )

    @property
    def service_cidr(self) -> str:
        """The lower half, for ClusterIPs."""
        return f"127.{self.number}.0.0/17"

    @property
    def service_ip(self) -> str:
        """ClusterIP of the HTTP-01 responder's Service."""
        return f"127.{self.number}.7.7"

    @property
    def replicas(self) -> str:
        """Prefix of the addresses of controller replicas; complete with 1, 2, ..."""
        return f"127.{self.number}.128."

    def close(self) -> None:
        """Gives the number back."""
        self._held.close()

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Ports:
    """Free ports of 127.0.0.1, each held against other labs until `close` or the end of the process."""

    def __init__(self) -> None:
        """Starts without any."""
        self._held: list[socket.socket] = []

    def take(self) -> int:
        """A port free for TCP and UDP. LabError when there is none."""
        for port in random.sample(_PORTS, 200):
            held = reserve(f"port-{port}")
            if held is None:
                continue
            if _is_free(port):
                self._held.append(held)
                return port
            held.close()
        raise LabError(f"No free port on 127.0.0.1 between {_PORTS.start} and {_PORTS.stop - 1} in 200 tries.")

    def close(self) -> None:
        """Gives them back."""
        for held in self._held:
            held.close()

    def __enter__(self) -> "Ports":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def reserve(name: str) -> socket.socket | None:
    """Holds `name` against all other processes of this network namespace until the socket is closed; None if held."""
    held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        held.bind(f"\0certbotk8s-lab-{name}")
    except OSError:
        held.close()
        return None
    return held


def _is_free(port: int) -> bool:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET, kind) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                return False
    return True
