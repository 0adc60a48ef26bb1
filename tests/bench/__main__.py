"""`make bench N=200 KEY=ecdsa`: N Certificates at once by HTTP-01, measured from the servers' side.

Requests are counted at the CA, writes in the API server's audit log, CPU and memory in /proc; the controller is not
asked. Figures of two machines, or of two runs on a busy one, say nothing to each other: compare in one run.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.lab.controller import Controller, install_crds
from tests.lab.lab import Lab, running_lab
from tests.site import CERTIFICATES, Site, wait_for


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far (proc(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mib(pid: int) -> float:
    """Resident memory of a process."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


@contextmanager
def stage() -> Iterator[tuple[Lab, Controller, Site]]:
    """A lab with a controller, a ready issuer and a namespace."""
    with running_lab() as running:
        lab = running.lab
        install_crds(lab)
        with Controller(lab, arguments=["--log-level=warning"]) as controller:
            controller.wait_ready()
            lab.api("/api/v1/namespaces", body={"metadata": {"name": "bench"}})
            Site(lab, lab.namespace).cluster_issuer("bench")
            yield lab, controller, Site(lab, "bench")


def measure(lab: Lab, controller: Controller, site: Site, count: int, key: str) -> dict[str, Any]:
    """Issue `count` Certificates with keys of that algorithm; the figures."""
    collection = f"{CERTIFICATES}/namespaces/{site.namespace}/certificates"
    # One alone first: it is a figure of its own, and warms everything up.
    site.certificate("warm", [f"warm-{key}.example.test"], "bench", privateKey={"algorithm": key})
    site.ready("warm")
    started = time.monotonic()
    site.certificate("alone", [f"alone-{key}.example.test"], "bench", privateKey={"algorithm": key})
    site.ready("alone")
    alone = time.monotonic() - started
    site.nothing_left()
    time.sleep(1)
    manifests = [
        site.certificate_manifest(f"c{n}", [f"c{n}-{key}.example.test"], "bench", privateKey={"algorithm": key})
        for n in range(count)
    ]
    mark, cpu = lab.mark(), cpu_seconds(controller.pid)
    started = time.monotonic()
    for manifest in manifests:
        site.create(collection, manifest)

    def done() -> bool:
        items: Any = lab.api(collection)["items"]
        ready = [each for each in items if each["metadata"]["name"].startswith("c") and _is_ready(each)]
        return len(ready) == count

    wait_for(done, f"{count} Certificates ready", timeout=max(60.0, count * 2.0), pause=0.2)
    seconds = time.monotonic() - started
    site.nothing_left()
    used = cpu_seconds(controller.pid) - cpu
    requests = [request for request in lab.acme_requests(mark) if not request.is_new_nonce]
    writes = lab.kube_writes(mark)
    figures = {
        "key": key,
        "certificates": count,
        "seconds": round(seconds, 1),
        "certificates per second": round(count / seconds, 1),
        "one alone, seconds": round(alone, 2),
        "orders": lab.orders(mark),
        "requests to the CA per certificate": round(len(requests) / count, 2),
        "writes per certificate": round(len(writes) / count, 2),
        "CPU ms per certificate": round(used / count * 1000, 1),
        "RSS MiB": round(rss_mib(controller.pid)),
    }
    print(f"  {dict(Counter(f'{w.verb} {w.resource}/{w.subresource}'.rstrip('/') for w in writes))}")
    for name in [f"c{n}" for n in range(count)] + ["warm", "alone"]:
        lab.api(site.certificate_path(name), method="DELETE")
        lab.api(site.secret_path(name), method="DELETE")
    return figures


def _is_ready(certificate: dict[str, Any]) -> bool:
    conditions = certificate.get("status", {}).get("conditions", [])
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def main() -> None:
    """Print the figures as a Markdown table, one column for each kind of key."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--key", choices=["ecdsa", "rsa", "both"], default="both")
    asked = parser.parse_args()
    keys = ["ECDSA", "RSA"] if asked.key == "both" else [asked.key.upper()]
    with stage() as (lab, controller, site):
        columns = [measure(lab, controller, site, asked.count, key) for key in keys]
    print("| | " + " | ".join(column.pop("key") for column in columns) + " |")
    print("| --- |" + " --- |" * len(columns))
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(str(column[name]) for column in columns) + " |")


if __name__ == "__main__":
    main()
