"""KubeCluster against a real API server."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from certbotk8s.clock import SystemClock
from certbotk8s.domain.api import INGRESS, SECRET, Ingress, Kind, Resource, Secret
from certbotk8s.domain.errors import AlreadyExists, Conflict, PermanentError, TemporaryError
from certbotk8s.domain.reasons import Reason
from certbotk8s.kube.api import connect
from certbotk8s.kube.cluster import KubeCluster
from certbotk8s.ports import Reference
from tests.lab.lab import Lab

SECONDS = 20.0

# What a cache keeps of a Secret: another type than SECRET, at the same place of the API.
SECRET_NAMES = Kind("", "v1", "secrets", "Secret", Resource)
MARKED = "example.test/marked"

Change = tuple[Resource | None, Resource | None]


class Watching:
    """A cluster whose Ingresses and marked Secrets are cached, and what the caches told."""

    def __init__(self, kubeconfig: str, namespace: str) -> None:
        self.deaths: list[str] = []
        self.ingress_changes: queue.Queue[Change] = queue.Queue()
        self.secret_changes: queue.Queue[Change] = queue.Queue()
        self.cluster = KubeCluster(connect(kubeconfig=kubeconfig), SystemClock(), on_death=self.deaths.append)
        self.ingresses = self.cluster.watch(
            INGRESS,
            namespaces=[namespace],
            indexes={"host": lambda ingress: [rule.host for rule in ingress.spec.rules]},
            on_change=lambda old, new: self.ingress_changes.put((old, new)),
        )
        self.secrets = self.cluster.watch(
            SECRET_NAMES,
            label_selector=MARKED,
            namespaces=[namespace],
            on_change=lambda old, new: self.secret_changes.put((old, new)),
        )


@pytest.fixture
def watching(lab: Lab, namespace: str) -> Iterator[Watching]:
    one = Watching(lab.controller_kubeconfig, namespace)
    one.cluster.start()
    assert one.cluster.wait_synced(threading.Event())
    yield one
    one.cluster.stop()
    assert one.deaths == []


@pytest.fixture
def cluster(watching: Watching) -> KubeCluster:
    return watching.cluster


def ingress(namespace: str, name: str = "web", host: str = "shop.example.test", **metadata: str) -> dict[str, Any]:
    path = {"path": "/", "pathType": "Prefix", "backend": {"service": {"name": "web", "port": {"number": 80}}}}
    return {
        "metadata": {"namespace": namespace, "name": name, **metadata},
        "spec": {"rules": [{"host": host, "http": {"paths": [path]}}]},
    }


def secret(namespace: str, name: str = "keys", value: str = "YQ==", **metadata: Any) -> dict[str, Any]:
    return {"metadata": {"namespace": namespace, "name": name, **metadata}, "type": "Opaque", "data": {"key": value}}


def eventually(look: Callable[[], bool]) -> None:
    """Waits until `look` is true, for a time that no machine needs."""
    pause = threading.Event()
    for _ in range(int(SECONDS / 0.02)):
        if look():
            return
        pause.wait(0.02)
    raise AssertionError("it never came true")


def test_create_refuses_a_taken_name(cluster: KubeCluster, namespace: str) -> None:
    """A second create of a name raises AlreadyExists and says which. (Break: the create row is taken off the table.)"""
    made = cluster.create(SECRET, secret(namespace))
    assert made.data == {"key": "YQ=="}
    with pytest.raises(AlreadyExists, match=f"Secret {namespace}/keys exists already"):
        cluster.create(SECRET, secret(namespace, value="Yg=="))


def test_get_tells_absent_from_unknown(lab: Lab, namespace: str) -> None:
    """An object that is not there is None; a resource type that is not there is an error. (Break: all 404 are None.)"""
    cluster = KubeCluster(connect(kubeconfig=lab.kubeconfig), SystemClock(), on_death=print)
    assert cluster.get(SECRET, namespace, "nothing") is None
    with pytest.raises(TemporaryError, match="not installed"):
        cluster.get(Kind("nowhere.example.test", "v1", "things", "Thing", Resource), namespace, "nothing")


def test_apply_creates_and_changes(cluster: KubeCluster, namespace: str) -> None:
    """Apply makes an object, and changes it when it is there. (Break: apply is a merge patch.)"""
    first = cluster.apply(SECRET, secret(namespace))
    second = cluster.apply(SECRET, secret(namespace, value="Yg=="))
    assert second.metadata.uid == first.metadata.uid
    assert second.data == {"key": "Yg=="}


def test_apply_holds_the_version(cluster: KubeCluster, namespace: str) -> None:
    """Apply with an old resourceVersion raises Conflict and changes nothing. (Break: 409 maps to PermanentError.)"""
    first = cluster.apply(SECRET, secret(namespace))
    version = first.metadata.resource_version
    cluster.apply(SECRET, secret(namespace, value="Yg=="))
    with pytest.raises(Conflict, match="changed since it was read"):
        cluster.apply(SECRET, secret(namespace, value="Yw==", resourceVersion=version))
    now = cluster.get(SECRET, namespace, "keys")
    assert now is not None
    assert now.data == {"key": "Yg=="}


@pytest.mark.parametrize("with_version", [False, True])
def test_apply_with_a_uid_never_creates(cluster: KubeCluster, namespace: str, with_version: bool) -> None:
    """Apply with the uid of a deleted object raises Conflict and makes none. (Break: the uid is left out.)"""
    gone = cluster.create(SECRET, secret(namespace))
    cluster.delete(SECRET, namespace, "keys", uid=gone.metadata.uid)
    metadata = {"uid": gone.metadata.uid}
    if with_version:
        metadata["resourceVersion"] = gone.metadata.resource_version
    with pytest.raises(Conflict):
        cluster.apply(SECRET, secret(namespace, **metadata))
    assert cluster.get(SECRET, namespace, "keys") is None


@pytest.mark.parametrize("with_version", [False, True])
def test_apply_spares_a_namesake(cluster: KubeCluster, namespace: str, with_version: bool) -> None:
    """Apply with another uid than the object has raises Conflict. (Break: the row for metadata.uid is removed.)"""
    former = cluster.create(SECRET, secret(namespace))
    cluster.delete(SECRET, namespace, "keys")
    present = cluster.create(SECRET, secret(namespace, value="Yg=="))
    metadata = {"uid": former.metadata.uid}
    if with_version:
        metadata["resourceVersion"] = present.metadata.resource_version
    with pytest.raises(Conflict):
        cluster.apply(SECRET, secret(namespace, value="Yw==", **metadata))
    now = cluster.get(SECRET, namespace, "keys")
    assert now is not None
    assert now.data == {"key": "Yg=="}


def test_status_of_a_missing_object(lab: Lab, namespace: str) -> None:
    """Applying the status of an object that is gone raises Conflict. (Break: the 404 row of apply is removed.)"""
    cluster = KubeCluster(connect(kubeconfig=lab.kubeconfig), SystemClock(), on_death=print)
    manifest = {"metadata": {"namespace": namespace, "name": "web"}, "status": {"loadBalancer": {}}}
    with pytest.raises(Conflict):
        cluster.apply(INGRESS, manifest, subresource="status")


def test_own_writes_are_read_at_once(watching: Watching, namespace: str) -> None:
    """What was created, applied and deleted shows in the cache when the call returns. (Break: no _absorb.)"""
    cluster, cache, key = watching.cluster, watching.ingresses, f"{namespace}/web"
    cluster.create(INGRESS, ingress(namespace))
    assert [found.key for found in cache.find("host", "shop.example.test")] == [key]
    cluster.apply(INGRESS, ingress(namespace, host="api.example.test"))
    assert cache.find("host", "shop.example.test") == []
    assert [found.key for found in cache.find("host", "api.example.test")] == [key]
    cluster.delete(INGRESS, namespace, "web")
    assert cache.get(key) is None
    assert cache.find("host", "api.example.test") == []


def test_a_change_is_told_once(watching: Watching, lab: Lab, namespace: str) -> None:
    """An own write that the watch brings too is told once, in order with those of others. (Break: put ignores age.)"""
    watching.cluster.create(INGRESS, ingress(namespace))
    watching.cluster.apply(INGRESS, ingress(namespace, host="api.example.test"))
    lab.kubectl("delete", "ingress", "web", "-n", namespace)
    told: list[str | None] = []
    while not told or told[-1] is not None:
        new = watching.ingress_changes.get(timeout=SECONDS)[1]
        told.append(new.spec.rules[0].host if isinstance(new, Ingress) else None)
    assert told == ["shop.example.test", "api.example.test", None]


def test_writes_of_others_arrive(watching: Watching, lab: Lab, namespace: str) -> None:
    """What others create, change and delete is told with old and new. (Break: MODIFIED events are dropped.)"""
    lab.kubectl("create", "ingress", "web", "-n", namespace, "--rule=a.example.test/*=web:80")
    old, new = watching.ingress_changes.get(timeout=SECONDS)
    assert old is None
    assert isinstance(new, Ingress)
    lab.kubectl("annotate", "ingress", "web", "-n", namespace, "example.test/x=y")
    old, changed = watching.ingress_changes.get(timeout=SECONDS)
    assert old == new
    assert changed is not None
    assert changed.metadata.annotations == {"example.test/x": "y"}
    lab.kubectl("delete", "ingress", "web", "-n", namespace)
    old, new = watching.ingress_changes.get(timeout=SECONDS)
    assert (old, new) == (changed, None)


def test_a_selected_cache_holds_only_what_is_selected(watching: Watching, lab: Lab, namespace: str) -> None:
    """A cache by label holds no own write without the label, loses what loses it, and takes it back when it returns.

    (Break: _absorb does not ask `selects`.)
    """
    watching.cluster.create(SECRET, secret(namespace, "plain"))
    assert watching.secrets.get(f"{namespace}/plain") is None
    watching.cluster.create(SECRET, secret(namespace, "marked", labels={MARKED: "yes"}))
    assert watching.secrets.get(f"{namespace}/marked") is not None
    lab.kubectl("label", "secret", "marked", "-n", namespace, f"{MARKED}-")
    eventually(lambda: watching.secrets.get(f"{namespace}/marked") is None)
    lab.kubectl("label", "secret", "marked", "-n", namespace, f"{MARKED}=again")
    eventually(lambda: watching.secrets.get(f"{namespace}/marked") is not None)


def test_delete_is_bound_to_the_uid(cluster: KubeCluster, namespace: str) -> None:
    """Delete leaves a namesake with another uid alone and says nothing. (Break: no preconditions are sent.)"""
    former = cluster.create(SECRET, secret(namespace))
    cluster.delete(SECRET, namespace, "keys", uid=former.metadata.uid)
    cluster.delete(SECRET, namespace, "keys", uid=former.metadata.uid)
    present = cluster.create(SECRET, secret(namespace))
    cluster.delete(SECRET, namespace, "keys", uid=former.metadata.uid)
    still = cluster.get(SECRET, namespace, "keys")
    assert still is not None
    assert still.metadata.uid == present.metadata.uid


def test_delete_is_bound_to_the_version(cluster: KubeCluster, namespace: str) -> None:
    """Delete of a version that was changed since is refused, and the object stays. (Break: send the uid only.)"""
    marked = {"name": "keys", "namespace": namespace, "annotations": {"example.test/mark": "yes"}}
    former = cluster.create(SECRET, secret(namespace)).metadata
    present = cluster.apply(SECRET, {"apiVersion": "v1", "kind": "Secret", "metadata": marked}).metadata
    with pytest.raises(Conflict):
        cluster.delete(SECRET, namespace, "keys", uid=former.uid, version=former.resource_version)
    still = cluster.get(SECRET, namespace, "keys")
    assert still is not None
    assert still.metadata.annotations == marked["annotations"]
    cluster.delete(SECRET, namespace, "keys", uid=present.uid, version=present.resource_version)
    assert cluster.get(SECRET, namespace, "keys") is None


def test_delete_held_by_a_finalizer(watching: Watching, lab: Lab, namespace: str) -> None:
    """An object that a finalizer holds stays in the cache, marked. (Break: delete removes whatever it is answered.)"""
    held = ingress(namespace)
    held["metadata"]["finalizers"] = ["example.test/held"]
    watching.cluster.create(INGRESS, held)
    watching.cluster.delete(INGRESS, namespace, "web")
    cached = watching.ingresses.get(f"{namespace}/web")
    assert cached is not None
    assert cached.metadata.deletion_timestamp is not None
    lab.kubectl("patch", "ingress", "web", "-n", namespace, "--type=merge", "-p", '{"metadata":{"finalizers":null}}')
    eventually(lambda: watching.ingresses.get(f"{namespace}/web") is None)


def test_named_secret_tells_and_stops(watching: Watching, lab: Lab, namespace: str) -> None:
    """Two listeners of one named Secret hear its changes, with one watch, until each stops.

    (Break: the second listener replaces the first.)
    """
    mark = lab.mark()
    heard_a, heard_b = threading.Semaphore(0), threading.Semaphore(0)
    stop_a = watching.cluster.watch_secret(namespace, "eab", heard_a.release)
    stop_b = watching.cluster.watch_secret(namespace, "eab", heard_b.release)
    lab.kubectl("create", "secret", "generic", "other", "-n", namespace)
    lab.kubectl("create", "secret", "generic", "eab", "-n", namespace)
    assert heard_a.acquire(timeout=SECONDS)
    assert heard_b.acquire(timeout=SECONDS)
    stop_a()
    lab.kubectl("label", "secret", "eab", "-n", namespace, "a=b")
    assert heard_b.acquire(timeout=SECONDS)
    assert not heard_a.acquire(blocking=False)
    stop_b()
    lists = [
        request
        for request in lab.kube_requests(mark)
        if request.verb == "list" and "fieldSelector=metadata.name%3Deab" in request.request_uri
    ]
    assert len(lists) == 1


def test_events_show_and_are_counted(watching: Watching, lab: Lab, namespace: str) -> None:
    """The same words become one Event with a count, as `kubectl describe` shows. (Break: the key includes the time.)"""
    made = watching.cluster.create(INGRESS, ingress(namespace))
    about = Reference("networking.k8s.io/v1", "Ingress", namespace, "web", made.metadata.uid)
    for _ in range(3):
        watching.cluster.event(about, Reason.INGRESS_INVALID, "The host is missing. " + "x" * 2000, warning=True)
    watching.cluster.event(about, Reason.CERTIFICATE_CREATED, "Certificate made")
    eventually(lambda: "Certificate made" in lab.kubectl("describe", "ingress", "web", "-n", namespace))
    shown = lab.kubectl("describe", "ingress", "web", "-n", namespace)
    assert "(x3 over" in shown
    assert "The host is missing." in shown


def test_event_of_a_cluster_scoped_object(watching: Watching, lab: Lab, suffix: str) -> None:
    """An Event about a cluster-scoped object stands in namespace default. (Break: its namespace is left empty.)"""
    about = Reference("certbotk8s.io/v1", "ClusterIssuer", "", suffix, "u-1")
    watching.cluster.event(about, Reason.ACCOUNT_REGISTERED, "Registered")
    found = ["get", "events", "-n", "default", "--field-selector", f"involvedObject.name={suffix}", "-o", "name"]
    eventually(lambda: "event/" in lab.kubectl(*found))


def test_forbidden_says_what_and_who(lab: Lab, namespace: str) -> None:
    """A missing right is a TemporaryError with the API server's sentence. (Break: 403 maps to PermanentError.)"""
    cluster = KubeCluster(connect(kubeconfig=lab.tenant_kubeconfig), SystemClock(), on_death=print)
    with pytest.raises(TemporaryError) as refused:
        cluster.create(SECRET, secret(namespace))
    words = str(refused.value)
    assert f"does not allow to create Secret {namespace}/keys" in words
    assert 'cannot create resource "secrets"' in words


def test_invalid_objects_are_refused_for_good(cluster: KubeCluster, namespace: str) -> None:
    """An object that the API server finds invalid is a PermanentError in its words. (Break: no row for 422.)"""
    with pytest.raises(PermanentError, match="illegal base64") as refused:
        cluster.create(SECRET, secret(namespace, value="no base64!"))
    assert refused.value.reason is Reason.INVALID_SPEC
    cluster.create(SECRET, secret(namespace))
    with pytest.raises(PermanentError, match="immutable"):
        cluster.apply(SECRET, {**secret(namespace), "type": "kubernetes.io/tls"})


def test_unknown_fields_are_refused(cluster: KubeCluster, namespace: str) -> None:
    """A field that the API does not have is refused, not dropped. (Break: fieldValidation is left out.)"""
    with pytest.raises(PermanentError, match="unknown field"):
        cluster.create(SECRET, {**secret(namespace), "dta": {}})


def test_a_name_cannot_leave_its_path(cluster: KubeCluster, namespace: str) -> None:
    """A name that would change the URL is refused without a request. (Break: _object_path checks nothing.)"""
    for name in ("", "..", "a/b", "a?b", "a%2fb", "x" * 254):
        with pytest.raises(PermanentError, match="no name"):
            cluster.get(SECRET, namespace, name)


def test_terminating_namespace(cluster: KubeCluster, lab: Lab, namespace: str) -> None:
    """Creating in a namespace that is being deleted is temporary, and says so. (Break: the cause is not looked at.)"""
    cluster.create(
        INGRESS, {**ingress(namespace), "metadata": {**ingress(namespace)["metadata"], "finalizers": ["a/b"]}}
    )
    lab.api(f"/api/v1/namespaces/{namespace}", method="DELETE")
    with pytest.raises(TemporaryError, match="its namespace is being deleted"):
        cluster.create(SECRET, secret(namespace))
    cluster.apply(INGRESS, ingress(namespace))


def test_secret_has_no_content_in_its_repr(cluster: KubeCluster, namespace: str) -> None:
    """A Secret read live shows the names of its members and no content. (Break: Secret.__repr__ is removed.)"""
    cluster.create(SECRET, secret(namespace, value="c2VjcmV0"))
    read = cluster.get(SECRET, namespace, "keys")
    assert isinstance(read, Secret)
    assert read.data == {"key": "c2VjcmV0"}
    assert "c2VjcmV0" not in repr(read)
