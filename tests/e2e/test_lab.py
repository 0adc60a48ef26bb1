"""The lab itself: that it is whole, that it counts truly, and that nothing of it stays behind."""

import contextlib
import os
import signal
import ssl
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dns.resolver
import msgspec
import pytest

from tests.lab.api import fetch
from tests.lab.controller import Controller
from tests.lab.counters import KubeWrite
from tests.lab.lab import Lab, Mark, start_pebble
from tests.lab.network import Ports
from tests.lab.processes import listening
from tests.lab.svcproxy import Backend, ServiceProxy

_LAB = [sys.executable, "-m", "tests.lab"]


class Application(ThreadingHTTPServer):
    """A small HTTP server that says its name, and is ready or not as it is told."""

    request_queue_size = 512

    def __init__(self, name: str, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Answer)
        self.name = name
        self.ready = True

    def handle_error(self, *_: object) -> None:
        """A client that went away is no error."""

    @property
    def backend(self) -> Backend:
        """It, as an endpoint of a Service."""
        return Backend("127.0.0.1", self.server_port, self.server_port)


class _Answer(BaseHTTPRequestHandler):
    server: Application

    def do_GET(self) -> None:
        ok = self.server.ready or self.path != "/readyz"
        self.send_response(200 if ok else 503)
        self.end_headers()
        self.wfile.write(self.server.name.encode())

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def applications() -> Iterator[Callable[[str], Application]]:
    """Starts applications, and ends them."""
    with contextlib.ExitStack() as stack:
        ports = stack.enter_context(Ports())

        def start(name: str) -> Application:
            application = stack.enter_context(Application(name, ports.take()))
            threading.Thread(target=application.serve_forever, args=(0.05,), daemon=True).start()
            stack.callback(application.shutdown)
            return application

        yield start


@contextlib.contextmanager
def _up(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], Lab]]:
    """A lab of its own, by the command line."""
    process = subprocess.Popen([*_LAB, "up", *arguments], stdout=subprocess.PIPE, text=True)
    with process:
        try:
            assert process.stdout is not None
            path = process.stdout.readline().strip()
            yield process, Lab.load(path)
        finally:
            process.terminate()


def _wait(condition: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # a dead process whose parent has not looked yet


def _get(url: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, ""
    except OSError:
        return 0, ""


def test_every_part_that_lab_json_names_answers(lab: Lab) -> None:
    """API server, CA, root, DNS and Traefik are where lab.json says, and all processes live.

    Fails when `_start` leaves out a part or writes a wrong address of one.
    """
    versions = msgspec.json.decode(lab.kubectl("version", "-o", "json"))
    assert versions["serverVersion"]["gitVersion"].startswith("v1.36.")
    directory = msgspec.json.decode(fetch(lab.acme.directory, bundle=lab.acme.ca_bundle))
    assert directory["meta"]["externalAccountRequired"] is True
    assert set(directory["meta"]["profiles"]) == {"default", "shortlived"}
    assert b"BEGIN CERTIFICATE" in lab.acme.root_pem()
    assert set(lab.eab) == {"kid-1", "kid-2"}
    assert b"{" in fetch(f"{lab.traefik_api}/rawdata")
    assert _get(f"http://127.0.0.1:{lab.http_port}/")[0] == 404
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        urllib.request.urlopen(f"https://127.0.0.1:{lab.https_port}/", context=ssl.create_default_context(), timeout=5)
    assert all(map(_alive, lab.pids.values()))
    assert {"lab", "etcd", "kube-apiserver", "kube-controller-manager", "traefik", "challtestsrv", "pebble"} <= set(
        lab.pids
    )


def test_users_have_the_rights_of_their_roles_and_no_others(lab: Lab, namespace: str) -> None:
    """The tenant may do nothing, the controller what controller-role.yaml says.

    Fails when a user of tokens.csv gets the group system:masters.
    """
    assert "Forbidden" in lab.kubectl("get", "secrets", "-n", namespace, check=False, as_tenant=True)
    controller = ("--kubeconfig", lab.controller_kubeconfig)
    assert lab.kubectl(*controller, "auth", "can-i", "create", "secrets", "-n", namespace).strip() == "yes"
    assert lab.kubectl(*controller, "auth", "can-i", "delete", "services", "-A", check=False).startswith("no")


def test_the_dns_server_answers_what_it_is_told(lab: Lab, suffix: str) -> None:
    """127.0.0.1 by default, otherwise what a test sets, and the default again after clear_dns.

    Fails when `clear_dns` leaves out one kind of record.
    """
    resolver = dns.resolver.Resolver(configure=False)
    resolver.nameservers, resolver.port = ["127.0.0.1"], int(lab.dns.rpartition(":")[2])

    def addresses() -> list[str]:
        return [str(record) for record in resolver.resolve(f"www.{suffix}", "A", tcp=True)]

    assert addresses() == ["127.0.0.1"]
    lab.set_dns(f"www.{suffix}", addresses=["192.0.2.7"])
    assert addresses() == ["192.0.2.7"]
    lab.set_dns(f"www.{suffix}", servfail=True)
    with pytest.raises(dns.resolver.NoNameservers):
        addresses()
    lab.clear_dns(f"www.{suffix}")
    assert addresses() == ["127.0.0.1"]


def test_an_ingress_reaches_an_application_behind_a_cluster_ip(
    lab: Lab, namespace: str, suffix: str, applications: Callable[[str], Application]
) -> None:
    """Ingress without a class -> Traefik -> ClusterIP -> svcproxy -> application, and 404 when the Ingress is gone.

    Fails without the native-balancing annotation on the Service, without the default IngressClass, or when the proxy
    listens on another address.
    """
    host = f"web.{suffix}"
    url = f"http://127.0.0.1:{lab.http_port}/hello"
    with lab.exposed(namespace, "web", [applications("shop").backend]):
        lab.kubectl("create", "ingress", "web", "-n", namespace, f"--rule={host}/*=web:80")
        assert _wait(lambda: _get(url, Host=host) == (200, "shop"))
        lab.kubectl("delete", "ingress", "web", "-n", namespace)
        assert _wait(lambda: _get(url, Host=host)[0] == 404)


def test_the_service_proxy_follows_readiness(applications: Callable[[str], Application]) -> None:
    """Ready backends get connections in turn; one that is not ready gets none; with none ready they are refused.

    Fails when `_look` takes any answer for ready, or keeps listening without a ready backend.
    """
    first, second = applications("first"), applications("second")
    first.ready = second.ready = False
    with Ports() as ports:
        port = ports.take()
        url = f"http://127.0.0.1:{port}/"
        with ServiceProxy("127.0.0.1", port, lambda: [first.backend, second.backend]):
            time.sleep(0.5)
            assert not listening("127.0.0.1", port)
            first.ready = True
            assert _wait(lambda: listening("127.0.0.1", port))
            assert {_get(url) for _ in range(10)} == {(200, "first")}
            second.ready = True
            assert _wait(lambda: {_get(url)[1] for _ in range(2)} == {"first", "second"})
            first.ready = False
            assert _wait(lambda: {_get(url)[1] for _ in range(4)} == {"second"})
            second.ready = False
            assert _wait(lambda: not listening("127.0.0.1", port))


def test_the_service_proxy_carries_hundreds_of_connections_and_long_bodies(
    applications: Callable[[str], Application],
) -> None:
    """No connection is lost under load, and a body longer than any buffer arrives whole.

    Fails when `_pump` stops at its first piece, or does not pass the end of a stream on.
    """
    application = applications("x" * 3_000_000)
    with Ports() as ports:
        port = ports.take()
        with ServiceProxy("127.0.0.1", port, lambda: [application.backend]):
            assert _wait(lambda: listening("127.0.0.1", port))
            assert _get(f"http://127.0.0.1:{port}/") == (200, application.name)
            application.name = "small"
            answers: list[tuple[int, str]] = []

            def load() -> None:
                answers.extend(_get(f"http://127.0.0.1:{port}/") for _ in range(50))

            clients = [threading.Thread(target=load) for _ in range(8)]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
            assert answers == [(200, "small")] * 400


def test_writes_are_counted_exactly(lab: Lab, namespace: str) -> None:
    """The audit log has each write of a user since the mark once, refused ones too, and no read.

    Fails when the verb, the user or the mark is not looked at.
    """
    path = f"/api/v1/namespaces/{namespace}/configmaps"
    lab.api(path, body={"metadata": {"name": "before"}})
    mark = lab.mark()
    for number in range(30):
        lab.api(path, body={"metadata": {"name": f"n{number}"}})
        lab.api(f"{path}/n{number}")
    lab.api(f"{path}/n0", method="DELETE")
    with pytest.raises(urllib.error.HTTPError, match="409"):
        lab.api(path, body={"metadata": {"name": "n1"}})
    expected = [KubeWrite("create", "configmaps", "", namespace, f"n{number}") for number in range(30)]
    expected.append(KubeWrite("delete", "configmaps", "", namespace, "n0"))
    expected.append(KubeWrite("create", "configmaps", "", namespace, "n1"))
    assert lab.kube_writes(mark, user="admin") == expected
    assert lab.kube_writes(lab.mark(), user="admin") == []

    mark = lab.mark()
    lab.kubectl("create", "configmap", "mine", "-n", namespace, check=False, as_tenant=True)
    # Forbidden before its body was read, so without a name.
    assert lab.kube_writes(mark, user="tenant") == [KubeWrite("create", "configmaps", "", namespace, "")]
    assert lab.kube_writes(mark, user="certbotk8s") == []


def test_requests_to_the_ca_are_counted_since_a_mark(lab: Lab) -> None:
    """Each request that reached the CA since the mark is there once; nonce fetches can be told apart.

    Fails when `requests` reads the log from its beginning.
    """
    fetch(lab.acme.directory, bundle=lab.acme.ca_bundle)
    mark = lab.mark()
    assert lab.acme_requests(mark) == []
    base = lab.acme.directory.removesuffix("/dir")
    fetch(f"{base}/nonce-plz", bundle=lab.acme.ca_bundle, method="HEAD")
    with pytest.raises(urllib.error.HTTPError):
        fetch(f"{base}/order-plz", bundle=lab.acme.ca_bundle, body={})
    assert lab.acme_requests(mark) == [("HEAD", "/nonce-plz"), ("POST", "/order-plz")]
    assert [request.is_new_nonce for request in lab.acme_requests(mark)] == [True, False]
    assert lab.orders(mark) == 1
    assert lab.orders(Mark(audit=0, acme=0)) >= 1


def test_a_second_ca_is_its_own(lab: Lab) -> None:
    """start_pebble gives another CA: another root, no EAB demanded, its requests counted apart, gone afterwards.

    Fails when it shares the first one's log or configuration, or is not killed.
    """
    mark = lab.mark()
    with start_pebble(lab, eab_required=False, nonce_reject=5, retry_after=3) as other:
        directory = msgspec.json.decode(fetch(other.directory, bundle=other.ca_bundle))
        assert directory["meta"]["externalAccountRequired"] is False
        assert other.root_pem() != lab.acme.root_pem()
        assert other.requests() == [("GET", "/dir")]
    assert lab.acme_requests(mark) == []
    with pytest.raises(OSError, match="refused"):
        fetch(other.directory, bundle=other.ca_bundle)


# Answers on both of a controller's addresses, ready at once; ends with status 3 when told to stop.
_STAND_IN = textwrap.dedent("""
    import http.server, signal, sys, threading
    flags = dict(argument.split("=", 1) for argument in sys.argv[1:])
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(flags["--metrics-listen"].encode())
        def log_message(self, *_): pass
    def end(*_):
        sys.exit(3)
    signal.signal(signal.SIGTERM, end)
    for flag in ("--http01-listen", "--metrics-listen"):
        host, port = flags[flag].rsplit(":", 1)
        server = http.server.ThreadingHTTPServer((host, int(port)), Answer)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    print("started", flush=True)
    while True: signal.pause()
""")


def test_replicas_have_addresses_of_their_own_and_are_the_backends_of_the_service(lab: Lab) -> None:
    """Two replicas share the Service; a killed one gets no connection, a restarted one does; a stop gives its status.

    Fails when a replica's number is not reserved, its registration not read, or `stop` kills.
    """
    command = (sys.executable, "-c", _STAND_IN)
    url = f"http://{lab.service_ip}/"
    with Controller(lab, command=command) as first, Controller(lab, command=command) as second:
        first.wait_ready()
        second.wait_ready()
        both = {(200, f"{replica.address}:9402") for replica in (first, second)}
        assert len(both) == 2
        assert _wait(lambda: {_get(url) for _ in range(2)} == both)
        first.kill()
        assert _wait(lambda: {_get(url) for _ in range(4)} == {(200, f"{second.address}:9402")})
        first.restart()
        assert _wait(lambda: {_get(url) for _ in range(2)} == both)
        assert first.stop() == 3
        assert first.log.read_text().count("started") == 2
    assert _wait(lambda: not listening(lab.service_ip, 80))


@pytest.mark.parametrize("arguments", [[], ["--controller", "--replicas=2"]], ids=["bare", "controller"])
def test_a_killed_lab_leaves_no_process(tmp_path: Path, arguments: list[str]) -> None:
    """SIGKILL gives the lab no chance to clean up, and still everything that it started ends.

    Fails when a part is started without its tether.
    """
    with _up(f"--dir={tmp_path}", *arguments) as (process, mine):
        pids = mine.pids
        assert len(pids) == (9 if arguments else 7)
        assert all(map(_alive, pids.values()))
        process.kill()
        assert _wait(lambda: not any(map(_alive, pids.values())))


def test_a_lab_that_is_told_to_end_leaves_nothing() -> None:
    """SIGTERM ends every process with status 0, and the temporary folder goes.

    Fails when `Children` forgets one of its parts.
    """
    with _up() as (process, mine):
        folder = Path(mine.kubeconfig).parent
        assert folder.exists()
        process.terminate()
        assert process.wait(20) == 0
        assert not any(map(_alive, mine.pids.values()))
        assert not folder.exists()


def test_a_controller_that_is_killed_is_started_again(tmp_path: Path) -> None:
    """Its new process id is in lab.json. Fails when the supervisor does not look, or does not save."""
    with _up(f"--dir={tmp_path}", "--controller") as (_, mine):
        former = mine.pids["controller-1"]
        os.kill(former, signal.SIGKILL)

        def replaced() -> bool:
            now = Lab.load(tmp_path / "lab.json").pids["controller-1"]
            return now != former and _alive(now)

        assert _wait(replaced)


def test_a_lab_that_lost_a_part_says_so_and_ends(tmp_path: Path) -> None:
    """Nobody tests against half a lab unawares. Fails when `up` does not look after its parts."""
    process = subprocess.Popen(
        [*_LAB, "up", f"--dir={tmp_path}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stdout is not None
            os.kill(Lab.load(process.stdout.readline().strip()).pids["pebble"], signal.SIGKILL)
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 1
    assert "pebble ended with status -9" in said


@pytest.mark.parametrize(("command", "status"), [("exit 7", 7), ("kill -TERM $$", 128 + signal.SIGTERM), ("true", 0)])
def test_run_gives_the_command_the_lab_and_passes_its_status_on(command: str, status: int) -> None:
    """kubectl on PATH reaches the lab, CERTBOTK8S_LAB describes it, and the exit status is the command's.

    Fails when the environment lacks one of them, or when a signal's status is lost.
    """
    script = (
        "kubectl version --client | grep -q v1.36. && kubectl get namespace certbotk8s -o name"
        f' && test -s "$CERTBOTK8S_LAB" && {command}'
    )
    outcome = subprocess.run([*_LAB, "run", "--", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert outcome.returncode == status, outcome.stderr
    assert outcome.stdout == "namespace/certbotk8s\n"


def test_labs_started_together_do_not_collide(lab: Lab, tmp_path: Path) -> None:
    """Two more labs start at the same moment beside the session's, in a shell for that one's cluster: all answer, none
    shares an address, and the Traefik of each serves the Ingresses of its own cluster.

    Fails when networks or ports are not reserved, or when Traefik is started with `$KUBECONFIG`.
    """
    with contextlib.ExitStack() as stack:
        starts = [
            subprocess.Popen(
                [*_LAB, "up", f"--dir={tmp_path / str(number)}"],
                stdout=subprocess.PIPE,
                text=True,
                env=lab.environment(),
            )
            for number in range(2)
        ]
        for start in starts:
            stack.enter_context(start)
            stack.callback(start.terminate)
        labs = [lab]
        for start in starts:
            assert start.stdout is not None
            labs.append(Lab.load(start.stdout.readline().strip()))
        for each in labs:
            assert each.kubectl("get", "service", "-n", "certbotk8s", "-o", "jsonpath={.items[0].spec.clusterIP}") == (
                each.service_ip
            )
            assert fetch(each.acme.directory, bundle=each.acme.ca_bundle)
        for number, each in enumerate(labs):
            url, host = f"http://127.0.0.1:{each.http_port}/", f"own{number}.example.test"
            assert _get(url, Host=host)[0] == 404
            each.kubectl("create", "ingress", "own", "-n", "certbotk8s", f"--rule={host}/*=certbotk8s-http01:80")
            assert _wait(lambda url=url, host=host: _get(url, Host=host)[0] == 502)  # type: ignore[misc]
            each.kubectl("delete", "ingress", "own", "-n", "certbotk8s")

        def addresses(of: Lab) -> list[Any]:
            return [
                of.service_ip,
                of.replica_network,
                of.api_server,
                of.acme.directory,
                of.http_port,
                of.https_port,
                of.dns,
            ]

        everything = [address for each in labs for address in addresses(each)]
        assert len(set(everything)) == len(everything)


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    """`up --dir` empties only a folder that held a lab. Fails when `_home` does not look for the lab's mark."""
    (tmp_path / "thesis.txt").write_text("mine")
    outcome = subprocess.run(
        [*_LAB, "up", f"--dir={tmp_path}"], capture_output=True, text=True, check=False, timeout=30
    )
    assert outcome.returncode == 1
    assert "holds other things than a lab" in outcome.stderr
    assert (tmp_path / "thesis.txt").read_text() == "mine"
