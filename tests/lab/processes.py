"""Child processes of the lab: each with a log file and a process group of its own, none outliving the lab."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.lab.errors import LabError, last_lines

_TETHER = Path(__file__).with_name("tether.py")
# Of this process's environment, for the parts. They are told everything by flags: $KUBECONFIG would lead Traefik to
# another cluster than its flags name, $ETCD_... change etcd.
_INHERITED = ("PATH", "HOME", "TMPDIR")


def tethered(command: Sequence[str | Path]) -> list[str]:
    """The command line that runs `command` tied to this process (see `tether.py`).

    The tie is to the calling *thread*: the kernel kills the child when the thread that started it ends.
    """
    return [sys.executable, "-I", "-S", str(_TETHER), str(os.getpid()), *map(str, command)]


class Child:
    """One running part of the lab."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        """Starts `command`; its output is appended to `log`. `env` replaces the environment, as in subprocess."""
        self.name = name
        self.log = log
        self._command, self._env, self._cwd = command, env, cwd
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as output:
            return subprocess.Popen(
                tethered(self._command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._env,
                cwd=self._cwd,
                start_new_session=True,  # Ctrl-C on the terminal is for the lab, which ends its parts in order
            )

    def restart(self) -> None:
        """Kills it and starts it again by the same command."""
        self.kill()
        self._process = self._start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ended(self) -> int | None:
        """Its exit status (negative: the signal that ended it), or None while it runs."""
        return self._process.poll()

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to its whole process group; does nothing when it has ended."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def kill(self) -> None:
        """Kills it and waits for its end. A lab keeps nothing, and a graceful API server takes over 20 s."""
        self.signal(signal.SIGKILL)
        self._process.wait()

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, waited for at most `timeout` seconds (then subprocess.TimeoutExpired)."""
        return self._process.wait(timeout)

    def wait_listening(self, host: str, port: int, timeout: float = 60) -> None:
        """Returns when it accepts TCP connections. LabError when it ends before, or after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not listening(host, port):
            self.check()
            if time.monotonic() > deadline:
                raise LabError(
                    f"{self.name} does not listen on {host}:{port} after {timeout:.0f} s. Its last lines:\n"
                    f"{last_lines(self.log)}Whole log: {self.log}"
                )
            time.sleep(0.02)

    def check(self) -> None:
        """LabError with its last words when it has ended."""
        status = self.ended()
        if status is not None:
            raise LabError(
                f"{self.name} ended with status {status}. Its last lines:\n{last_lines(self.log)}Whole log: {self.log}"
            )


class Children:
    """The parts of one lab, in the order of their start. A context: at its end all are killed, the last first."""

    def __init__(self, logs: Path) -> None:
        """`logs` is the folder of their log files."""
        self._logs = logs
        self._children: list[Child] = []

    def start(self, name: str, command: Sequence[str | Path]) -> Child:
        """Starts one more part, with its log in `<logs>/<name>.log`; this process's environment is not for it."""
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        child = Child(name, command, self._logs / f"{name}.log", env=environment)
        self.add(child)
        return child

    def add(self, child: Child) -> None:
        """Counts a child that was started elsewhere among the parts."""
        self._children.append(child)

    def __getitem__(self, name: str) -> Child:
        """The part of that name; KeyError when there is none."""
        return {child.name: child for child in self._children}[name]

    def pids(self) -> dict[str, int]:
        """Process id of each part by name."""
        return {child.name: child.pid for child in self._children}

    def check(self) -> None:
        """LabError when one of them has ended."""
        for child in self._children:
            child.check()

    def __enter__(self) -> "Children":
        return self

    def __exit__(self, *_: object) -> None:
        for child in reversed(self._children):
            child.kill()


def listening(host: str, port: int) -> bool:
    """Whether something accepts TCP connections there."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0
