"""Every setting of the controller: flag, then environment, then default. There is no file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What the controller's flags say; `main` declares the flags from these fields."""

    namespace: str = "certbotk8s"
    http01_listen: str = "0.0.0.0:8089"
    http01_port: int = 80
    nameservers: tuple[str, ...] = ()
    metrics_listen: str = "0.0.0.0:9402"
    workers: int = 16
    log_format: str = "json"
    log_level: str = "info"
