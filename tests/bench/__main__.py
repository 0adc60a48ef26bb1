"""`make bench N=200 KEY=ecdsa`: the figures of N Certificates at once, from the servers' side, beside a bare client's.

Requests are counted at the CA, writes and times in the API server's audit log, CPU and memory in /proc, bytes by etcd;
the controller is not asked. AGAINST=folder measures the controller of another checkout in turns with this one's: only
what was measured in one run can be compared.
"""

from __future__ import annotations

import argparse
import os
import secrets
from pathlib import Path

from tests.bench.floor import floor
from tests.bench.issuance import measure
from tests.bench.page import markdown, results, write
from tests.lab.controller import ROOT, Controller, install_crds
from tests.lab.lab import Lab
from tests.site import Site

PAGES = ROOT / "docs/benchmarks"


def ready_issuer(lab: Lab) -> str:
    """The name of a ClusterIssuer with an account at the lab's CA, which every controller started later takes up."""
    install_crds(lab)
    with Controller(lab) as controller:
        controller.wait_ready()
        name = Site(lab, lab.namespace).cluster_issuer(f"bench-{secrets.token_hex(3)}")
        controller.stop()
    return name


def main() -> None:
    """Measure, print the page and keep it."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--key", choices=["ecdsa", "rsa", "both"], default="both")
    parser.add_argument("--rounds", type=int, default=1, help="measure everything that often; the page has medians")
    parser.add_argument("--against", type=Path, help="another checkout, measured in turns with this one")
    parser.add_argument("--pages", type=Path, default=PAGES, help="folder for the page")
    asked = parser.parse_args()
    keys = ["ECDSA", "RSA"] if asked.key == "both" else [asked.key.upper()]
    trees = [asked.against.absolute(), ROOT] if asked.against else [ROOT]
    lab = Lab.load(os.environ["CERTBOTK8S_LAB"])
    issuer = ready_issuer(lab)
    floors = {key: floor(lab, asked.count, key) for key in keys}
    measurements = [
        measure(lab, issuer, asked.count, key, tree) for _ in range(asked.rounds) for key in keys for tree in trees
    ]
    found = results(asked.count, measurements, floors)
    print(markdown(found))
    print(f"kept in {write(found, asked.pages)}")


if __name__ == "__main__":
    main()
