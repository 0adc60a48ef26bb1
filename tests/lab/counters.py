"""What reached the API server, read from its audit log."""

from pathlib import Path
from typing import NamedTuple

import msgspec

MUTATING = frozenset({"create", "update", "patch", "delete", "deletecollection"})


class _User(msgspec.Struct):
    username: str = ""  # a request with a wrong token has none


class _Object(msgspec.Struct, rename="camel"):
    resource: str = ""
    subresource: str = ""
    namespace: str = ""
    name: str = ""
    api_group: str = msgspec.field(name="apiGroup", default="")


class _Status(msgspec.Struct):
    code: int = 0


class KubeRequest(msgspec.Struct, rename="camel"):
    """One answered request, as the audit log has it."""

    stage: str
    verb: str
    user: _User
    request_uri: str = msgspec.field(name="requestURI")
    user_agent: str = ""
    object_ref: _Object = msgspec.field(default_factory=_Object)
    response_status: _Status = msgspec.field(default_factory=_Status)


class KubeWrite(NamedTuple):
    """A mutating request; "" where a part does not apply."""

    verb: str
    resource: str
    subresource: str
    namespace: str
    name: str


def read_audit_log(path: Path, since: int) -> list[KubeRequest]:
    """The requests answered since byte `since` of the log, oldest first, without a line that is half written."""
    try:
        with path.open("rb") as log:
            log.seek(since)
            data = log.read()
    except FileNotFoundError:  # made at the first request
        return []
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    requests = (_decode(line) for line in lines)
    # A watch has two lines: one when it starts to answer, one when it ends.
    return [request for request in requests if request.stage == "ResponseComplete"]


def write_of(request: KubeRequest) -> KubeWrite:
    """The part of a request that tests compare."""
    target = request.object_ref
    return KubeWrite(request.verb, target.resource, target.subresource, target.namespace, target.name)


_decode = msgspec.json.Decoder(KubeRequest).decode
