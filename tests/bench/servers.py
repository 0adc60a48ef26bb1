"""What the benchmark reads: from the machine, from etcd, from the API server's audit log; never from the controller."""

from __future__ import annotations

import os
import time
from datetime import datetime
from pathlib import Path

import msgspec

from tests.lab.api import fetch
from tests.lab.counters import MUTATING
from tests.lab.lab import Lab

NEXT_KEY = "-next-key"
_HASH = len("-01234567")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far (proc(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy_seconds() -> float:
    """CPU time that everything on the machine has used so far (proc(5), /proc/stat: all but idle and iowait)."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def process_status(pid: int, name: str) -> int:
    """A number of /proc/PID/status: VmRSS and VmHWM in KiB, Threads."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def host() -> dict[str, object]:
    """The machine, by what tells how fast it may be."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {"cores": os.cpu_count(), "cpu": model}


def etcd_bytes(lab: Lab) -> int:
    """What etcd's data take, by its own metrics, after its history was compacted."""
    arguments = Path(f"/proc/{lab.pids['etcd']}/cmdline").read_text().split("\0")
    url = next(a.partition("=")[2] for a in arguments if a.startswith("--listen-client-urls="))
    answer = fetch(f"{url}/v3/kv/range", method="POST", body={"key": "MA==", "count_only": True})
    revision = msgspec.json.decode(answer)["header"]["revision"]
    fetch(f"{url}/v3/kv/compaction", method="POST", body={"revision": revision, "physical": True})
    fetch(f"{url}/v3/maintenance/defragment", method="POST", body={})
    time.sleep(0.5)  # five commits of its backend, after which the metric is set anew
    metrics = fetch(f"{url}/metrics").decode().splitlines()
    name = "etcd_mvcc_db_total_size_in_use_in_bytes "
    return int(float(next(line for line in metrics if line.startswith(name)).split()[1]))


class _Object(msgspec.Struct):
    resource: str = ""
    subresource: str = ""
    namespace: str = ""
    name: str = ""


class _Answer(msgspec.Struct):
    code: int = 0


class _User(msgspec.Struct):
    username: str = ""


class _Line(msgspec.Struct, rename="camel"):
    stage: str
    verb: str
    user: _User
    request_received_timestamp: datetime
    stage_timestamp: datetime
    object_ref: _Object = msgspec.field(default_factory=_Object)
    response_status: _Answer = msgspec.field(default_factory=_Answer)


class Timeline(msgspec.Struct):
    """When the API server answered what was written for one Certificate; `statuses` are the writes of its status."""

    created: datetime
    key: datetime | None = None
    secret: datetime | None = None
    statuses: list[datetime] = msgspec.field(default_factory=list)

    @property
    def ready(self) -> datetime | None:
        """When the status was written that followed the tls Secret."""
        after = [time for time in self.statuses if self.secret and time >= self.secret]
        return after[0] if after else None

    def stages(self) -> dict[str, float]:
        """Seconds from one durable step to the next; a write that shows a lasting state may be taken for a step."""
        assert self.key
        assert self.secret
        assert self.ready
        ordered, chosen = self.statuses[:2]
        finalizing = max(time for time in self.statuses if time <= self.secret)
        times = {
            "key stored": self.key,
            "order placed": ordered,
            "challenge chosen": chosen,
            "served, validated": finalizing,
            "issued, Secret written": self.secret,
            "Ready": self.ready,
        }
        before, found = self.created, {}
        for name, moment in times.items():
            found[name] = (moment - before).total_seconds()
            before = moment
        return found


class Record:
    """The audit log from now on: timelines of the Certificates of one namespace, and the controller's requests."""

    def __init__(self, lab: Lab, namespace: str) -> None:
        self.timelines: dict[str, Timeline] = {}
        self.reads = 0
        self.writes = 0
        self._lab = lab
        self._namespace = namespace
        self._offset = lab.mark().audit

    def read(self) -> None:
        """Take in what was written since the last time."""
        with Path(self._lab.audit_log).open("rb") as log:
            log.seek(self._offset)
            data = log.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        for raw in data[:end].splitlines():
            line = _decode(raw)
            if line.stage == "ResponseComplete" and line.object_ref.resource != "leases":
                self._take(line)

    def _take(self, line: _Line) -> None:
        of, verb = line.object_ref, line.verb
        if line.user.username == "certbotk8s":
            self.writes += verb in MUTATING
            self.reads += verb in {"get", "list"}
        if of.namespace != self._namespace or line.response_status.code >= 300:
            return
        if (verb, of.resource) == ("create", "certificates"):
            self.timelines[of.name] = Timeline(line.request_received_timestamp)
        elif (verb, of.resource, of.subresource) == ("update", "certificates", "status"):
            self.timelines[of.name].statuses.append(line.stage_timestamp)
        elif (verb, of.resource) == ("create", "secrets") and of.name.endswith(NEXT_KEY):
            self.timelines[of.name[: -len(NEXT_KEY) - _HASH]].key = line.stage_timestamp
        elif (verb, of.resource) == ("create", "secrets") and of.name in self.timelines:
            self.timelines[of.name].secret = line.stage_timestamp


_decode = msgspec.json.Decoder(_Line).decode
