"""certctl against the real API server; the objects' status is written here, no controller runs."""

from __future__ import annotations

import contextlib
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from certbotk8s.certctl.main import main
from certbotk8s.domain import api
from tests.lab.controller import install_crds
from tests.lab.lab import Lab

BIN = Path(sys.executable).parent
FAR, NEAR = "2099-01-19T12:00:00Z", "2098-12-20T12:00:00Z"
RENEW_NOW = api.ANNOTATION_RENEW_NOW

Status = dict[str, Any]


class Answer(NamedTuple):
    """How a command ended, and what it said."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="module", autouse=True)
def _crds(lab: Lab) -> None:
    install_crds(lab)


@pytest.fixture
def certctl(lab: Lab, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Runs certctl as the lab's admin, unless a kubeconfig is named."""

    def run(*arguments: str, kubeconfig: str | Path = lab.kubeconfig) -> Answer:
        capsys.readouterr()
        status = main([*arguments, "--kubeconfig", str(kubeconfig)])
        return Answer(status, *capsys.readouterr())

    return run


def condition(kind: str, status: str, reason: str, message: str) -> Status:
    since = "2026-11-21T12:00:00Z"
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": since}


def ready(**more: Any) -> Status:
    """The status of a Certificate that is in order."""
    conditions = [
        condition("Ready", "True", "Ready", "Valid until 2099-01-19 12:00 UTC"),
        condition("Issuing", "False", "Issued", "Written"),
    ]
    return {"conditions": conditions, "notBefore": "2026-11-21T12:00:00Z", "notAfter": FAR, "renewalTime": NEAR, **more}


def failed(message: str = "The CA got 404 from 192.0.2.7.", **more: Any) -> Status:
    """The status of a Certificate that was never issued."""
    conditions = [
        condition("Ready", "False", "ChallengeFailed", message),
        condition("Issuing", "False", "ChallengeFailed", message),
    ]
    return {"conditions": conditions, "failedAttempts": 1, "lastFailureTime": "2026-11-21T12:00:00Z", **more}


def store(lab: Lab, namespace: str, name: str, status: Status | None = None, **labels: str) -> dict[str, Any]:
    """A Certificate with that status, as the controller would have left it."""
    body = {
        "apiVersion": api.API_VERSION,
        "kind": "Certificate",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "secretName": f"{name}-secret",
            "issuerRef": {"name": "ca"},
            "dnsNames": [f"{name}.example.test", f"www.{name}.example.test"],
        },
    }
    stored = lab.api(api.CERTIFICATE.path(namespace), body=body)
    if status is not None:
        write_status(lab, stored, status)
    return stored


def write_status(lab: Lab, certificate: dict[str, Any], status: Status) -> None:
    meta = certificate["metadata"]
    path = api.CERTIFICATE.path(meta["namespace"], meta["name"], "status")
    live = lab.api(path)
    lab.api(path, method="PUT", body={**live, "status": status})


def annotation(lab: Lab, namespace: str, name: str) -> str:
    meta = api.CERTIFICATE.decode(msgspec.json.encode(lab.api(api.CERTIFICATE.path(namespace, name)))).metadata
    return meta.annotations.get(RENEW_NOW, "")


def kubeconfig(path: Path, lab: Lab, *, server: str = "", token: str = "", namespace: str = "") -> Path:
    """A kubeconfig with a second context `elsewhere`, whose namespace is kube-system."""
    cluster = {"server": server or lab.api_server, "certificate-authority": lab.api_ca_bundle}
    here = {"cluster": "lab", "user": "admin", "namespace": namespace or "default"}
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "lab", "cluster": cluster}],
        "users": [{"name": "admin", "user": {"token": token or lab.api_token}}],
        "contexts": [
            {"name": "here", "context": here},
            {"name": "elsewhere", "context": {**here, "namespace": "kube-system"}},
        ],
        "current-context": "here",
    }
    path.write_bytes(msgspec.json.encode(document))
    return path


# --- status -----------------------------------------------------------------------------------------------------------


def test_status_lists_a_namespace(lab: Lab, namespace: str, certctl: Callable[..., Answer]) -> None:
    """The table has a row for every Certificate of the namespace and points at the one in trouble.

    Fails when rows of other namespaces are shown, or a failed Certificate shows Ready's columns as if all were well.
    """
    store(lab, namespace, "web", ready())
    store(lab, namespace, "api", failed())
    answer = certctl("status", "-n", namespace)
    rows = [re.split(r"  +", line) for line in answer.out.splitlines()]
    assert (answer.status, answer.err) == (0, "")
    assert rows[0] == ["NAME", "READY", "NAMES", "ISSUER", "EXPIRES", "RENEWS", "STATUS"]
    assert rows[1] == ["api", "no", "api.example.test +1", "ca", "-", "-", "The CA got 404 from 192.0.2.7."]
    assert rows[2][:4] == ["web", "yes", "web.example.test +1", "ca"]
    assert all(re.fullmatch(r"\d+d", cell) for cell in rows[2][4:6])
    assert rows[2][6] == "Up to date"
    assert rows[3:] == [[f"2 certificates: 1 ready; 1 needs attention (certctl status -n {namespace} api)"]]


def test_status_of_all_namespaces(lab: Lab, namespace: str, certctl: Callable[..., Answer]) -> None:
    """-A shows the namespace of each, before and after the command's name alike. Fails when -A lists one namespace."""
    store(lab, namespace, "web", ready())
    answer = certctl("status", "-A", "--no-headers")
    assert [line.split()[:3] for line in answer.out.splitlines() if namespace in line] == [[namespace, "web", "yes"]]
    assert "NAMESPACE" in certctl("status", "--all-namespaces").out.splitlines()[0]
    assert "NAMESPACE" not in certctl("-n", namespace, "status").out


def test_status_for_programs(lab: Lab, namespace: str, certctl: Callable[..., Answer]) -> None:
    """-o json, -o wide, -l and --no-headers give what scripts rely on. Fails when json shortens a time or a name."""
    store(lab, namespace, "web", ready(serialNumber="3f"), tier="front")
    store(lab, namespace, "api", ready(), tier="back")
    (item,) = msgspec.json.decode(certctl("status", "-n", namespace, "-l", "tier=front", "-o", "json").out)["items"]
    assert {name: item[name] for name in ("namespace", "name", "ready", "notAfter", "renewalTime", "names")} == {
        "namespace": namespace,
        "name": "web",
        "ready": True,
        "notAfter": FAR,
        "renewalTime": NEAR,
        "names": ["web.example.test", "www.web.example.test"],
    }
    assert [each["type"] for each in item["conditions"]] == ["Ready", "Issuing"]
    wide = certctl("status", "-n", namespace, "-l", "tier=front", "-o", "wide", "--no-headers")
    assert [re.split(r"  +", line) for line in wide.out.splitlines()] == [
        [
            "web",
            "yes",
            "web.example.test,www.web.example.test",
            "Issuer/ca",
            "web-secret",
            FAR,
            NEAR,
            "Valid until 2099-01-19 12:00 UTC",
        ]
    ]
    assert msgspec.json.decode(certctl("status", "-n", namespace, "-l", "tier=none", "-o", "json").out) == {"items": []}


def test_status_of_one(lab: Lab, namespace: str, certctl: Callable[..., Answer]) -> None:
    """With a NAME: the issuer, the failures, the CA's words and the Events of this very object.

    Fails when Events are chosen by name alone: those of a deleted namesake would be shown.
    """
    problem = {"type": "unauthorized", "detail": "got 404", "identifiers": ["web.example.test"]}
    stored = store(lab, namespace, "web", failed(lastProblem=problem))
    lab.api(
        api.ISSUER.path(namespace),
        body={
            "apiVersion": api.API_VERSION,
            "kind": "Issuer",
            "metadata": {"name": "ca"},
            "spec": {"acme": {"server": "https://ca.example.test", "privateKeySecretRef": {"name": "key"}}},
        },
    )
    for name, uid in (("mine", stored["metadata"]["uid"]), ("other", "another-uid")):
        about = {
            "apiVersion": api.API_VERSION,
            "kind": "Certificate",
            "namespace": namespace,
            "name": "web",
            "uid": uid,
        }
        lab.api(
            f"/api/v1/namespaces/{namespace}/events",
            body={
                "metadata": {"name": name},
                "involvedObject": about,
                "reason": "ChallengeFailed",
                "message": f"event of {name}",
                "type": "Warning",
                "lastTimestamp": "2026-11-21T12:00:00Z",
            },
        )
    answer = certctl("status", "web", "-n", namespace)
    assert answer.out.startswith(f"Certificate {namespace}/web is not ready: The CA got 404 from 192.0.2.7\n")
    assert "issuer    Issuer ca, which the controller has not looked at yet" in answer.out
    assert "problem   unauthorized: got 404 (web.example.test)" in answer.out
    assert "event of mine" in answer.out
    assert "event of other" not in answer.out
    assert msgspec.json.decode(certctl("status", "web", "-n", namespace, "-o", "json").out)["name"] == "web"


def test_status_is_not_steered_by_strangers(lab: Lab, namespace: str, certctl: Callable[..., Answer]) -> None:
    """A CA's escape sequences in a message reach no terminal. Fails when `printable` is left out of a row."""
    store(lab, namespace, "web", failed("got \x1b]0;owned\x07 \u202enonsense\nfrom the CA"))
    for arguments in (("status", "-n", namespace), ("status", "-n", namespace, "web")):
        shown = certctl(*arguments).out
        assert "nonsense from the CA" in shown
        assert not {"\x1b", "\x07", "\u202e"} & set(shown)
    assert certctl("status", "-n", namespace, "-o", "json").out.isascii()


def test_nothing_found(namespace: str, certctl: Callable[..., Answer]) -> None:
    """An empty namespace is no error, a missing name is one. Fails when the sentence goes to standard output."""
    assert certctl("status", "-n", namespace) == (0, "", f"No certificates found in namespace {namespace}.\n")
    assert certctl("status", "-n", namespace, "web") == (
        1,
        "",
        f"certctl: certificate {namespace}/web not found\n"
        f"hint: certctl status -n {namespace} lists those there, certctl status -A those of all namespaces\n",
    )


def test_namespace_is_that_of_the_context(
    lab: Lab, namespace: str, certctl: Callable[..., Answer], tmp_path: Path
) -> None:
    """Without -n the context's namespace is meant, as in kubectl. Fails when it is always `default`."""
    store(lab, namespace, "web", ready())
    config = kubeconfig(tmp_path / "config", lab, namespace=namespace)
    assert certctl("status", "--no-headers", kubeconfig=config).out.startswith("web ")
    answer = certctl("status", "--context", "elsewhere", kubeconfig=config)
    assert answer.err == "No certificates found in namespace kube-system.\n"
    answer = certctl("status", "--context", "nowhere", kubeconfig=config)
    assert (answer.status, answer.out) == (1, "")
    assert "nowhere" in answer.err


def test_trouble_with_the_cluster_is_a_sentence(lab: Lab, certctl: Callable[..., Answer], tmp_path: Path) -> None:
    """No API server, no credentials, no right, no CRDs: each says what is wrong and what to do, with status 1.

    Fails when a hint is no longer found because the API layer words its sentence otherwise.
    """
    # Under this path the API server knows no resource types, as when ours are not installed.
    bare = f"{lab.api_server}/apis/none.example.org"
    for config, wrong, hint in (
        (kubeconfig(tmp_path / "1", lab, server="https://127.0.0.1:1"), "cannot be reached: ", "see that it runs"),
        (kubeconfig(tmp_path / "2", lab, token="wrong"), "does not accept the credentials", "log in again"),
        (kubeconfig(tmp_path / "3", lab, server=bare), "does not know certificates", "install the resource types"),
        (lab.tenant_kubeconfig, "does not allow to list certificates", "ask the administrator"),
    ):
        status, out, err = certctl("status", kubeconfig=config)
        assert (status, out) == (1, "")
        first, second = err.splitlines()
        assert first.startswith("certctl: ")
        assert wrong in first
        assert second.startswith(f"hint: {hint}")


# --- status --watch ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(lab: Lab, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """certctl as a program of its own."""
    with subprocess.Popen(
        [BIN / "certctl", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=lab.environment(),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().rstrip("\n")


def test_watch_prints_changes_until_ctrl_c(lab: Lab, namespace: str) -> None:
    """--watch prints what is, then each change and deletion once, and ends quietly with status 130.

    Fails when a write that changes nothing that is shown prints the row again.
    """
    web = store(lab, namespace, "web", failed())
    with running(lab, "status", "-n", namespace, "--watch") as process:
        assert next_line(process).split() == ["NAME", "READY", "NAMES", "ISSUER", "EXPIRES", "RENEWS", "STATUS"]
        assert re.split(r"  +", next_line(process))[:2] == ["web", "no"]
        write_status(lab, web, failed(revision=1))
        write_status(lab, web, ready())
        assert re.split(r"  +", next_line(process))[:2] == ["web", "yes"]
        store(lab, namespace, "new")
        assert "has not looked at it yet" in next_line(process)
        lab.api(api.CERTIFICATE.path(namespace, "web"), method="DELETE")
        assert re.split(r"  +", next_line(process))[-1] == "Deleted"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")


def test_watch_for_programs(lab: Lab, namespace: str) -> None:
    """--watch -o json prints one object a line. Fails when the JSON is indented."""
    web = store(lab, namespace, "web")
    store(lab, namespace, "other")
    with running(lab, "status", "web", "-n", namespace, "-w", "-o", "json") as process:
        assert msgspec.json.decode(next_line(process))["ready"] is False
        write_status(lab, web, ready())
        assert msgspec.json.decode(next_line(process))["ready"] is True


# --- renew ------------------------------------------------------------------------------------------------------------


def test_renew_asks_once_with_a_new_value(lab: Lab, namespace: str, certctl: Callable[..., Answer]) -> None:
    """Every call writes a value that was never there before; a missing name does not keep the others from it.

    Fails when the value is the time alone, which two calls in one second share.
    """
    store(lab, namespace, "web")
    values = set()
    for _ in range(3):
        assert certctl("renew", "-n", namespace, "web") == (0, f"Renewal of {namespace}/web requested\n", "")
        values.add(annotation(lab, namespace, "web"))
    assert len(values) == 3
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ-[0-9a-f]{8}", value) for value in values)
    answer = certctl("renew", "-n", namespace, "missing", "web")
    assert (answer.status, answer.out) == (1, f"Renewal of {namespace}/web requested\n")
    assert answer.err.startswith(f"certctl: certificate {namespace}/missing not found\nhint: ")
    assert annotation(lab, namespace, "web") not in values


def played(lab: Lab, namespace: str, name: str, *statuses: Callable[[str], Status]) -> threading.Thread:
    """A controller's part: once the annotation has a value, write these statuses in turn."""

    def play() -> None:
        pause = threading.Event()
        while not (value := annotation(lab, namespace, name)):
            pause.wait(0.02)
        stored = lab.api(api.CERTIFICATE.path(namespace, name))
        for status in statuses:
            write_status(lab, stored, status(value))

    thread = threading.Thread(target=play, name=f"controller-{secrets.token_hex(2)}")
    thread.start()
    return thread


def ordering(_: str) -> Status:
    issuing = condition("Issuing", "True", "OrderPending", "Waiting for the CA")
    return ready(conditions=[condition("Ready", "True", "Ready", "Up to date"), issuing])


def test_renew_waits_for_the_new_certificate(lab: Lab, namespace: str, certctl: Callable[..., Answer]) -> None:
    """--wait returns when the request was carried out, with the new serial and expiry.

    Fails when Ready=True alone ends the wait: it was true before, and is true while ordering.
    """
    store(lab, namespace, "web", ready(serialNumber="3f"))
    thread = played(lab, namespace, "web", ordering, lambda value: ready(serialNumber="8a", renewNow=value, revision=2))
    answer = certctl("renew", "-n", namespace, "web", "--wait", "--timeout", "60s")
    thread.join()
    assert answer == (
        0,
        f"Renewal of {namespace}/web requested\nRenewed {namespace}/web: serial 8a, valid until {FAR}\n",
        "",
    )


def test_renew_tells_why_it_failed(lab: Lab, namespace: str, certctl: Callable[..., Answer]) -> None:
    """--wait ends with status 1 and the reason of this attempt, not of one before it.

    Fails when the failure that stood before the request is taken for its outcome.
    """
    store(lab, namespace, "web", failed("An old failure."))
    again = {"failedAttempts": 2, "lastFailureTime": "2026-11-22T12:00:00Z"}
    thread = played(lab, namespace, "web", ordering, lambda _: failed("The CA got 404 from 192.0.2.7.", **again))
    answer = certctl("renew", "-n", namespace, "web", "--wait", "--timeout", "60s")
    thread.join()
    assert answer == (
        1,
        f"Renewal of {namespace}/web requested\n",
        f"certctl: {namespace}/web was not renewed: The CA got 404 from 192.0.2.7\n"
        f"hint: certctl status -n {namespace} web shows more\n",
    )


def test_renew_waits_no_longer_than_asked(lab: Lab, namespace: str, certctl: Callable[..., Answer]) -> None:
    """After --timeout: status 1, and what was last seen. Fails when the deadline is not handed to the watch."""
    store(lab, namespace, "web", ordering(""))
    store(lab, namespace, "idle", ready())
    for name, found in (("web", "last seen: Waiting for the CA"), ("idle", "the controller has not begun with it")):
        answer = certctl("renew", "-n", namespace, name, "--wait", "--timeout", "1s")
        assert answer.status == 1
        assert f"certctl: {namespace}/{name} was not renewed within 1s; {found}\n" in answer.err


def test_kubectl_finds_the_plugin(lab: Lab, namespace: str) -> None:
    """`kubectl certctl` is certctl. Fails when the entry point kubectl-certctl is missing."""
    store(lab, namespace, "web", ready())
    environment = lab.environment()
    environment["PATH"] = f"{BIN}:{environment['PATH']}"
    done = subprocess.run(
        [f"{lab.bin}/kubectl", "certctl", "status", "-n", namespace, "--no-headers"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert done.stdout.startswith("web ")
