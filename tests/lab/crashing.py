"""The real controller with a fault at a chosen effect: it kills itself, or an answer is lost, or a write refused.

    python -m tests.lab.crashing [flags of the controller]

An effect is what the controller does to the outside for one object: a write to the API server, those of solvers among
them, or a request to the CA. Events and the Lease are none: nothing is decided by them. Faults and the record of
effects are files in the folder `$CRASHING_FOLDER`, so that a running controller can be given the next fault. Without a
fault it is the controller as it is shipped, which has no such switch.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from unittest import mock

import msgspec

from certbotk8s import main as controller
from certbotk8s.ca.authority import Authority
from certbotk8s.domain.acme import Authorization, Order
from certbotk8s.domain.api import ANNOTATION_CERTIFICATE, LABEL_ROLE
from certbotk8s.domain.errors import TemporaryError
from certbotk8s.kube.api import connect

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from certbotk8s.domain.api import Kind
    from certbotk8s.kube.api import Api
    from certbotk8s.ports import Server, Session

T = TypeVar("T")

FOLDER = "CRASHING_FOLDER"
APART = frozenset({"Event", "Lease"})
# A version that no object has any more: the API server itself refuses what was read then.
LONG_AGO = "1"

_ACCOUNT_REQUESTS = {"directory": "read directory", "find_account": "look up account", "register": "newAccount"}
_ACCOUNT_CHANGES = {"change_key": "keyChange", "update_contact": "update account"}
_ORDER_REQUESTS = {
    "new_order": "newOrder",
    "order": "read order",
    "authorization": "read authorization",
    "answer": "answer challenge",
    "finalize": "finalize",
    "certificate": "fetch certificate",
    "deactivate": "deactivate authorization",
}


class Fault(msgspec.Struct, frozen=True):
    """What happens at the effects `number` (from 0) to `number + times - 1` of those about one of `about`.

    `kill` is SIGKILL; `lose` gives no answer, "before" the effect was made or "after"; `refuse` has the API server
    refuse a write for its resourceVersion. Only effects whose name the regular expression `only` fits count.
    """

    about: tuple[str, ...]
    act: Literal["kill", "lose", "refuse"]
    number: int = 0
    when: Literal["before", "after"] = "before"
    times: int = 1
    only: str = ".*"


class Effect(msgspec.Struct, frozen=True):
    """One line of the record. `about` is `namespace/name` of an object, a DNS name, or the directory's URL."""

    name: str
    about: str
    act: str = ""
    """The fault that comes at it."""


class Faults:
    """The files of a folder: which faults are to come, and which effects there were."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._plan = folder / "faults.json"
        self._record = folder / "effects.jsonl"

    def set(self, *faults: Fault) -> None:
        """These are to come, and no others."""
        unfinished = self._plan.with_suffix(".unfinished")
        unfinished.write_bytes(msgspec.json.encode(faults))
        unfinished.rename(self._plan)

    def get(self) -> list[Fault]:
        """Those that were set."""
        try:
            return msgspec.json.decode(self._plan.read_bytes(), type=list[Fault])
        except FileNotFoundError:
            return []

    def add(self, effect: Effect) -> None:
        """One more effect is about to be made."""
        with self._record.open("ab") as record:
            record.write(msgspec.json.encode(effect) + b"\n")

    def effects(self, *about: str) -> list[Effect]:
        """The effects about these so far, oldest first."""
        try:
            lines = self._record.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        return [effect for line in lines if (effect := msgspec.json.decode(line, type=Effect)).about in about]


class Effects:
    """Makes the effects of this process, and the faults among them."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._counts: Counter[Fault] = Counter()
        self._lock = threading.Lock()

    def make(self, name: str, about: str, effect: Callable[[], T], refused: Callable[[], T] | None = None) -> T:
        """Do it; `refused` is the same so that it is refused, where it can be."""
        fault = self._fault(name, about, refusable=refused is not None)
        if fault is None:
            return effect()
        if fault.act == "refuse":
            assert refused
            return refused()
        if fault.when == "before":
            _strike(fault)
        try:
            return effect()
        finally:
            _strike(fault)

    def _fault(self, name: str, about: str, *, refusable: bool) -> Fault | None:
        with self._lock:
            due = None
            for fault in self._faults.get():
                if (
                    about not in fault.about
                    or not re.fullmatch(fault.only, name)
                    or (fault.act == "refuse" and not refusable)
                ):
                    continue
                if fault.number <= self._counts[fault] < fault.number + fault.times:
                    due = fault
                self._counts[fault] += 1
            self._faults.add(Effect(name, about, due.act if due else ""))
            return due


def _strike(fault: Fault) -> None:
    if fault.act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise TemporaryError("The connection was cut before an answer came.")


class _Api:
    """`kube.api.Api` whose writes are effects. It lies below `ports.Cluster`, so that a lost answer is lost to its
    caches as well.
    """

    def __init__(self, api: Api, effects: Effects) -> None:
        self._api = api
        self._effects = effects
        self._made: dict[tuple[str, str, str], Effect] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name)

    def create(self, kind: Kind[Any], manifest: Mapping[str, Any], **options: Any) -> bytes:
        return self._write("create", kind, manifest, partial(self._api.create, kind, manifest, **options))

    def apply(self, kind: Kind[Any], manifest: Mapping[str, Any], subresource: str = "", **options: Any) -> bytes:
        stale = {**manifest, "metadata": {**manifest["metadata"], "resourceVersion": LONG_AGO}}
        return self._write(
            "write" if subresource else "apply",
            kind,
            manifest,
            partial(self._api.apply, kind, manifest, subresource, **options),
            partial(self._api.apply, kind, stale, subresource, **options),
        )

    def delete(self, kind: Kind[Any], namespace: str, name: str, *preconditions: str) -> bytes:
        made = self._made.get((kind.kind, namespace, name), Effect(kind.kind, f"{namespace}/{name}"))
        return self._effects.make(
            f"delete {made.name}", made.about, partial(self._api.delete, kind, namespace, name, *preconditions)
        )

    def _write(
        self,
        verb: str,
        kind: Kind[Any],
        manifest: Mapping[str, Any],
        write: Callable[[], bytes],
        refused: Callable[[], bytes] | None = None,
    ) -> bytes:
        if kind.kind in APART:
            return write()
        meta = manifest["metadata"]
        namespace, name = meta.get("namespace", ""), meta["name"]
        # A challenge stands in the controller's namespace and names its Certificate in full.
        of = meta.get("annotations", {}).get(ANNOTATION_CERTIFICATE, name)
        about = of if "/" in of or not namespace else f"{namespace}/{of}"
        words = [kind.kind, meta.get("labels", {}).get(LABEL_ROLE, "")]
        if "status" in manifest:
            words += ["status", manifest["status"].get("issuance", {}).get("state", "")]
        made = self._made[kind.kind, namespace, name] = Effect(" ".join(filter(None, words)), about)
        return self._effects.make(f"{verb} {made.name}", about, write, refused)


class _Authority:
    """`ports.Authority` whose requests, and those of its sessions, are effects."""

    def __init__(self, effects: Effects, *settings: Any) -> None:
        self._authority = Authority(*settings)
        self._effects = effects
        self._named: dict[str, str] = {}

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._authority, name)
        return partial(self._request, name, member) if name in _ACCOUNT_REQUESTS else member

    def _request(self, name: str, request: Callable[..., T], server: Server, *more: Any) -> T:
        return self._effects.make(_ACCOUNT_REQUESTS[name], server.url, partial(request, server, *more))

    def session(self, server: Server, *account: Any) -> _Session:
        return _Session(self._authority.session(server, *account), self._effects, self._named, server.url)


class _Session:
    """`ports.Session` whose requests are effects, about the first name of the order that they belong to; changes of the
    account are about the directory.

    `named` tells for each URL that the CA has given to this process which name that is.
    """

    def __init__(self, session: Session, effects: Effects, named: dict[str, str], directory: str) -> None:
        self._session = session
        self._effects = effects
        self._named = named
        self._directory = directory

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._session, name)
        if name in _ACCOUNT_CHANGES:
            return lambda new: self._effects.make(_ACCOUNT_CHANGES[name], self._directory, partial(member, new))
        return partial(self._request, name, member) if name in _ORDER_REQUESTS else member

    def _request(self, name: str, request: Callable[..., T], target: Any, *more: Any, **options: Any) -> T:
        about = self._named.get(target, "") if isinstance(target, str) else target[0].value

        def ask() -> T:
            answer = request(target, *more, **options)
            if isinstance(answer, Order):
                urls = [answer.url, answer.finalize, answer.certificate, *answer.authorizations]
            else:
                urls = [each.url for each in answer.challenges] if isinstance(answer, Authorization) else []
            self._named.update((url, about) for url in urls if url)
            return answer

        return self._effects.make(_ORDER_REQUESTS[name], about, ask)


def _connect(effects: Effects) -> _Api:
    return _Api(connect(), effects)


def main() -> None:
    """Run the controller between the wrapped ports."""
    effects = Effects(Faults(Path(os.environ[FOLDER])))
    with (
        mock.patch.object(controller, "connect", partial(_connect, effects)),
        mock.patch.object(controller, "Authority", partial(_Authority, effects)),
    ):
        controller.main()


if __name__ == "__main__":
    main()
