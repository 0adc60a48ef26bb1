"""The command line itself: help, errors and exit statuses, without a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import certbotk8s
from certbotk8s.certctl import main as command_line
from certbotk8s.certctl.main import main

ENTRY = "import sys; from certbotk8s.certctl.main import main; sys.exit(main())"


@pytest.mark.parametrize("arguments", [(), ("--help",), ("status", "-h"), ("renew", "--help"), ("version", "--help")])
def test_help_has_an_example(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Every help text ends with status 0 and shows an example. Fails when certctl alone counts as an error."""
    assert main(arguments) == 0
    assert "certctl" in capsys.readouterr().out.partition("Example")[2]


@pytest.mark.parametrize("arguments", [("version",), ("--version",)])
def test_version(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Both ways to ask for the version answer the same. Fails when the two texts differ."""
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"certctl {certbotk8s.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("stauts",), "certctl: no such command 'stauts'"),
        (("status", "--al"), "certctl: no such option '--al'"),
        (("status", "-o", "yaml"), "certctl: invalid value for '-o' / '--output': 'yaml' is not one of"),
        (("status", "-A", "web"), "certctl: a NAME excludes --all-namespaces and --selector"),
        (("renew",), "certctl: missing argument 'NAME...'"),
        (("renew", "web", "--timeout", "soon"), "certctl: invalid value for '--timeout': 'soon' is no duration"),
        (("status", "--kubeconfig", "/no/such/file"), "certctl: there is no way to the API server: "),
    ],
)
def test_errors_are_one_sentence_and_a_hint(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every mistake ends with status 1, a lower-case sentence and a hint on standard error.

    Fails when click's own status 2 for usage errors comes through.
    """
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert out == ""
    assert first.startswith(message)
    assert second.startswith("hint: ")


@pytest.mark.parametrize("text", ["no: [yaml", "[]", "contexts: 7", "current-context: {}"])
def test_a_broken_kubeconfig_is_a_sentence(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the kubeconfig holds, the user is told that it is the kubeconfig.

    Fails when only the exceptions that the library documents are caught.
    """
    path = tmp_path / "config"
    path.write_text(text)
    assert main(["status", "--kubeconfig", str(path)]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(("certctl: the kubeconfig cannot be read", "certctl: there is no way to the API server"))
    assert "--kubeconfig" in second


def test_a_defect_is_a_sentence_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A bug shows the user where it is, and no traceback. Fails when Exception is not caught."""

    def broken(**_: str) -> None:
        raise KeyError("oops\x1b[2J")

    monkeypatch.setattr(command_line, "_connection", broken)
    assert main(["status"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"certctl: a defect in certctl {certbotk8s.__version__} at test_certctl_main.py:")
    assert "Traceback" not in err
    assert "\x1b" not in err


def test_help_and_version_import_nothing_heavy() -> None:
    """--help and version work without the Kubernetes client and without msgspec's Structs being built.

    Fails when main.py imports certbotk8s.certctl.reader at its top.
    """
    heavy = "{'kubernetes', 'urllib3', 'msgspec', 'cryptography'}"
    code = f"import sys; from certbotk8s.certctl.main import main; main(['version']); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1:] == ["set()"]


def test_a_closed_pipe_is_no_complaint() -> None:
    """`certctl --help | head -0` is quiet. Fails when BrokenPipeError is not caught."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", ENTRY, "--help"], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_ctrl_c_is_quiet(tmp_path: Path) -> None:
    """Ctrl-C ends with status 130 and no word. Fails when KeyboardInterrupt reaches the interpreter."""
    fifo = tmp_path / "kubeconfig"
    os.mkfifo(fifo)
    process = subprocess.Popen(
        [sys.executable, "-c", ENTRY, "status", "--kubeconfig", str(fifo)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    # Whoever opens this end waits for the other: certctl is inside its command then.
    with fifo.open("w"):
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"")
