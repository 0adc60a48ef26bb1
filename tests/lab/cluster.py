"""The control plane: etcd, kube-apiserver, kube-controller-manager, and the objects that a lab begins with."""

import secrets
import string
import subprocess
import time
import urllib.error
from collections.abc import Sequence
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from tests.lab.api import fetch
from tests.lab.errors import LabError
from tests.lab.network import Network, Ports
from tests.lab.pki import Authority, private_key_pem
from tests.lab.processes import Children

NAMESPACE = "certbotk8s"
SERVICE = "certbotk8s-http01"

_MANIFESTS = Path(__file__).with_name("manifests")
_CONTROLLER_ROLE = Path(__file__).with_name("controller-role.yaml")
_AUDIT_POLICY = Path(__file__).with_name("audit-policy.yaml")
# The groups of each user. What tenant may do is nothing; the others get what the manifests bind to them.
_USERS = {
    "admin": "system:masters",
    "kube-controller-manager": "system:masters",
    "certbotk8s": "",
    "traefik": "",
    "tenant": "",
}


class Cluster(msgspec.Struct, frozen=True):
    """Where the control plane is, and who may enter."""

    url: str
    bundle: Path
    tokens: dict[str, str]
    kubeconfigs: dict[str, Path]
    audit_log: Path
    etcd: str
    """Where etcd listens for clients."""


def start_cluster(
    folder: Path,
    bin_folder: Path,
    network: Network,
    ports: Ports,
    authority: Authority,
    children: Children,
    etcd_arguments: Sequence[str],
) -> Cluster:
    """Starts etcd and the API server and returns when it is ready. LabError when it does not get so."""
    etcd = _start_etcd(folder, bin_folder, ports, children, etcd_arguments)
    tokens = {user: secrets.token_hex(16) for user in _USERS}
    token_file = folder / "tokens.csv"
    token_file.write_text("".join(f'{tokens[user]},{user},{user},"{group}"\n' for user, group in _USERS.items()))
    service_account_key = folder / "service-account.key"
    service_account_key.write_bytes(private_key_pem(ec.generate_private_key(ec.SECP256R1())))
    certificate, key = authority.issue("kube-apiserver", ["localhost", "127.0.0.1", "kubernetes.default.svc"])
    port = ports.take()
    url = f"https://127.0.0.1:{port}"
    audit_log = folder / "audit.log"
    server = children.start(
        "kube-apiserver",
        [
            bin_folder / "kube-apiserver",
            f"--etcd-servers={etcd}",
            "--bind-address=127.0.0.1",
            f"--secure-port={port}",
            f"--tls-cert-file={certificate}",
            f"--tls-private-key-file={key}",
            f"--cert-dir={folder}",
            f"--token-auth-file={token_file}",
            "--authorization-mode=RBAC",
            "--disable-admission-plugins=ServiceAccount",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={service_account_key}",
            f"--service-account-signing-key-file={service_account_key}",
            f"--service-cluster-ip-range={network.service_cidr}",
            f"--audit-policy-file={_AUDIT_POLICY}",
            f"--audit-log-path={audit_log}",
            "--audit-log-mode=blocking",  # an answered request is in the log
            "--audit-log-maxsize=100000",  # MB: never rotated, so that an offset into it stays true
        ],
    )
    server.wait_listening("127.0.0.1", port)
    cluster = Cluster(
        url=url,
        bundle=authority.bundle,
        tokens=tokens,
        kubeconfigs={user: _kubeconfig(folder, user, url, authority.bundle, token) for user, token in tokens.items()},
        audit_log=audit_log,
        etcd=etcd,
    )
    wait_ready(cluster.url, cluster.bundle, tokens["admin"], children)
    return cluster


def start_controller_manager(cluster: Cluster, bin_folder: Path, children: Children) -> None:
    """Starts the part that collects garbage and empties deleted namespaces."""
    children.start(
        "kube-controller-manager",
        [
            bin_folder / "kube-controller-manager",
            f"--kubeconfig={cluster.kubeconfigs['kube-controller-manager']}",
            "--leader-elect=false",
            "--secure-port=0",
            "--controllers=garbage-collector-controller,namespace-controller,serviceaccount-controller",
        ],
    )


def create_first_objects(cluster: Cluster, bin_folder: Path, folder: Path, network: Network) -> None:
    """Creates the controller's namespace, Service and role, and what Traefik needs. LabError when one is refused."""
    text = "\n---\n".join(
        path.read_text(encoding="utf-8") for path in (*sorted(_MANIFESTS.glob("*.yaml")), _CONTROLLER_ROLE)
    )
    outcome = subprocess.run(
        [bin_folder / "kubectl", "create", "--validate=false", "-f", "-"],
        input=string.Template(text).substitute(namespace=NAMESPACE, service=SERVICE, service_ip=network.service_ip),
        capture_output=True,
        text=True,
        check=False,
        env={"KUBECONFIG": str(cluster.kubeconfigs["admin"]), "KUBECACHEDIR": str(folder / "kubectl-cache")},
    )
    if outcome.returncode != 0:
        raise LabError(f"The lab's first objects cannot be created: {outcome.stderr.strip()}\nCorrect {_MANIFESTS}.")


def _start_etcd(folder: Path, bin_folder: Path, ports: Ports, children: Children, arguments: Sequence[str]) -> str:
    port = ports.take()
    url = f"http://127.0.0.1:{port}"
    children.start(
        "etcd",
        [
            bin_folder / "etcd",
            f"--data-dir={folder / 'etcd'}",
            f"--listen-client-urls={url}",
            f"--advertise-client-urls={url}",
            f"--listen-peer-urls=http://127.0.0.1:{ports.take()}",
            "--unsafe-no-fsync",
            "--log-level=error",
            *arguments,
        ],
    ).wait_listening("127.0.0.1", port)
    return url


def wait_ready(url: str, bundle: Path | str, token: str, children: Children, timeout: float = 60) -> None:
    """Returns when the API server is ready. LabError when a part has ended, or after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            fetch(f"{url}/readyz", bundle=bundle, token=token, timeout=5)
        except (OSError, urllib.error.URLError) as error:
            children.check()
            if time.monotonic() > deadline:
                raise LabError(f"kube-apiserver is not ready after {timeout:.0f} s: {error}") from error
            time.sleep(0.02)
        else:
            return


def _kubeconfig(folder: Path, user: str, url: str, bundle: Path, token: str) -> Path:
    """Writes a kubeconfig; JSON is YAML."""
    path = folder / f"{user}.kubeconfig"
    path.write_bytes(
        msgspec.json.format(
            msgspec.json.encode(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "lab", "cluster": {"server": url, "certificate-authority": str(bundle)}}],
                    "users": [{"name": user, "user": {"token": token}}],
                    "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": user}}],
                    "current-context": "lab",
                }
            )
        )
        + b"\n"
    )
    path.chmod(0o600)
    return path
