"""The lab's command line. Messages go to stderr, what a script wants (the path of lab.json) to stdout."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import click

from tests.lab.build import binaries
from tests.lab.controller import Controller, install_crds
from tests.lab.errors import LabError
from tests.lab.lab import RunningLab, running_lab
from tests.lab.processes import tethered
from tests.lab.progress import duration, show

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds before a controller that ended is started again
_STEADY = 30.0  # seconds after which a controller that ends has not failed at its start


@click.group()
def main() -> None:
    """A real control plane on one machine, without a container engine."""


@main.command()
def build() -> None:
    """Build the programs that the lab needs, and start nothing."""
    with _told():
        found = binaries()
        show("built: " + ", ".join(f"{name} {binary.version}" for name, binary in found.items()))


@main.command()
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Folder for lab.json, logs and data; it stays.")
@click.option("--controller", is_flag=True, help="Also install the CRDs and run the controller.")
@click.option("--replicas", type=click.IntRange(1, 9), default=1, show_default=True, help="Of the controller.")
def up(folder: Path | None, controller: bool, replicas: int) -> None:
    """Start everything and stay until Ctrl-C; prints the path of lab.json."""
    with _told(0), running_lab(folder) as running, _replicas(running, replicas if controller else 0) as supervisor:
        show(f"look around: export KUBECONFIG={running.lab.kubeconfig} PATH={running.lab.bin}:$PATH; Ctrl-C ends it")
        print(running.path, flush=True)
        while True:
            supervisor.look()
            time.sleep(0.1)


@main.command(context_settings={"ignore_unknown_options": True})
@click.option("--controller", is_flag=True, help="Also install the CRDs and run the controller.")
@click.option("--replicas", type=click.IntRange(1, 9), default=1, show_default=True, help="Of the controller.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(controller: bool, replicas: int, command: tuple[str, ...]) -> None:
    """Start everything, run COMMAND in it, and end with its exit status."""
    with _told(), running_lab() as running, _replicas(running, replicas if controller else 0) as supervisor:
        environment = {**running.lab.environment(), "CERTBOTK8S_LAB": str(running.path)}
        status = _run_command(command, environment, supervisor)
    sys.exit(status)


def _run_command(command: Sequence[str], environment: dict[str, str], supervisor: "_Supervisor") -> int:
    """The exit status of the command, 128 + n when signal n ended it.

    Ctrl-C is for the command, which has the terminal; the lab ends after it.
    """
    process = subprocess.Popen(tethered(command), env=environment)
    former = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        while (status := process.poll()) is None:
            supervisor.look()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
    finally:
        if process.poll() is None:  # we were told to end, or a part of the lab has ended
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
        signal.signal(signal.SIGINT, former)
    return status if status >= 0 else 128 - status


class _Supervisor:
    """Sees to it that the lab is whole, and starts a controller again that has ended."""

    def __init__(self, running: RunningLab, replicas: Sequence[Controller]) -> None:
        self._running = running
        self._replicas = replicas
        self._pauses = dict.fromkeys(replicas, _FIRST_PAUSE)
        self._started = dict.fromkeys(replicas, time.monotonic())
        self._due: dict[Controller, float] = {}
        self._note_pids()

    def look(self) -> None:
        """Call it often. LabError when a part other than a controller has ended."""
        self._running.children.check()
        for replica in self._replicas:
            status = replica.ended()
            now = time.monotonic()
            if status is None:
                continue
            if replica not in self._due:
                if now - self._started[replica] > _STEADY:
                    self._pauses[replica] = _FIRST_PAUSE
                pause = self._pauses[replica]
                self._pauses[replica] = min(2 * pause, _LONGEST_PAUSE)
                self._due[replica] = now + pause
                show(f"{replica.name} {_ending(status)}; starts again in {duration(pause)} (log: {replica.log})")
            elif now >= self._due[replica]:
                del self._due[replica]
                self._started[replica] = now
                replica.start()
                self._note_pids()

    def _note_pids(self) -> None:
        if self._replicas:
            self._running.lab.pids.update({replica.name: replica.pid for replica in self._replicas})
            self._running.save()


@contextlib.contextmanager
def _replicas(running: RunningLab, count: int) -> Iterator[_Supervisor]:
    """Installs the CRDs and starts `count` controllers, if any."""
    if count:
        install_crds(running.lab)
    with contextlib.ExitStack() as stack:
        yield _Supervisor(running, [stack.enter_context(Controller(running.lab)) for _ in range(count)])


@contextlib.contextmanager
def _told(status: int | None = None) -> Iterator[None]:
    """Ends in order on SIGINT, SIGTERM and SIGHUP, with `status` or else 128 + n, and says an error as a sentence."""

    def end(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number if status is None else status)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    try:
        yield
    except LabError as error:
        show(str(error))
        sys.exit(1)


def _ending(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


if __name__ == "__main__":
    main(prog_name="python -m tests.lab")
