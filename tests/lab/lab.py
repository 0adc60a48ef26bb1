"""A lab: starting one, and finding the way in one that runs (`lab.json`)."""

import contextlib
import fcntl
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from tests.lab import controller
from tests.lab.acme import PROFILES, AcmeRequest, AcmeServer, new_eab_keys, running_pebble, start_dns
from tests.lab.api import fetch
from tests.lab.build import PARTS, Binary, binaries
from tests.lab.cluster import (
    NAMESPACE,
    SERVICE,
    create_first_objects,
    start_cluster,
    start_controller_manager,
    wait_ready,
)
from tests.lab.counters import MUTATING, KubeRequest, KubeWrite, read_audit_log, write_of
from tests.lab.errors import LabError
from tests.lab.network import Network, Ports
from tests.lab.pki import Authority
from tests.lab.processes import Children
from tests.lab.progress import show
from tests.lab.svcproxy import Backend, ServiceProxy
from tests.lab.traefik import start_traefik

_LOCK = "lab.lock"
_TEMPORARY = "certbotk8s-lab-"
_NEW = 60.0  # seconds


class Mark(NamedTuple):
    """A moment in the records of the servers: what came before it is not counted."""

    audit: int
    acme: int


class Lab(msgspec.Struct, kw_only=True, rename="camel"):
    """A running lab, as `lab.json` describes it. Paths are absolute."""

    kubeconfig: str
    """Of user admin, who may do everything."""
    controller_kubeconfig: str
    """Of user certbotk8s, who may do what controller-role.yaml says."""
    tenant_kubeconfig: str
    """Of user tenant, who may do nothing until a test gives a right."""
    api_server: str
    api_ca_bundle: str
    api_token: str
    """The admin's."""
    acme: AcmeServer
    eab: dict[str, str]
    """HMAC key, base64url without padding, by key id."""
    http_port: int
    """Of Traefik, where the CA connects for HTTP-01."""
    https_port: int
    dns: str
    """host:port of the DNS server that the CA asks."""
    dns_management: str
    etcd: str
    """URL of etcd, for its own API in JSON (`POST /v3/...`)."""
    audit_log: str
    logs: str
    """Folder of the log files."""
    pebble_log: str
    pids: dict[str, int]
    """Process ids by name; "lab" is the lab itself."""
    service_ip: str = msgspec.field(name="serviceIP")
    """ClusterIP of the HTTP-01 responder's Service."""
    service_cidr: str = msgspec.field(name="serviceCIDR")
    """ClusterIPs: a process may listen on the one that the API server gave a Service."""
    replica_network: str
    """Prefix of the replicas' addresses."""
    replicas: str
    """Folder with one file for each replica that the Service may forward to."""
    namespace: str
    """The controller's."""
    bin: str
    """Folder with kubectl and the other programs."""
    traefik_api: str = msgspec.field(name="traefikAPI")

    @classmethod
    def load(cls, path: str | Path) -> "Lab":
        """The lab of a `lab.json`. LabError when there is none."""
        try:
            return msgspec.json.decode(Path(path).read_bytes(), type=cls)
        except FileNotFoundError:
            raise LabError(f"There is no lab at {path}. Start one: python -m tests.lab up") from None
        except msgspec.DecodeError as error:
            raise LabError(f"{path} describes no lab of this version: {error}. Start a new one.") from error

    def environment(self) -> dict[str, str]:
        """Variables for a program that works in the lab: kubectl on PATH, and the admin's kubeconfig."""
        return {
            **os.environ,
            "PATH": os.pathsep.join([self.bin, os.environ.get("PATH", os.defpath)]),
            "KUBECONFIG": self.kubeconfig,
            # Of its own: another lab on the same port serves other resources.
            "KUBECACHEDIR": str(Path(self.kubeconfig).with_name("kubectl-cache")),
        }

    def kubectl(self, *arguments: str, input: str | None = None, check: bool = True, as_tenant: bool = False) -> str:
        """Runs kubectl and gives its standard output; as the admin, or as the user tenant.

        Raises subprocess.CalledProcessError (with `stderr`) when it fails, unless `check` is off: then what it says on
        standard error follows its output.
        """
        outcome = subprocess.run(
            [f"{self.bin}/kubectl", *arguments],
            input=input,
            capture_output=True,
            text=True,
            check=check,
            env={**self.environment(), **({"KUBECONFIG": self.tenant_kubeconfig} if as_tenant else {})},
        )
        return outcome.stdout if check else outcome.stdout + outcome.stderr

    def api(self, path: str, *, method: str | None = None, body: object = None) -> dict[str, object]:
        """One request to the API server as the admin; quicker than kubectl. urllib.error.HTTPError when refused."""
        answer = fetch(
            f"{self.api_server}{path}", bundle=self.api_ca_bundle, token=self.api_token, method=method, body=body
        )
        return msgspec.json.decode(answer, type=dict[str, object])

    def mark(self) -> Mark:
        """This moment in the servers' records, for the methods below."""
        self._settle_audit_log(0)
        return Mark(audit=Path(self.audit_log).stat().st_size, acme=self.acme.mark())

    def acme_requests(self, since: Mark | None = None) -> list[AcmeRequest]:
        """What reached the CA; nonce fetches among them (`AcmeRequest.is_new_nonce`)."""
        return self.acme.requests(since.acme if since else 0)

    def orders(self, since: Mark | None = None) -> int:
        """How many newOrder requests reached the CA."""
        return self.acme.orders(since.acme if since else 0)

    def kube_requests(self, since: Mark | None = None, *, user: str = "certbotk8s") -> list[KubeRequest]:
        """The requests of a user that the API server has answered, reads and refused ones too."""
        start = since.audit if since else 0
        self._settle_audit_log(start)
        return [request for request in read_audit_log(Path(self.audit_log), start) if request.user.username == user]

    def kube_writes(self, since: Mark | None = None, *, user: str = "certbotk8s") -> list[KubeWrite]:
        """The mutating requests of a user that the API server has answered, refused ones too; leases apart."""
        writes = [write_of(request) for request in self.kube_requests(since, user=user) if request.verb in MUTATING]
        return [write for write in writes if write.resource != "leases"]

    def set_dns(
        self,
        host: str,
        *,
        addresses: Sequence[str] | None = None,
        cname: str | None = None,
        txt: str | None = None,
        servfail: bool = False,
    ) -> None:
        """Changes what the CA's DNS server answers for `host`: A records, a CNAME, one more TXT value, or SERVFAIL."""
        if addresses is not None:
            self._tell_dns("clear-a", host=host)
            self._tell_dns("add-a", host=host, addresses=list(addresses))
        if cname is not None:
            self._tell_dns("set-cname", host=host, target=cname)
        if txt is not None:
            self._tell_dns("set-txt", host=host, value=txt)
        if servfail:
            self._tell_dns("set-servfail", host=host)

    def clear_dns(self, host: str) -> None:
        """Back to the default for `host`: A 127.0.0.1."""
        for path in ("clear-a", "clear-cname", "clear-txt", "clear-servfail"):
            self._tell_dns(path, host=host)

    @contextlib.contextmanager
    def exposed(self, namespace: str, name: str, backends: Sequence[Backend]) -> Iterator[str]:
        """A Service with port 80 that Traefik can route to, forwarded to `backends`; gives its ClusterIP."""
        path = f"/api/v1/namespaces/{namespace}/services"
        service = msgspec.convert(
            self.api(
                path,
                body={
                    "metadata": {
                        "name": name,
                        "annotations": {
                            "traefik.ingress.kubernetes.io/service.nativelb": "true",
                            "traefik.io/service.nativelb": "true",
                        },
                    },
                    "spec": {"ports": [{"name": "http", "port": 80}]},
                },
            ),
            _Service,
        )
        try:
            with ServiceProxy(service.spec.cluster_ip, 80, lambda: backends):
                yield service.spec.cluster_ip
        finally:
            self.api(f"{path}/{name}", method="DELETE")

    def _tell_dns(self, path: str, **body: object) -> None:
        fetch(f"{self.dns_management}/{path}", body=body)

    def _settle_audit_log(self, start: int) -> None:
        """Returns when the writes whose effect somebody has seen are in the audit log.

        A watch shows a write a moment before it is answered, and the log has it just before the answer. A request of
        our own takes longer than that moment; it is waited for in the log.
        """
        own = f"/version?mark={secrets.token_hex(8)}"
        self.api(own)
        deadline = time.monotonic() + 10
        while not any(request.request_uri == own for request in read_audit_log(Path(self.audit_log), start)):
            if time.monotonic() > deadline:
                raise LabError(f"The API server does not write its audit log {self.audit_log}. Is the disk full?")
            time.sleep(0.005)


class _ServiceSpec(msgspec.Struct):
    cluster_ip: str = msgspec.field(name="clusterIP")


class _Service(msgspec.Struct):
    spec: _ServiceSpec


class RunningLab(NamedTuple):
    """A lab that this process has started."""

    lab: Lab
    path: Path
    """Its lab.json."""
    children: Children

    def restart_api_server(self) -> None:
        """Kills the API server and starts it again, without what it kept in memory; returns when it is ready."""
        lab = self.lab
        self.children["kube-apiserver"].restart()
        wait_ready(lab.api_server, lab.api_ca_bundle, lab.api_token, self.children)
        lab.pids.update(self.children.pids())

    def save(self) -> None:
        """Writes lab.json anew, whole at every moment."""
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(self.lab)) + b"\n")
        unfinished.rename(self.path)


@contextlib.contextmanager
def running_lab(folder: Path | None = None, *, etcd_arguments: Sequence[str] = ()) -> Iterator[RunningLab]:
    """Builds what is missing, starts every part, and ends them all at the end.

    `folder` is made when it is not there, and stays, for the logs; without one the lab has a temporary folder that goes
    with it. `etcd_arguments` come after the lab's own, so that they win. LabError when it cannot be started.
    """
    programs = binaries(PARTS)
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(_home(folder))
        network = stack.enter_context(Network())
        ports = stack.enter_context(Ports())
        running = _start(home, programs, network, ports, stack, etcd_arguments)
        stack.callback(running.path.unlink, missing_ok=True)
        minor = {name: binary.minor for name, binary in programs.items()}
        show(
            f"etcd {minor['etcd']}, kube-apiserver {minor['kube-apiserver']}, Pebble {minor['pebble']},"
            f" Traefik {minor['traefik']} ready",
            time.monotonic() - started,
        )
        yield running


@contextlib.contextmanager
def start_pebble(
    lab: Lab,
    *,
    nonce_reject: int = 0,
    retry_after: int = 0,
    eab_required: bool = True,
    authorization_reuse: int = 0,
    profiles: Mapping[str, Mapping[str, object]] = PROFILES,
) -> Iterator[AcmeServer]:
    """A second CA beside the lab's own, for the time of the context; it shares DNS, HTTP port and EAB keys.

    `nonce_reject`: percentage of good nonces refused; `retry_after`: seconds, 0 for none; `authorization_reuse`:
    percentage of names that are not validated again for the same account.
    """
    name = f"pebble-{secrets.token_hex(3)}"
    home = Path(lab.kubeconfig).parent
    with running_pebble(
        name,
        folder=home / name,
        logs=Path(lab.logs),
        bin_folder=Path(lab.bin),
        dns=lab.dns,
        http_port=lab.http_port,
        eab=lab.eab,
        nonce_reject=nonce_reject,
        retry_after=retry_after,
        eab_required=eab_required,
        authorization_reuse=authorization_reuse,
        profiles=profiles,
    ) as (server, _):
        yield server


def _start(
    home: Path,
    programs: dict[str, Binary],
    network: Network,
    ports: Ports,
    stack: contextlib.ExitStack,
    etcd_arguments: Sequence[str],
) -> RunningLab:
    logs, bin_folder, registrations = home / "logs", home / "bin", home / "replicas"
    for created in (logs, bin_folder, registrations):
        created.mkdir()
    for name, binary in programs.items():
        (bin_folder / name).symlink_to(binary.path)
    children = stack.enter_context(Children(logs))
    authority = Authority(home)

    cluster = start_cluster(home, bin_folder, network, ports, authority, children, etcd_arguments)
    start_controller_manager(cluster, bin_folder, children)
    create_first_objects(cluster, bin_folder, home, network)
    http_port = ports.take()
    traefik = start_traefik(cluster, bin_folder, home, http_port, ports, children)
    dns = start_dns(bin_folder, ports, children)
    eab = new_eab_keys()
    acme, pebble = stack.enter_context(
        running_pebble(
            "pebble",
            folder=home / "pebble",
            logs=logs,
            bin_folder=bin_folder,
            dns=dns.address,
            http_port=http_port,
            eab=eab,
        )
    )
    children.add(pebble)
    stack.enter_context(
        ServiceProxy(network.service_ip, 80, lambda: controller.backends(registrations, network.replicas))
    )
    lab = Lab(
        kubeconfig=str(cluster.kubeconfigs["admin"]),
        controller_kubeconfig=str(cluster.kubeconfigs["certbotk8s"]),
        tenant_kubeconfig=str(cluster.kubeconfigs["tenant"]),
        api_server=cluster.url,
        api_ca_bundle=str(cluster.bundle),
        api_token=cluster.tokens["admin"],
        acme=acme,
        eab=eab,
        http_port=traefik.http_port,
        https_port=traefik.https_port,
        dns=dns.address,
        dns_management=dns.management,
        etcd=cluster.etcd,
        audit_log=str(cluster.audit_log),
        logs=str(logs),
        pebble_log=acme.log,
        pids={"lab": os.getpid(), **children.pids()},
        service_ip=network.service_ip,
        service_cidr=network.service_cidr,
        replica_network=network.replicas,
        replicas=str(registrations),
        namespace=NAMESPACE,
        bin=str(bin_folder),
        traefik_api=traefik.api,
    )
    running = RunningLab(lab, home / "lab.json", children)
    running.save()
    return running


@contextlib.contextmanager
def _home(chosen: Path | None) -> Iterator[Path]:
    """The lab's folder, marked as in use by a lock that the kernel drops when this process dies."""
    if chosen is None:
        _remove_abandoned()
        home = Path(tempfile.mkdtemp(prefix=_TEMPORARY))
    else:
        home = chosen.absolute()
        home.mkdir(parents=True, exist_ok=True)
        if any(home.iterdir()) and not (home / _LOCK).exists():
            raise LabError(f"{home} holds other things than a lab. Name an empty or a new folder.")
    with (home / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LabError(f"Another lab runs in {home}. End it, or name another folder.") from None
        try:
            for entry in home.iterdir():  # of an earlier lab
                if entry.name != _LOCK:
                    _remove(entry)
            yield home
        finally:
            if chosen is None:
                shutil.rmtree(home, ignore_errors=True)


def _remove_abandoned() -> None:
    """Removes the temporary folders of labs that were killed and could not do so themselves."""
    for home in Path(tempfile.gettempdir()).glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError), (home / _LOCK).open("r+") as lock:
            if time.time() - os.fstat(lock.fileno()).st_mtime < _NEW:
                continue  # its owner may be about to lock it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(home, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


__all__ = ["SERVICE", "AcmeServer", "Lab", "Mark", "RunningLab", "running_lab", "start_pebble"]
