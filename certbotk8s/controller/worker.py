"""The workers: threads that drive reconciles, which are generators, one step after the other.

A reconcile that yields a `ports.Call` is put aside while a pool makes the call, and goes on with the answer on any
worker that is free. Its key counts as at work all the while, so that no key is ever worked on twice at once.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from certbotk8s.controller.pools import Pools
from certbotk8s.domain.errors import Conflict, PermanentError, TemporaryError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from certbotk8s.controller.workqueue import WorkQueue
    from certbotk8s.ports import Call, Clock, Key, Steps

log = logging.getLogger(__name__)

GRACE_SECONDS = 20.0


@dataclass(frozen=True)
class _Paused:
    """A reconcile that was put aside, and what its call brought."""

    steps: Steps
    answer: Any = None
    error: Exception | None = None


class Workers:
    """`count` threads that take keys from the queue.

    `reconcilers` gives for each `Key.kind` the generator function. What one returns is after how long to come back;
    a TemporaryError brings the key back after its `retry_after` or, without one, later with each failure; so does any
    other exception, which is a bug and logged with its traceback. `on_death` is called with a sentence when a thread
    ends by a bug of the driver itself. `fence` is called before every call that a reconcile yields and raises
    TemporaryError when this process must do nothing.
    """

    def __init__(
        self,
        queue: WorkQueue,
        reconcilers: Mapping[str, Callable[[Key], Steps]],
        clock: Clock,
        *,
        on_death: Callable[[str], None],
        fence: Callable[[], None] = lambda: None,
        count: int = 16,
        calls_per_pool: int = 8,
    ) -> None:
        self._queue = queue
        self._reconcilers = reconcilers
        self._clock = clock
        self._on_death = on_death
        self._fence = fence
        self._pools = Pools(clock, on_death=on_death, limit=calls_per_pool)
        self._waiter = threading.Condition()
        self._paused: dict[Key, _Paused] = {}  # put aside: waiting for the call, or ready to go on
        self._busy: dict[int, tuple[Key, float]] = {}
        self._alive = count
        self._threads = [
            threading.Thread(target=self._live, name=f"worker {number}", daemon=True) for number in range(count)
        ]

    def start(self) -> None:
        """Begin to work."""
        for thread in self._threads:
            thread.start()

    def stop(self, grace: float = GRACE_SECONDS) -> bool:
        """Take no new key; steps under way may end within `grace` seconds. Whether all did.

        A reconcile that waits for a call gets its answer and may go on until it asks for the next one, where it is
        closed: what it learnt is written by then.
        """
        self._queue.shut_down()
        deadline = self._clock.monotonic() + grace
        with self._waiter:
            while self._alive and (left := deadline - self._clock.monotonic()) > 0:
                self._clock.wait(self._waiter, left)
            in_time = not self._alive
        self._queue.abandon()
        self._pools.stop()
        with self._waiter:
            paused, self._paused = self._paused, {}
        for key, left_over in paused.items():
            self._close(key, left_over.steps)
        return in_time

    def stuck(self, seconds: float) -> str:
        """The object that a worker has been busy with for longer than that, or ""."""
        now = self._clock.monotonic()
        with self._waiter:
            late = [" ".join(_about(key).values()) for key, since in self._busy.values() if now - since > seconds]
        return ", ".join(sorted(late))

    def _live(self) -> None:
        try:
            while (key := self._queue.get()) is not None:
                with self._waiter:
                    self._busy[threading.get_ident()] = (key, self._clock.monotonic())
                self._work(key)
                with self._waiter:
                    del self._busy[threading.get_ident()]
        except BaseException:
            log.exception("%s died", threading.current_thread().name)
            self._on_death(f"{threading.current_thread().name} died")
        finally:
            with self._waiter:
                self._alive -= 1
                self._waiter.notify_all()

    def _work(self, key: Key) -> None:
        """One stretch of a reconcile: from its start or an answer to its end or the next call."""
        with self._waiter:
            paused = self._paused.pop(key, None)
        try:
            if paused is None:
                steps = self._reconcilers[key.kind](key)
                call = next(steps)
            elif paused.error is not None:
                steps = paused.steps
                call = steps.throw(paused.error)
            else:
                steps = paused.steps
                call = steps.send(paused.answer)
        except StopIteration as end:
            self._queue.forget(key)
            if end.value is not None:
                self._queue.add_after(key, end.value.total_seconds())
        except TemporaryError as error:
            level = logging.DEBUG if isinstance(error, Conflict) else logging.WARNING
            log.log(level, "%s", error, extra=_about(key))
            if error.retry_after:
                self._queue.add_after(key, error.retry_after.total_seconds())
            else:
                self._queue.add_rate_limited(key)
        except PermanentError as error:
            words = _about(key) | {"reason": str(error.reason)}
            log.error("%s", error, extra=words)  # noqa: TRY400 - words for the reader, no bug
            self._queue.add_rate_limited(key)
        except Exception:
            log.exception("A bug in the controller; this is tried again, later each time", extra=_about(key))
            self._queue.add_rate_limited(key)
        else:
            if self._queue.shutting_down:
                self._close(key, steps)
            else:
                self._put_aside(key, steps, call)
                return
        self._queue.done(key)

    def _put_aside(self, key: Key, steps: Steps, call: Call) -> None:
        def make() -> None:
            try:
                self._fence()
                answered = _Paused(steps, answer=call.function())
            except Exception as error:  # the reconcile's to judge
                answered = _Paused(steps, error=error)
            with self._waiter:
                if key not in self._paused:
                    return  # closed meanwhile
                self._paused[key] = answered
            self._queue.resume(key)

        with self._waiter:
            self._paused[key] = _Paused(steps)
        self._pools.submit(call.pool, make)

    def _close(self, key: Key, steps: Steps) -> None:
        try:
            steps.close()
        except Exception:
            log.exception("A bug in the controller, while this was closed", extra=_about(key))


def _about(key: Key) -> dict[str, str]:
    return {"kind": key.kind, "object": f"{key.namespace}/{key.name}" if key.namespace else key.name}
