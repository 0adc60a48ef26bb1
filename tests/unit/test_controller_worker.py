"""The workers: generators driven over calls, failures brought back, an end in order."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest

from certbotk8s.controller.worker import Workers
from certbotk8s.controller.workqueue import WorkQueue
from certbotk8s.domain.errors import Conflict, PermanentError, TemporaryError
from certbotk8s.domain.reasons import Reason
from certbotk8s.ports import Call, Key, Steps, call
from tests.fakes.clock import FakeClock

SECONDS = 20.0
A, B = Key("Certificate", "shop", "a"), Key("Certificate", "shop", "b")

Reconcile = Callable[[Key], Steps]


class Crew:
    """Workers, their queue, and what happened."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.queue = WorkQueue(self.clock, spread=lambda: 0.0)
        self.deaths: list[str] = []
        self.log: list[str] = []
        self._workers: Workers | None = None

    def start(self, reconcile: Reconcile, *, count: int = 2, calls_per_pool: int = 8) -> Workers:
        self._workers = Workers(
            self.queue,
            {"Certificate": reconcile},
            self.clock,
            on_death=self.deaths.append,
            count=count,
            calls_per_pool=calls_per_pool,
        )
        self._workers.start()
        return self._workers

    def until(self, look: Callable[[], bool]) -> None:
        pause = threading.Event()
        for _ in range(int(SECONDS / 0.005)):
            if look():
                return
            pause.wait(0.005)
        raise AssertionError(f"never came true; log {self.log}, deaths {self.deaths}")

    def close(self) -> None:
        if self._workers is not None:
            assert self._workers.stop(grace=0.0) in (True, False)


@pytest.fixture
def crew() -> Iterator[Crew]:
    one = Crew()
    yield one
    one.close()
    assert one.deaths == []


def test_an_answer_goes_to_its_reconcile(crew: Crew) -> None:
    """A yielded call is made by its pool, and its answer is what `yield from call` gives. (Break: send None.)"""
    names: list[str] = []

    def ask() -> int:
        names.append(threading.current_thread().name)
        return 42

    def reconcile(key: Key) -> Steps:
        answer = yield from call("acct/1", ask)
        crew.log.append(f"{key.name}: {answer}")
        answer = yield from call("acct/1", lambda: answer + 1)
        crew.log.append(f"{key.name}: {answer}")
        return None

    crew.start(reconcile)
    crew.queue.add(A)
    crew.until(lambda: crew.log == ["a: 42", "a: 43"])
    assert names == ["pool acct/1"]


def test_an_error_goes_to_its_reconcile(crew: Crew) -> None:
    """What a call raises is raised where it was yielded, and can be caught there. (Break: log it and go on.)"""

    def refuse() -> None:
        raise TemporaryError("the CA is away")

    def reconcile(key: Key) -> Steps:
        try:
            yield from call("acct/1", refuse)
        except TemporaryError as error:
            crew.log.append(str(error))
        return None

    crew.start(reconcile)
    crew.queue.add(A)
    crew.until(lambda: crew.log == ["the CA is away"])


def test_a_call_holds_no_worker(crew: Crew) -> None:
    """While calls hang, the one worker goes on with other keys. (Break: make the call on the worker's thread.)"""
    hanging, go_on = threading.Semaphore(0), threading.Event()

    def hang() -> None:
        hanging.release()
        go_on.wait(SECONDS)

    def reconcile(key: Key) -> Steps:
        if key is not B:
            yield from call("acct/1", hang)
        crew.log.append(key.name)
        return None

    crew.start(reconcile, count=1)
    crew.queue.add(A)
    assert hanging.acquire(timeout=SECONDS)
    crew.queue.add(B)
    crew.until(lambda: crew.log == ["b"])
    go_on.set()
    crew.until(lambda: crew.log == ["b", "a"])


def test_a_key_is_never_at_work_twice(crew: Crew) -> None:
    """A key added while its call is under way starts again only after its end. (Break: done when put aside.)"""
    hanging, go_on = threading.Semaphore(0), threading.Semaphore(0)

    def hang() -> None:
        hanging.release()
        go_on.acquire(timeout=SECONDS)

    def reconcile(key: Key) -> Steps:
        crew.log.append("begin")
        yield from call("acct/1", hang)
        crew.log.append("end")
        return None

    crew.start(reconcile, count=4)
    crew.queue.add(A)
    assert hanging.acquire(timeout=SECONDS)
    for _ in range(3):
        crew.queue.add(A)
    crew.clock.advance(1)
    assert crew.log == ["begin"]
    go_on.release(2)
    crew.until(lambda: len(crew.log) == 4)
    assert crew.log == ["begin", "end", "begin", "end"]


def test_a_pool_is_bounded(crew: Crew) -> None:
    """No more than the limit of calls of one pool run at once; another pool is not held up. (Break: no limit.)"""
    running, go_on = threading.Semaphore(0), threading.Event()

    def hang() -> None:
        running.release()
        go_on.wait(SECONDS)

    def reconcile(key: Key) -> Steps:
        yield Call("slow" if key.name != "quick" else "other", hang if key.name != "quick" else lambda: None)
        crew.log.append(key.name)
        return None

    crew.start(reconcile, calls_per_pool=2)
    for number in range(5):
        crew.queue.add(Key("Certificate", "shop", str(number)))
    assert running.acquire(timeout=SECONDS)
    assert running.acquire(timeout=SECONDS)
    crew.queue.add(Key("Certificate", "shop", "quick"))
    crew.until(lambda: crew.log == ["quick"])
    assert not running.acquire(blocking=False)
    go_on.set()
    crew.until(lambda: len(crew.log) == 6)


def test_idle_threads_end(crew: Crew) -> None:
    """The threads of a pool go when nothing was asked for a minute, and come again. (Break: they wait for ever.)"""

    def reconcile(key: Key) -> Steps:
        yield from call("acct/1", lambda: None)
        crew.log.append("called")
        return None

    workers = crew.start(reconcile)
    for count in (1, 2):
        crew.queue.add(A)
        crew.until(lambda wanted=count: len(crew.log) == wanted)  # type: ignore[misc]
        assert len(workers._pools) == 1
        crew.clock.advance(61)
        crew.until(lambda: len(workers._pools) == 0)


def test_what_is_returned_brings_it_back(crew: Crew) -> None:
    """A returned timedelta is when the key comes back; None: never by itself. (Break: add it at once.)"""

    def reconcile(key: Key) -> Steps:
        crew.log.append(key.name)
        yield from ()
        return timedelta(hours=1) if key is A else None

    crew.start(reconcile, count=1)
    crew.queue.add(A)
    crew.queue.add(B)
    crew.until(lambda: crew.log == ["a", "b"])
    crew.clock.advance(3599)
    assert crew.log == ["a", "b"]
    crew.clock.advance(2)
    crew.until(lambda: crew.log == ["a", "b", "a"])


@pytest.mark.parametrize(
    ("failure", "delay", "level", "words"),
    [
        (TemporaryError("the CA is away"), 0.005, logging.WARNING, "the CA is away"),
        (
            TemporaryError("slow down", retry_after=timedelta(seconds=90)),
            90,
            logging.WARNING,
            "slow down",
        ),
        (Conflict("it changed"), 0.005, logging.DEBUG, "it changed"),
        (
            PermanentError(Reason.INVALID_SPEC, "no such name"),
            0.005,
            logging.ERROR,
            "no such name",
        ),
        (ZeroDivisionError("x"), 0.005, logging.ERROR, "A bug in the controller"),
    ],
)
def test_failures_come_back(
    crew: Crew, caplog: pytest.LogCaptureFixture, failure: Exception, delay: float, level: int, words: str
) -> None:
    """Whatever escapes is logged with the object's name and tried again at its time. (Break: only TemporaryError.)"""
    caplog.set_level(logging.DEBUG)

    def reconcile(key: Key) -> Steps:
        crew.log.append("tried")
        yield from ()
        if len(crew.log) == 1:
            raise failure
        return None

    crew.start(reconcile, count=1)
    crew.queue.add(A)
    crew.until(lambda: crew.queue._due != {})
    assert crew.queue._due == {A: delay}
    record = next(record for record in caplog.records if record.name.startswith("certbotk8s"))
    assert record.levelno == level
    assert record.getMessage().startswith(words)
    assert (record.__dict__["kind"], record.__dict__["object"]) == ("Certificate", "shop/a")
    assert (record.exc_info is not None) == isinstance(failure, ZeroDivisionError)
    crew.clock.advance(delay)
    crew.until(lambda: len(crew.log) == 2)


def test_success_forgets_failures(crew: Crew) -> None:
    """After a success the next failure is retried as soon as the first was. (Break: forget is not called.)"""
    outcomes = iter([True, True, True, False, True])

    def reconcile(key: Key) -> Steps:
        yield from ()
        crew.log.append("tried")
        if next(outcomes):
            raise TemporaryError("not now")
        return None

    crew.start(reconcile, count=1)
    crew.queue.add(A)
    for tries in range(1, 4):
        crew.until(lambda wanted=tries: len(crew.log) == wanted and A in crew.queue._due)  # type: ignore[misc]
        crew.clock.advance(crew.queue._due[A] - crew.clock.monotonic())
    crew.until(lambda: len(crew.log) == 4)
    crew.queue.add(A)
    crew.until(lambda: len(crew.log) == 5 and A in crew.queue._due)
    assert crew.queue._due[A] - crew.clock.monotonic() == pytest.approx(0.005)


def test_stop_waits_for_steps_under_way(crew: Crew) -> None:
    """At a stop, a call's answer is still worked on, the next call is not made, and no new key begins.

    (Break: stop abandons at once.)
    """
    hanging, go_on = threading.Event(), threading.Event()

    def hang() -> None:
        hanging.set()
        go_on.wait(SECONDS)

    def reconcile(key: Key) -> Steps:
        try:
            crew.log.append(f"{key.name} begins")
            yield from call("acct/1", hang)
            crew.log.append("answer kept")
            yield from call("acct/1", lambda: crew.log.append("a call after the stop"))
        finally:
            crew.log.append("closed")
        return None

    workers = crew.start(reconcile, count=1)
    crew.queue.add(A)
    assert hanging.wait(SECONDS)
    ended: list[bool] = []
    stopping = threading.Thread(target=lambda: ended.append(workers.stop(grace=20.0)))
    stopping.start()
    crew.until(lambda: crew.queue.shutting_down)
    crew.queue.add(B)
    go_on.set()
    stopping.join(SECONDS)
    assert ended == [True]
    assert crew.log == ["a begins", "answer kept", "closed"]


def test_stop_does_not_wait_for_ever(crew: Crew) -> None:
    """After the grace a reconcile that still waits is closed, and its late answer harms nobody.

    (Break: stop joins without a limit.)
    """
    hanging, go_on, late = threading.Event(), threading.Event(), threading.Event()

    def hang() -> None:
        hanging.set()
        go_on.wait(SECONDS)
        late.set()

    def reconcile(key: Key) -> Steps:
        try:
            yield from call("acct/1", hang)
            crew.log.append("went on")
        finally:
            crew.log.append("closed")
        return None

    workers = crew.start(reconcile, count=2)
    crew.queue.add(A)
    assert hanging.wait(SECONDS)
    ended: list[bool] = []
    stopping = threading.Thread(target=lambda: ended.append(workers.stop()))
    stopping.start()
    crew.until(lambda: crew.queue.shutting_down)
    crew.clock.advance(19)
    assert stopping.is_alive()
    crew.clock.advance(2)
    stopping.join(SECONDS)
    assert ended == [False]
    go_on.set()
    assert late.wait(SECONDS)
    assert crew.log == ["closed"]


def test_a_stuck_worker_shows(crew: Crew) -> None:
    """A step that does not end is named; one that waits for a call is not. (Break: count from the first step.)"""
    at_work, go_on = threading.Event(), threading.Event()

    def reconcile(key: Key) -> Steps:
        if key is A:
            at_work.set()
            go_on.wait(SECONDS)
        yield from call("acct/1", lambda: go_on.wait(SECONDS))
        return None

    workers = crew.start(reconcile)
    crew.queue.add(A)
    crew.queue.add(B)
    assert at_work.wait(SECONDS)
    assert workers.stuck(300) == ""
    crew.clock.advance(301)
    crew.until(lambda: workers.stuck(300) == "Certificate shop/a")
    go_on.set()
    crew.until(lambda: workers.stuck(300) == "")


def test_a_dead_driver_is_told(crew: Crew, caplog: pytest.LogCaptureFixture) -> None:
    """What is no Exception ends the thread, and who must end the process is told. (Break: swallow BaseException.)"""

    def reconcile(key: Key) -> Steps:
        yield from ()
        raise SystemExit

    def quit() -> None:
        raise SystemExit

    def reconcile_call(key: Key) -> Steps:
        yield from call("acct/1", quit)
        return None

    crew.start(lambda key: (reconcile if key is A else reconcile_call)(key), count=2)
    crew.queue.add(A)
    crew.queue.add(B)
    crew.until(lambda: len(crew.deaths) == 2)
    assert sorted(crew.deaths)[0] == "a thread of pool acct/1 died"
    assert sorted(crew.deaths)[1].startswith("worker ")
    crew.deaths.clear()
