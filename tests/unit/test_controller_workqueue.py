"""The work queue: no key twice at once, none lost, the earliest due time counts."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from certbotk8s.clock import SystemClock
from certbotk8s.controller.workqueue import FIRST_DELAY, LONGEST_DELAY, WorkQueue
from certbotk8s.ports import Key
from tests.fakes.clock import FakeClock

A, B, C = (Key("Certificate", "shop", name) for name in "abc")
SECONDS = 20.0


def made() -> tuple[FakeClock, WorkQueue]:
    clock = FakeClock()
    return clock, WorkQueue(clock, spread=lambda: 0.0)


def test_a_key_is_wanted_once() -> None:
    """Keys come out in the order of their first add, each once. (Break: add does not look into the dirty set.)"""
    _, queue = made()
    for key in (A, B, A, C, B):
        queue.add(key)
    assert len(queue) == 3
    assert [queue.get(), queue.get(), queue.get()] == [A, B, C]
    assert len(queue) == 0


def test_added_while_at_work_comes_once_more() -> None:
    """Adds during the work bring the key back once, after `done`. (Break: done does not look into the dirty set.)"""
    _, queue = made()
    queue.add(A)
    assert queue.get() == A
    queue.add(A)
    queue.add(A)
    assert len(queue) == 0
    queue.done(A)
    assert len(queue) == 1
    assert queue.get() == A
    queue.done(A)
    assert len(queue) == 0


def test_the_earliest_due_time_counts() -> None:
    """A later due time does not push an earlier one back, an earlier one replaces it. (Break: the last one counts.)"""
    clock, queue = made()
    queue.add_after(A, 10)
    queue.add_after(A, 100)
    queue.add_after(B, 100)
    queue.add_after(B, 10)
    queue.add_after(C, 20)
    clock.advance(10)
    assert [queue.get(), queue.get()] == [A, B]
    queue.done(A)
    queue.done(B)
    clock.advance(10)
    assert queue.get() == C
    clock.advance(1000)
    queue.add_after(C, 1)
    queue.add_after(A, 0)
    assert queue.get() == A
    assert len(queue) == 0


def test_a_waiting_worker_notices_an_earlier_time() -> None:
    """A worker that waits for a far due time takes one that becomes due before. (Break: add_after wakes nobody.)"""
    queue = WorkQueue(SystemClock())  # the fake one wakes everybody
    queue.add_after(A, 1000)
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(queue.get) for _ in range(2)]
        while len(queue._waiter._waiters) < 2:  # type: ignore[attr-defined]
            pass
        queue.add_after(B, 0.01)
        queue.add_after(C, 0.005)
        assert {one.result(SECONDS) for one in waiting} == {B, C}


def test_many_earlier_times_keep_the_heap_small() -> None:
    """Due times that were overruled do not pile up. (Break: leave out the compaction.)"""
    _, queue = made()
    for number in range(10_000):
        queue.add_after(A, 100_000 - number)
    assert len(queue._heap) < 100


def test_failures_are_spaced_out() -> None:
    """The delay of a key doubles up to 1000 s; another key's does not; forget begins anew. (Break: one counter.)"""
    clock, queue = made()
    delays = []
    for _ in range(25):
        queue.add_rate_limited(A)
        delays.append(queue._due[A] - clock.monotonic())
        clock.advance(delays[-1])
        assert queue.get() == A
        queue.done(A)
    assert delays[:10] == pytest.approx([FIRST_DELAY * 2**number for number in range(10)])
    assert delays[-1] == pytest.approx(LONGEST_DELAY)
    queue.add_rate_limited(B)
    assert queue._due[B] - clock.monotonic() < 0.01
    queue.forget(A)
    queue.add_rate_limited(A)
    assert queue._due[A] - clock.monotonic() < 0.01


def test_delays_are_spread() -> None:
    """Keys that fail together do not all come back together. (Break: the spread is not used.)"""
    clock = FakeClock()
    numbers = iter([0.0, 1.0])
    queue = WorkQueue(clock, spread=lambda: next(numbers))
    queue.add_rate_limited(A)
    queue.add_rate_limited(B)
    assert queue._due[A] > queue._due[B] > clock.monotonic()


def test_resumed_work_goes_first() -> None:
    """Work that was put aside comes before keys that wait. (Break: resume appends to the queue.)"""
    _, queue = made()
    queue.add(A)
    assert queue.get() == A
    queue.add(B)
    queue.add(A)
    queue.resume(A)
    assert [queue.get(), queue.get()] == [A, B]
    queue.done(A)
    assert queue.get() == A


def test_what_has_begun_goes_before_what_is_new() -> None:
    """A key that waited for a moment is next, one that waited for long has its place among the new, each comes once.

    Mutations: `_next` looks into the queue of the new first; a key that waits in both is given out twice.
    """
    clock, queue = made()
    queue.add_after(B, 1)
    queue.add_after(C, 1000)
    clock.advance(1000)
    queue.add(A)
    queue.add(B)  # its own write wakes it too
    assert queue.get() == B
    queue.done(B)
    assert len(queue) == 2
    assert [queue.get(), queue.get()] == [A, C]
    queue.done(A)
    queue.add(B)
    assert queue.get() == B
    assert len(queue) == 0


def test_shut_down_lets_work_under_way_end() -> None:
    """After shut_down no key is given out but resumed ones, and `get` ends with the last. (Break: get ends at once.)"""
    clock, queue = made()
    for key in (A, B, C):
        queue.add(key)
    assert [queue.get(), queue.get()] == [A, B]
    queue.shut_down()
    queue.add(A)
    queue.add_after(A, 1)
    clock.advance(10)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(queue.get)
        queue.resume(A)
        assert waiting.result(SECONDS) == A
        last = pool.submit(queue.get)
        queue.done(A)
        queue.done(B)
        assert last.result(SECONDS) is None


def test_abandon_ends_every_wait() -> None:
    """`abandon` ends `get` although work is still under way. (Break: it notifies nobody and sets nothing.)"""
    _, queue = made()
    queue.add(A)
    assert queue.get() == A
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(queue.get) for _ in range(3)]
        queue.abandon()
        assert [one.result(SECONDS) for one in waiting] == [None, None, None]


def test_oldest() -> None:
    """`oldest` is how long the key that was wanted first has waited. (Break: the age of the newest.)"""
    clock, queue = made()
    assert queue.oldest() == 0.0
    queue.add(A)
    clock.advance(7)
    queue.add(B)
    clock.advance(1)
    assert queue.oldest() == 8.0


def test_threads_share_it() -> None:
    """Sixteen workers and many adds: no key is at work twice at once, and the last add of each is seen.

    (Break: get does not mark the key as at work.)
    """
    queue = WorkQueue(FakeClock())
    keys = [Key("Certificate", "shop", str(number)) for number in range(20)]
    wanted, seen = dict.fromkeys(keys, 0), dict.fromkeys(keys, 0)
    lock, at_work, twice = threading.Lock(), set[Key](), list[Key]()

    def work() -> None:
        while (key := queue.get()) is not None:
            with lock:
                if key in at_work:
                    twice.append(key)
                at_work.add(key)
            seen[key] = wanted[key]
            with lock:
                at_work.discard(key)
            queue.done(key)

    with ThreadPoolExecutor(16) as pool:
        workers = [pool.submit(work) for _ in range(16)]
        for number in range(5000):
            key = keys[number % len(keys)]
            wanted[key] = number
            queue.add(key)
        pause = threading.Event()
        for _ in range(int(SECONDS / 0.01)):
            if seen == wanted:
                break
            pause.wait(0.01)
        queue.shut_down()
        for worker in workers:
            worker.result(SECONDS)
    assert twice == []
    assert seen == wanted


class Machine(RuleBasedStateMachine):
    """The queue against a model: sets of keys, and a dict of due times."""

    keys = st.sampled_from([A, B, C])
    seconds = st.sampled_from([1, 2, 5, 10])

    def __init__(self) -> None:
        super().__init__()
        self.clock, self.queue = made()
        self.wanted: set[Key] = set()
        self.at_work: set[Key] = set()
        self.aside: set[Key] = set()
        self.ready: list[Key] = []
        self.due: dict[Key, float] = {}

    @rule(key=keys)
    def add(self, key: Key) -> None:
        self.queue.add(key)
        self.wanted.add(key)

    @rule(key=keys, seconds=seconds)
    def add_after(self, key: Key, seconds: float) -> None:
        self.queue.add_after(key, seconds)
        due = self.clock.monotonic() + seconds
        self.due[key] = min(due, self.due.get(key, due))

    @rule(seconds=seconds)
    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    def _fall_due(self) -> None:
        for key in [key for key, due in self.due.items() if due <= self.clock.monotonic()]:
            del self.due[key]
            self.wanted.add(key)

    @precondition(lambda self: self.ready or (self.wanted | self._due_now()) - self.at_work)
    @rule()
    def get(self) -> None:
        key = self.queue.get()
        assert key is not None
        if self.ready:
            assert key == self.ready.pop(0)
            return
        self._fall_due()
        assert key in self.wanted
        assert key not in self.at_work, "a key was at work twice at once"
        self.wanted.remove(key)
        self.at_work.add(key)

    def _due_now(self) -> set[Key]:
        return {key for key, due in self.due.items() if due <= self.clock.monotonic()}

    def _running(self) -> list[Key]:
        return sorted(self.at_work - self.aside - set(self.ready))

    @precondition(lambda self: self._running())
    @rule(data=st.data())
    def done(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self._running()))
        self.queue.done(key)
        self.at_work.remove(key)

    @precondition(lambda self: self._running())
    @rule(data=st.data())
    def put_aside(self, data: st.DataObject) -> None:
        self.aside.add(data.draw(st.sampled_from(self._running())))

    @precondition(lambda self: self.aside)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.aside)))
        self.aside.remove(key)
        self.ready.append(key)
        self.queue.resume(key)

    @invariant()
    def nothing_is_lost(self) -> None:
        waiting = len(self.wanted - self.at_work) + len(self.ready)
        assert waiting <= len(self.queue) + len(self._due_now()) + len(self.due)
        assert len(self.queue) >= len(self.wanted - self.at_work - self._due_now())

    def teardown(self) -> None:
        """Everything that was wanted comes out when the work ends and time passes."""
        for key in self.at_work:
            self.queue.done(key)
        while self.ready:
            assert self.queue.get() == self.ready.pop(0)
        self.clock.advance(100)
        left = self.wanted | set(self.due)
        assert {self.queue.get() for _ in left} == left
        assert len(self.queue) == 0


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40)
