"""The API server in memory does what the real one does: both are taken through the same writes and compared.

What is compared is what reconcilers build on: which call is refused and how, labels, annotations, finalizers, owners,
data, whether the version and the generation moved, and what the cache shows in the end.
"""

from __future__ import annotations

from threading import Event
from typing import TYPE_CHECKING, Any

import pytest

from certbotk8s.clock import SystemClock
from certbotk8s.domain.api import INGRESS, SECRET, Secret
from certbotk8s.domain.errors import PermanentError, TemporaryError
from certbotk8s.kube.api import connect
from certbotk8s.kube.cluster import KubeCluster
from tests.fakes.cluster import ApiServer, FakeCluster
from tests.site import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from certbotk8s.domain.api import Kind, Resource
    from certbotk8s.ports import Cluster
    from tests.lab.lab import Lab

Step = tuple[str, Any]


def ingress(*, name: str = "web", hosts: tuple[str, ...] = ("a.example.test",), **metadata: Any) -> dict[str, Any]:
    backend = {"service": {"name": "web", "port": {"number": 80}}}
    path = {"path": "/", "pathType": "Prefix", "backend": backend}
    return {
        "metadata": {"name": name, **metadata},
        "spec": {"ingressClassName": "web", "rules": [{"host": host, "http": {"paths": [path]}} for host in hosts]},
    }


def secret(*, name: str = "web", data: dict[str, str] | None = None, **metadata: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, **metadata}, "data": data or {}}


def owner(name: str, uid: str) -> dict[str, Any]:
    # Of a kind that the garbage collector does not know: it would delete what these objects own, as they do not exist.
    return {"apiVersion": "example.test/v1", "kind": "Thing", "name": name, "uid": uid}


FIRST, SECOND = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
# In place of a uid or a version: that of the object as the step before left it, or as it was at first.
LAST, OLD, NONE = "<last>", "<first>", "33333333-3333-4333-8333-333333333333"

SEQUENCES: dict[str, tuple[Kind[Any], list[Step]]] = {
    "create": (INGRESS, [("create", ingress()), ("create", ingress()), ("get", "web"), ("get", "other")]),
    "create-then-apply": (
        INGRESS,
        [
            ("create", ingress(labels={"a": "1", "b": "1"}, annotations={"x": "1"})),
            ("apply", ingress(labels={"a": "2"})),
            ("apply", ingress(labels={"a": "2"})),
            ("apply", ingress(hosts=("b.example.test", "c.example.test"))),
        ],
    ),
    "apply-adds-and-takes-away": (
        SECRET,
        [
            ("apply", secret(labels={"a": "1", "b": "1"}, data={"k": "YQ==", "l": "YQ=="})),
            ("apply", secret(labels={"b": "2", "c": "2"}, data={"l": "Yg=="})),
            ("apply", secret(labels={"b": "2", "c": "2"}, data={"l": "Yg=="})),
            ("apply", secret()),
        ],
    ),
    "preconditions": (
        SECRET,
        [
            ("apply", secret(uid=NONE)),
            ("apply", secret(resourceVersion="1")),
            ("apply", secret(data={"k": "YQ=="})),
            ("apply", secret(uid=LAST, resourceVersion=LAST, data={"k": "Yg=="})),
            ("apply", secret(resourceVersion=OLD, data={"k": "Yw=="})),
            ("apply", secret(uid=NONE, data={"k": "Yw=="})),
            ("apply", secret(uid=LAST, data={"k": "ZA=="})),
        ],
    ),
    "finalizers": (
        SECRET,
        [
            ("create", secret(finalizers=["example.test/a"])),
            ("apply", secret(finalizers=["example.test/b"])),
            ("apply", secret()),
            ("apply", secret(finalizers=["example.test/a"])),
            ("delete", "web"),
            ("delete", "web"),
            ("get", "web"),
        ],
    ),
    "a-finalizer-of-ours-holds-until-it-goes": (
        SECRET,
        [
            ("apply", secret(finalizers=["example.test/a"])),
            ("delete", "web"),
            ("apply", secret(labels={"a": "1"}, finalizers=["example.test/a"])),
            ("apply", secret()),
            ("get", "web"),
        ],
    ),
    "owners": (
        SECRET,
        [
            ("create", secret(ownerReferences=[owner("one", FIRST)])),
            ("apply", secret(ownerReferences=[owner("other", SECOND)])),
            ("apply", secret()),
        ],
    ),
    "delete": (
        SECRET,
        [
            ("delete", "web"),
            ("create", secret()),
            ("delete", ("web", NONE)),
            ("get", "web"),
            ("delete", ("web", LAST)),
            ("get", "web"),
            ("create", secret(data={"k": "YQ=="})),
        ],
    ),
}


class Run:
    """One cluster taken through a sequence; `seen` is what can be compared with another run."""

    def __init__(self, cluster: Cluster, kind: Kind[Any], namespace: str) -> None:
        self.seen: list[Any] = []
        self._cluster = cluster
        self._kind = kind
        self._namespace = namespace
        self._versions: list[Resource] = []

    def step(self, verb: str, argument: Any) -> None:
        calls: dict[str, Callable[[Any], Any]] = {
            "create": lambda manifest: self._cluster.create(self._kind, self._filled(manifest)),
            "apply": lambda manifest: self._cluster.apply(self._kind, self._filled(manifest)),
            "get": lambda name: self._cluster.get(self._kind, self._namespace, name),
            "delete": self._delete,
        }
        try:
            answer = calls[verb](argument)
        except (TemporaryError, PermanentError) as error:
            self.seen.append((verb, type(error).__name__))
            return
        self.seen.append((verb, self._shown(answer)))
        if answer is not None:
            self._versions.append(answer)

    def _delete(self, argument: Any) -> None:
        name, uid = argument if isinstance(argument, tuple) else (argument, "")
        self._cluster.delete(self._kind, self._namespace, name, uid=self._known("uid", uid))

    def _filled(self, manifest: dict[str, Any]) -> dict[str, Any]:
        metadata = {"namespace": self._namespace} | manifest["metadata"]
        for part in {"uid", "resourceVersion"} & metadata.keys():
            metadata[part] = self._known(part, metadata[part])
        return {"apiVersion": self._kind.api_version, "kind": self._kind.kind, **manifest, "metadata": metadata}

    def _known(self, part: str, value: str) -> str:
        if value not in (LAST, OLD):
            return value
        metadata = self._versions[-1 if value == LAST else 0].metadata
        return metadata.uid if part == "uid" else metadata.resource_version

    def cached(self) -> Any:
        """What the cache has."""
        found = self._cluster.store(self._kind).get(f"{self._namespace}/web")
        return found and (found.metadata.labels, found.metadata.deletion_timestamp is not None)

    def _shown(self, obj: Resource | None) -> Any:
        if obj is None:
            return None
        metadata = obj.metadata
        before = self._versions[-1].metadata if self._versions else None
        return {
            "labels": metadata.labels,
            "annotations": metadata.annotations,
            "finalizers": sorted(metadata.finalizers),
            "owners": sorted(owner.name for owner in metadata.owner_references),
            "generation": metadata.generation,
            "deleting": metadata.deletion_timestamp is not None,
            "changed": before is None or before.resource_version != metadata.resource_version,
            "same": before is None or before.uid == metadata.uid,
            "content": obj.data if isinstance(obj, Secret) else str(getattr(obj, "spec", None)),
        }


@pytest.fixture
def real(lab: Lab, namespace: str) -> Iterator[KubeCluster]:
    cluster = KubeCluster(connect(kubeconfig=lab.kubeconfig), SystemClock(), on_death=pytest.fail)
    cluster.watch(INGRESS, namespaces=(namespace,))
    cluster.watch(SECRET, namespaces=(namespace,))
    cluster.start()
    assert cluster.wait_synced(Event())
    yield cluster
    cluster.stop()


@pytest.mark.parametrize("name", SEQUENCES)
def test_both_do_the_same(real: KubeCluster, namespace: str, name: str) -> None:
    """Every step ends alike on both; fails when the fake forgets a precondition, a set list or a field taken away."""
    kind, steps = SEQUENCES[name]
    fake = FakeCluster(ApiServer())
    fake.watch(kind)
    both = Run(real, kind, namespace), Run(fake, kind, namespace)
    for verb, argument in steps:
        for run in both:
            run.step(verb, argument)
        step = f"step {len(both[0].seen)}"
        assert both[1].seen[-1] == both[0].seen[-1], step
        wait_for(lambda: both[1].cached() == both[0].cached(), f"the caches after {step}")
