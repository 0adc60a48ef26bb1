"""The controller under test, as one or more replicas with loopback addresses of their own."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tests.lab.api import fetch
from tests.lab.errors import LabError, last_lines
from tests.lab.network import reserve
from tests.lab.processes import Child
from tests.lab.svcproxy import Backend

if TYPE_CHECKING:
    from tests.lab.lab import Lab

ROOT = Path(__file__).parents[2]
CRDS = ROOT / "crds"
HTTP01_PORT = 8089
METRICS_PORT = 9402

_MOST_REPLICAS = 200
_FORGOTTEN = 0.6  # seconds: three looks of the Service at its backends


class Controller:
    """One replica. A context: started at the beginning, killed at the end, restarted in between at will.

    While it exists the Service of the HTTP-01 responder forwards to it whenever its /readyz answers 200.
    """

    def __init__(
        self,
        lab: "Lab",
        *,
        command: Sequence[str] = (sys.executable, "-m", "certbotk8s"),
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`arguments` come after the lab's own, so that they win; `environment` adds to this process's."""
        self._lab = lab
        self._number, self._held = _free_replica(lab)
        self.name = f"controller-{self._number}"
        self.address = f"{lab.replica_network}{self._number}"
        self.log = Path(lab.logs) / f"{self.name}.log"
        self._command = [*command, *self._lab_arguments(), *arguments]
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("CERTBOTK8S_")},
            "KUBECONFIG": lab.controller_kubeconfig,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
            "POD_NAME": self.name,
            **(environment or {}),
        }
        self._child: Child | None = None

    def start(self) -> None:
        """Starts it. Does not wait until it is ready."""
        self._child = Child(self.name, self._command, self.log, env=self._environment)
        _registration(self._lab, self._number).touch()

    def withdraw(self) -> None:
        """Leads the Service away from it, as when its Pod is marked for deletion; until the next start.

        Returns when nothing comes any more: a request on its way to one that dies is lost with any product.
        """
        _registration(self._lab, self._number).unlink(missing_ok=True)
        time.sleep(_FORGOTTEN)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the present run."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills it, as a node that loses power does."""
        if self._child is not None:
            self._child.kill()

    def stop(self, timeout: float = 30) -> int:
        """Asks it to end (SIGTERM) and gives its exit status; subprocess.TimeoutExpired when it takes too long."""
        if self._child is None:
            raise LabError(f"{self.name} was never started. Call start first.")
        self._child.signal(signal.SIGTERM)
        return self._child.wait(timeout)

    def restart(self) -> None:
        """Kills it and starts it again, at the same address."""
        self.kill()
        self.start()

    @property
    def pid(self) -> int:
        """Process id of the present run."""
        if self._child is None:
            raise LabError(f"{self.name} was never started. Call start first.")
        return self._child.pid

    def ended(self) -> int | None:
        """Exit status of the present run (negative: the signal that ended it), or None while it runs."""
        return None if self._child is None else self._child.ended()

    def is_ready(self) -> bool:
        """Whether its /readyz answers 200."""
        try:
            fetch(f"http://{self.address}:{METRICS_PORT}/readyz", timeout=2)
        except (OSError, urllib.error.URLError):
            return False
        return True

    def wait_ready(self, timeout: float = 60) -> None:
        """Returns when it is ready. LabError when it ends before, or after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not self.is_ready():
            if self._child is not None:
                self._child.check()
            if time.monotonic() > deadline:
                raise LabError(
                    f"{self.name} is not ready after {timeout:.0f} s. Its last lines:\n{last_lines(self.log)}"
                )
            time.sleep(0.02)

    def close(self) -> None:
        """Kills it and gives its address back."""
        self.kill()
        _registration(self._lab, self._number).unlink(missing_ok=True)
        self._held.close()

    def __enter__(self) -> "Controller":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lab_arguments(self) -> list[str]:
        return [
            f"--namespace={self._lab.namespace}",
            f"--http01-listen={self.address}:{HTTP01_PORT}",
            f"--metrics-listen={self.address}:{METRICS_PORT}",
            f"--http01-port={self._lab.http_port}",
            f"--nameservers={self._lab.dns}",
        ]


def backends(registrations: Path, replica_network: str) -> list[Backend]:
    """The replicas that are registered in a lab's folder, also by other processes than the lab's own."""
    return [
        Backend(f"{replica_network}{path.name}", HTTP01_PORT, METRICS_PORT)
        for path in sorted(registrations.iterdir())
        if path.name.isdecimal()
    ]


def install_crds(lab: "Lab") -> None:
    """Applies the CRDs of this repository and waits until the API server serves them. LabError when it refuses one."""
    if not any(CRDS.glob("*.yaml")):
        raise LabError(
            f"There are no CRDs in {CRDS}: nothing for a controller to do. Start the lab without --controller."
        )
    try:
        lab.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(CRDS))
        lab.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", str(CRDS))
    except subprocess.CalledProcessError as error:
        raise LabError(f"The CRDs in {CRDS} cannot be installed: {error.stderr.strip()}") from error


def _registration(lab: "Lab", number: int) -> Path:
    return Path(lab.replicas) / str(number)


def _free_replica(lab: "Lab") -> tuple[int, socket.socket]:
    for number in range(1, _MOST_REPLICAS + 1):
        held = reserve(f"replica-{lab.replica_network}{number}")
        if held is not None:
            return number, held
    raise LabError(f"All {_MOST_REPLICAS} replica addresses of this lab are in use. Close some of its controllers.")
