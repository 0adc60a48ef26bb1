"""The networks of the cluster's own Services (https://kubernetes.io/docs/reference/networking/virtual-ips/)."""

from __future__ import annotations

import logging
import os
from ipaddress import ip_network
from typing import TYPE_CHECKING

import msgspec

from certbotk8s.domain.api import Kind, Resource, Struct
from certbotk8s.domain.errors import PermanentError, TemporaryError

if TYPE_CHECKING:
    from certbotk8s.domain.addresses import Network
    from certbotk8s.kube.api import Api

log = logging.getLogger(__name__)


class _Spec(Struct, frozen=True):
    cidrs: tuple[str, ...] = ()


class _ServiceCIDR(Resource, frozen=True):
    spec: _Spec = _Spec()


SERVICE_CIDR = Kind("networking.k8s.io", "v1", "servicecidrs", "ServiceCIDR", _ServiceCIDR, namespaced=False)


def service_networks(connection: Api) -> tuple[Network, ...]:
    """The networks of the ServiceCIDRs; of a cluster that tells none (before 1.33) the API server's Service alone."""
    try:
        found = [
            cidr
            for page in connection.pages(SERVICE_CIDR)
            for raw in page.items or ()
            for cidr in SERVICE_CIDR.decode(raw).spec.cidrs
        ]
        return tuple(ip_network(cidr) for cidr in found)
    except (TemporaryError, PermanentError, msgspec.MsgspecError, ValueError) as error:
        own = os.environ.get("KUBERNETES_SERVICE_HOST", "")
        log.info("Of the cluster's Services only the API server's %s is known: %s", own, error)
    try:
        return (ip_network(own),)
    except ValueError:
        return ()
