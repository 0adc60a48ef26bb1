"""The ingress controller of the lab."""

import time
import urllib.error
from pathlib import Path

import msgspec

from tests.lab.api import fetch
from tests.lab.cluster import Cluster
from tests.lab.errors import LabError
from tests.lab.network import Ports
from tests.lab.processes import Children


class Traefik(msgspec.Struct, frozen=True):
    """The ports of 127.0.0.1 that it serves."""

    http_port: int
    https_port: int
    api: str
    """URL of its own API, for a look at its routers (`/api/rawdata`)."""


def start_traefik(
    cluster: Cluster, bin_folder: Path, folder: Path, http_port: int, ports: Ports, children: Children
) -> Traefik:
    """Starts Traefik for Ingresses of class traefik; returns when it routes: its ports are open before that."""
    https_port, api_port = ports.take(), ports.take()
    token = folder / "traefik.token"
    token.write_text(cluster.tokens["traefik"])
    child = children.start(
        "traefik",
        [
            bin_folder / "traefik",
            f"--entrypoints.web.address=127.0.0.1:{http_port}",
            f"--entrypoints.websecure.address=127.0.0.1:{https_port}",
            "--entrypoints.websecure.http.tls=true",
            f"--entrypoints.traefik.address=127.0.0.1:{api_port}",
            "--ping=true",
            "--api.insecure=true",
            "--api.dashboard=false",  # its pages are no part of the Go module
            "--global.checknewversion=false",
            "--global.sendanonymoususage=false",
            "--providers.providersthrottleduration=100ms",  # 2 s by default: most of the time of an issuance
            "--providers.kubernetesingress=true",
            "--providers.kubernetesingress.ingressclass=traefik",
            "--providers.kubernetesingress.allowexternalnameservices=true",
            f"--providers.kubernetesingress.endpoint={cluster.url}",
            f"--providers.kubernetesingress.token={token}",
            f"--providers.kubernetesingress.certauthfilepath={cluster.bundle}",
        ],
    )
    for port in (http_port, https_port, api_port):
        child.wait_listening("127.0.0.1", port)
    traefik = Traefik(http_port=http_port, https_port=https_port, api=f"http://127.0.0.1:{api_port}/api")
    deadline = time.monotonic() + 60
    while True:
        try:
            fetch(f"{traefik.api}/rawdata", timeout=5)
        except (OSError, urllib.error.URLError) as error:
            child.check()
            if time.monotonic() > deadline:
                raise LabError(f"Traefik does not route after 60 s: {error}. Its log: {child.log}") from error
            time.sleep(0.02)
        else:
            return traefik
