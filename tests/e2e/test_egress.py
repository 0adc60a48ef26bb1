"""Where the controller does not go, whoever sends it there."""

import secrets
from collections.abc import Iterator

import pytest

from tests.lab.controller import Controller, install_crds
from tests.lab.lab import Lab
from tests.site import Site, wait_for


@pytest.fixture(scope="module")
def controller(lab: Lab) -> Iterator[Controller]:
    """A controller whose namespaced Issuers may use the lab's CA, and servers at two addresses."""
    install_crds(lab)
    servers = [lab.acme.directory, "https://169.254.169.254/latest", f"https://{lab.service_ip}/dir"]
    arguments = ["--log-level=debug", "--log-format=text", *(f"--issuer-servers={server}" for server in servers)]
    with Controller(lab, arguments=arguments) as running:
        running.wait_ready()
        yield running


@pytest.mark.parametrize(
    ("host", "why"),
    [("169.254.169.254/latest", "it is link-local"), ("{service}/dir", "it is a Service of this cluster")],
)
def test_no_issuer_reaches_into_the_cluster(lab: Lab, site: Site, controller: Controller, host: str, why: str) -> None:
    """An Issuer whose server is at a cloud's metadata address or a Service is not Ready, says why and how it is
    allowed; nothing is connected to.

    Mutation: look at no address before connecting.
    """
    server = f"https://{host.format(service=lab.service_ip)}"
    site.issuer("inside", server=server, wait=False)
    told = site.issuer_condition("Issuer", "inside", "False", "CAUnavailable")
    assert why in told["message"]
    assert "--allow-addresses" in told["message"]


def test_an_address_that_an_administrator_allows_is_reached(lab: Lab, site: Site, controller: Controller) -> None:
    """The same Service with its network allowed is connected to: what is told is what the server there does.

    Mutation: refuse before looking at what is allowed.
    """
    server = f"https://{lab.service_ip}/dir"
    allowed = [f"--allow-addresses={lab.service_cidr}", f"--issuer-servers={server}", f"--namespace={site.namespace}"]
    with Controller(lab, arguments=allowed) as other:
        other.wait_ready()
        controller.stop()
        try:
            site.issuer("inside", server=server, wait=False)
            told = site.issuer_condition("Issuer", "inside", "False", "CAUnavailable")
            assert "no connection" in told["message"]
        finally:
            other.stop()
            controller.start()
            controller.wait_ready()


def test_issuers_use_the_servers_that_they_may(lab: Lab, site: Site, controller: Controller) -> None:
    """An Issuer of a namespace may name the listed servers alone; a ClusterIssuer any. The CA is not asked.

    Mutation: hold ClusterIssuers to the list too; ask the directory before looking at the list.
    """
    site.issuer("good")
    site.issuer("bad", server="https://ca.example.test/dir", wait=False)
    told = site.issuer_condition("Issuer", "bad", "False", "ServerNotAllowed")
    assert lab.acme.directory in told["message"]
    assert "--issuer-servers" in told["message"]
    admin, name = Site(lab, lab.namespace), f"ca-{secrets.token_hex(3)}"
    admin.cluster_issuer(name, server="https://ca.example.test/dir", wait=False)
    told = admin.issuer_condition("ClusterIssuer", name, "False")
    assert told["reason"] != "ServerNotAllowed"
    admin.delete(f"/apis/certbotk8s.io/v1/clusterissuers/{name}")


def test_the_look_before_the_cas_goes_nowhere_else(lab: Lab, site: Site, controller: Controller, suffix: str) -> None:
    """A name that points to a cloud's metadata address is not asked by us; the Certificate says so.

    Mutation: look at no address before the self-check.
    """
    host = f"web.{suffix}"
    site.issuer("good")
    lab.set_dns(host, addresses=["169.254.169.254"])
    try:
        site.certificate("web", [host], "good", issuerRef={"name": "good"})
        told = site.condition("web", "Issuing", "True", text="which is never asked: it is link-local")
        assert f"{host} points to 169.254.169.254" in told["message"]
    finally:
        lab.clear_dns(host)
    wait_for(lambda: site.ready("web"), "issued when the name points here")
