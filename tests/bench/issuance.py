"""N Certificates at once by HTTP-01, and one alone, through a controller of their own."""

from __future__ import annotations

import os
import secrets
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import urllib3

from tests.bench.servers import Record, Timeline, busy_seconds, cpu_seconds, etcd_bytes, process_status
from tests.lab.acme import NEW_ORDER
from tests.lab.controller import ROOT, Controller
from tests.lab.lab import Lab
from tests.site import CERTIFICATES, Site, wait_for

ALONE = 5
CORES = os.cpu_count() or 1
_APPLIERS = 8
# Status is written four times in an issuance; what is more shows a state that lasts over a second.
STATUS_WRITES = 4
_ORDER = "/my-order/"
# An order is asked for once after the answer to its challenge and once after finalize; Pebble takes its time for both.
_ORDER_READS = 2


class Measurement(msgspec.Struct):
    """What one run has shown. `figures` are of the controller; the others say where time and CPU went."""

    tree: str
    key: str
    figures: dict[str, float]
    cpu: dict[str, float]
    """Milliseconds per certificate, by program."""
    stages: dict[str, tuple[float, float]]
    """Seconds by stage: median, 95th percentile."""


def median(measurements: Sequence[Measurement]) -> Measurement:
    """Several runs of the same as one: the median of each figure."""

    def of(tables: Sequence[dict[str, float]]) -> dict[str, float]:
        return {name: round(statistics.median(table[name] for table in tables), 3) for name in tables[0]}

    return Measurement(
        measurements[0].tree,
        measurements[0].key,
        of([each.figures for each in measurements]),
        of([each.cpu for each in measurements]),
        {
            name: (
                round(statistics.median(each.stages[name][0] for each in measurements), 3),
                round(statistics.median(each.stages[name][1] for each in measurements), 3),
            )
            for name in measurements[0].stages
        },
    )


def measure(lab: Lab, issuer: str, count: int, key: str, tree: Path) -> Measurement:
    """Issue `count` Certificates with keys of that algorithm by the controller of that tree."""
    environment = {"PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}
    with Controller(lab, arguments=["--log-level=warning"], environment=environment) as controller:
        controller.wait_ready()
        name = f"bench-{secrets.token_hex(3)}"
        lab.api("/api/v1/namespaces", body={"metadata": {"name": name}})
        try:
            found = _measure(lab, controller, _Tenant(lab, name, issuer, key), count)
        finally:
            controller.stop()
            Site(lab, name).delete(f"/api/v1/namespaces/{name}")
    return Measurement("this checkout" if tree == ROOT else tree.name, key, *found)


class _Tenant(Site):
    """Applies Certificates over one connection, as kubectl does with a file of many."""

    def __init__(self, lab: Lab, namespace: str, issuer: str, key: str) -> None:
        super().__init__(lab, namespace)
        self._issuer = issuer
        self._key = key
        self._pool = urllib3.PoolManager(maxsize=_APPLIERS, ca_certs=lab.api_ca_bundle)

    def ask(self, names: Sequence[str]) -> None:
        """Create a Certificate for each name, several at a time: the API server is slow while it is busy with them."""
        url = f"{self.lab.api_server}{CERTIFICATES}/namespaces/{self.namespace}/certificates"
        headers = {"Authorization": f"Bearer {self.lab.api_token}", "Content-Type": "application/json"}

        def create(name: str) -> int:
            host = f"{name}.{self.namespace}.example.test"
            manifest = self.certificate_manifest(name, [host], self._issuer, privateKey={"algorithm": self._key})
            return self._pool.request("POST", url, body=msgspec.json.encode(manifest), headers=headers).status

        with ThreadPoolExecutor(_APPLIERS) as threads:
            assert set(threads.map(create, names)) == {201}

    def issue(self, names: Sequence[str]) -> Record:
        """Create Certificates and return when all are Ready, nothing is left of their issuance, and all is told."""
        record = Record(self.lab, self.namespace)

        def done() -> bool:
            record.read()
            return len([each for each in record.timelines.values() if each.ready]) == len(names)

        self.ask(names)
        wait_for(done, f"{len(names)} Certificates Ready", timeout=60.0 + 2 * len(names), pause=0.2)
        self.nothing_left()
        self._quiet(record)
        items: Any = self.lab.api(f"{CERTIFICATES}/namespaces/{self.namespace}/certificates")["items"]
        assert all(_is_ready(each) for each in items), "a Certificate with a Secret is not Ready"
        return record

    def _quiet(self, record: Record) -> None:
        """Wait until the controller writes no more: Events come later than what they tell."""

        def quiet() -> bool:
            before = record.writes
            self.lab.mark()  # what was answered is in the audit log by then
            record.read()
            return record.writes == before

        wait_for(quiet, "an end of the controller's writes", pause=0.5)


def _measure(
    lab: Lab, controller: Controller, tenant: _Tenant, count: int
) -> tuple[dict[str, float], dict[str, float], dict[str, tuple[float, float]]]:
    tenant.issue(["warm"])
    alone = [_seconds(tenant.issue([f"alone-{n}"]).timelines.values()) for n in range(ALONE)]
    etcd = etcd_bytes(lab)
    time.sleep(1)
    programs = {"the benchmark": os.getpid(), **lab.pids, "controller": controller.pid}
    before, busy, started = {name: cpu_seconds(pid) for name, pid in programs.items()}, busy_seconds(), time.monotonic()
    mark = lab.mark()
    record = tenant.issue([f"c{n}" for n in range(count)])
    length, busy = time.monotonic() - started, busy_seconds() - busy
    used = {name: cpu_seconds(pid) - before[name] for name, pid in programs.items()}
    timelines = list(record.timelines.values())
    seconds = _seconds(timelines)
    waits = [(each.ready - each.created).total_seconds() for each in timelines if each.ready]
    shown = sum(max(len(each.statuses) - STATUS_WRITES, 0) for each in timelines)
    requests = Counter(each.path for each in lab.acme_requests(mark) if not each.is_new_nonce)
    polls = max(requests[_ORDER] - _ORDER_READS * count, 0)
    figures = {
        "certificates per second": count / seconds,
        "one alone, seconds from apply to Ready": statistics.median(alone),
        "requests to the CA": (requests.total() - polls) / count,
        "polls of an order beyond these": polls / count,
        "orders placed": requests[NEW_ORDER],
        "certificates issued by the CA": lab.acme.issued(mark.acme),
        "writes to Kubernetes": (record.writes - shown) / count,
        "writes of a state that lasts over 1 s": shown / count,
        "reads from Kubernetes": record.reads / count,
        "CPU of the controller, ms": used["controller"] / count * 1000,
        "etcd left, KiB": (etcd_bytes(lab) - etcd) / count / 1024,
        "controller RSS, MiB": process_status(controller.pid, "VmRSS") / 1024,
        "controller threads": process_status(controller.pid, "Threads"),
        "from apply to Ready, median seconds": statistics.median(waits),
        "from apply to Ready, longest": max(waits),
        "CPU of the machine taken by other programs, %": 100 * (busy - sum(used.values())) / length / CORES,
    }
    stages = [each.stages() for each in timelines]
    return (
        {name: round(figure, 2) for name, figure in figures.items()},
        {name: round(second / count * 1000, 1) for name, second in used.items()},
        {name: _spread([each[name] for each in stages]) for name in stages[0]},
    )


def _seconds(timelines: Iterable[Timeline]) -> float:
    """From the first Certificate's arrival at the API server to the last one's Ready."""
    found = list(timelines)
    last = max(each.ready for each in found if each.ready)
    return float((last - min(each.created for each in found)).total_seconds())


def _spread(seconds: list[float]) -> tuple[float, float]:
    ordered = sorted(seconds)
    return round(statistics.median(ordered), 3), round(ordered[min(len(ordered) * 95 // 100, len(ordered) - 1)], 3)


def _is_ready(certificate: dict[str, Any]) -> bool:
    conditions = certificate.get("status", {}).get("conditions", [])
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)
