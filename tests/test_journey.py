"""The journey: the whole main job as one readable test; the demo shows the same path."""

import time
from collections.abc import Iterator

import pytest

from tests.lab.controller import Controller, install_crds
from tests.lab.lab import Lab
from tests.site import CERTIFICATES, Site, wait_for


@pytest.fixture
def controller(lab: Lab) -> Iterator[Controller]:
    """A running controller."""
    install_crds(lab)
    with Controller(lab) as running:
        running.wait_ready()
        yield running


def test_an_annotated_ingress_gets_https_and_keeps_it(
    lab: Lab, controller: Controller, namespace: str, suffix: str
) -> None:
    """One annotation on an Ingress brings verified HTTPS through an account bound by EAB, and it renews by itself.

    Mutation: leave out `Rest(renewal_time - now)` in `_rest`, and the short-lived certificate expires.
    """
    site, host = Site(lab, namespace), f"shop.{suffix}"

    # An administrator makes the issuer known: the CA demands External Account Binding.
    site.cluster_issuer(f"journey-{suffix[:8]}", profile="shortlived")

    # A tenant has an application and annotates its Ingress.
    mark = lab.mark()
    with site.application():
        site.ingress("web", [([host], "web-tls")], f"journey-{suffix[:8]}")

        # The certificate is there in moments, and Traefik serves it.
        first = site.ready("web-tls")["serialNumber"]
        root = lab.acme.root_pem()
        wait_for(lambda: site.served(host).serial == first, "Traefik serves the certificate")
        assert site.request(host, root) == "hello from web\n"
        assert lab.orders(mark) == 1
        site.nothing_left()

        # It lives a minute, and is replaced in time without anybody's doing.
        second = site.ready("web-tls", revision=2)
        wait_for(lambda: site.served(host, root=root).serial == second["serialNumber"], "Traefik serves the next one")
        assert site.served(host, root=root).not_after > time.time()
        assert lab.orders(mark) == 2
    site.delete(f"{CERTIFICATES}/clusterissuers/journey-{suffix[:8]}")
