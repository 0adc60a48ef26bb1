"""Every setting of the controller: flag, then environment (`CERTBOTK8S_X`), then default. There is no file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _setting(default: Any, text: str, *, environment: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": text, "environment": environment})


@dataclass(frozen=True)
class Settings:
    """What the controller's flags say; `main` declares the flags from these fields."""

    namespace: str = _setting(
        "certbotk8s",
        "Namespace of the controller: of its HTTP-01 Ingresses, and of the Secrets that ClusterIssuers name.",
        environment=("POD_NAMESPACE",),
    )
    http01_listen: str = _setting("0.0.0.0:8089", "Address and port where HTTP-01 challenges are answered.")
    http01_port: int = _setting(80, "Port where CAs, and the look before one is asked, connect for HTTP-01.")
    nameservers: tuple[str, ...] = _setting(
        (), "Name server (address or address:port) for own look-ups; may be given several times. Default: the system's."
    )
    issuer_servers: tuple[str, ...] = _setting(
        (), "Directory URL of a CA that Issuers of a namespace may use; may be given several times. Default: any."
    )
    allow_addresses: tuple[str, ...] = _setting(
        (),
        "Network (CIDR) that CAs and own look-ups may be in although it is link-local, a cloud's own or the cluster's "
        "Services; may be given several times.",
    )
    metrics_listen: str = _setting("0.0.0.0:9402", "Address and port of /metrics, /livez and /readyz.")
    workers: int = _setting(16, "Reconciles that may run at once.")
    leader_elect: bool = _setting(True, "Of several replicas one works, the others answer challenges and stand by.")
    lease_duration: int = _setting(15, "Seconds after which another replica takes the place of one that is silent.")
    identity: str = _setting(
        "",
        "Name of this replica in the Lease. A container that starts again in its Pod has its Lease back at once. "
        "Default: the host's name and a random part.",
        environment=("POD_NAME",),
    )
    log_format: str = _setting("json", "json or text.")
    log_level: str = _setting("info", "debug, info, warning or error.")
