"""What only etcd itself can show or do: how full it is, and the end of old revisions."""

from typing import Any

import msgspec

from tests.lab.api import fetch


class Etcd:
    """Its own API, in JSON (https://etcd.io/docs/v3.6/dev-guide/api_grpc_gateway/)."""

    def __init__(self, url: str) -> None:
        """`url` is that of `Lab.etcd`."""
        self._url = url

    def left(self) -> int:
        """Bytes until the file of its database is as long as its quota; less than none when it is full."""
        status = self._ask("maintenance/status")
        return int(status["dbSizeQuota"]) - int(status["dbSize"])

    def is_full(self) -> bool:
        """Whether it refuses writes for want of space: the alarm stands until `make_room`."""
        return bool(self._alarms())

    def compact(self) -> None:
        """Forgets every revision before the present one."""
        revision = self._ask("kv/range", key="AA==")["header"]["revision"]
        self._ask("kv/compaction", revision=revision, physical=True)

    def make_room(self) -> None:
        """Gives free what was deleted, and takes the alarm back, as its administrator does."""
        self.compact()
        self._ask("maintenance/defragment")
        for alarm in self._alarms():
            self._ask("maintenance/alarm", action="DEACTIVATE", **alarm)

    def _alarms(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._ask("maintenance/alarm", action="GET").get("alarms", [])
        return found

    def _ask(self, call: str, **body: object) -> dict[str, Any]:
        answer: dict[str, Any] = msgspec.json.decode(fetch(f"{self._url}/v3/{call}", body=body))
        return answer
