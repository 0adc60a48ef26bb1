"""The machine's clocks; nothing else in the project reads them."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from threading import Condition as Waiter


class SystemClock:
    """`ports.Clock` on the machine."""

    def now(self) -> datetime:
        """UTC wall clock."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """CLOCK_BOOTTIME counts while the machine is suspended; where there is none (macOS), the monotonic clock."""
        return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()

    def wait(self, waiter: Waiter, timeout: float | None) -> None:
        """Wait on a held Condition. A wait is cut to a minute, so that one over a suspend is noticed soon after."""
        waiter.wait(60.0 if timeout is None else min(timeout, 60.0))
