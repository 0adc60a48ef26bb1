"""A solver in memory: `ports.Solver` that writes one Ingress per presentation to the cluster and looks at nothing else.

What it presents is therefore kept by the API server, counted among its writes, and subject to its faults.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from certbotk8s.domain.api import INGRESS, LABEL_ROLE, ROLE_CHALLENGE
from certbotk8s.domain.errors import AlreadyExists

if TYPE_CHECKING:
    from collections.abc import Callable

    from certbotk8s.ports import Cluster, Presentation

_PREFIX = "challenge-"


class FakeSolver:
    """`missing` is what `is_ready` says; `before` is called first in every method, with its name."""

    def __init__(self, cluster: Cluster, namespace: str = "certbotk8s", challenge_type: str = "http-01") -> None:
        self.challenge_type = challenge_type
        self.missing = ""
        self.before: Callable[[str], None] = lambda _method: None
        self.presented: list[Presentation] = []
        self._cluster = cluster
        self._namespace = namespace

    def present(self, presentation: Presentation) -> None:
        """Write the Ingress."""
        self.before("present")
        self.presented.append(presentation)
        manifest = {
            "apiVersion": INGRESS.api_version,
            "kind": INGRESS.kind,
            "metadata": {
                "name": _PREFIX + presentation.id,
                "namespace": self._namespace,
                "labels": {LABEL_ROLE: ROLE_CHALLENGE},
            },
            "spec": {"rules": [{"host": each.identifier} for each in presentation.challenges]},
        }
        try:
            self._cluster.create(INGRESS, manifest)
        except AlreadyExists:
            self._cluster.apply(INGRESS, manifest)

    def is_ready(self, presentation: Presentation) -> str:
        """Whether the Ingress is there, and whatever the test says."""
        self.before("is_ready")
        found = self._cluster.store(INGRESS).get(f"{self._namespace}/{_PREFIX}{presentation.id}")
        return self.missing if found else "its Ingress is gone"

    def clean_up(self, presentation_id: str) -> None:
        """Delete the Ingress."""
        self.before("clean_up")
        self._cluster.delete(INGRESS, self._namespace, _PREFIX + presentation_id)

    def leftovers(self) -> list[str]:
        """The presentations of which the Ingress exists."""
        self.before("leftovers")
        return [
            each.metadata.name.removeprefix(_PREFIX)
            for each in self._cluster.store(INGRESS).all()
            if each.metadata.labels.get(LABEL_ROLE) == ROLE_CHALLENGE
        ]
