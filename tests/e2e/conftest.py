"""One controller per test module, one issuer for those that need only one."""

import secrets
from collections.abc import Iterator

import pytest

from tests.e2e.faults import proxied_controller
from tests.lab.controller import Controller, install_crds
from tests.lab.kube_proxy import KubeProxy
from tests.lab.lab import Lab
from tests.lab.leaks import Watched, leaks, log_files
from tests.site import CERTIFICATES, Site, assert_plain


@pytest.fixture(scope="session", autouse=True)
def watched(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Every Secret of the lab from now on, and all that is said in its objects.

    In the end every account key, leaf key and HMAC key of the whole run, in each form, is searched in all logs, the
    audit log, Events, and every version of Certificates and issuers: none is found.

    Mutation: log the next key in `store_next_key`; put the HMAC key into the message of EABRefused.
    """
    with Watched(lab) as watching:
        yield watching
    folder = tmp_path_factory.mktemp("leaks")
    said = folder / "objects"
    said.write_text("\n".join(watching.said))
    secrets, files = dict(watching.secrets), [*log_files(lab), said]
    found = leaks(secrets, files, folder)
    size = sum(path.stat().st_size for path in files) / 2**20
    objects = len(watching.said)
    print(f"\n{len(secrets)} secrets in {len(files)} files ({size:.0f} MiB) and {objects} objects: {len(found)}")
    assert found == []


@pytest.fixture(scope="module")
def controller(lab: Lab) -> Iterator[Controller]:
    """A running controller, killed at the end of the module."""
    install_crds(lab)
    with Controller(lab, arguments=["--log-level=debug", "--log-format=text"]) as running:
        running.wait_ready()
        yield running


@pytest.fixture(scope="module")
def issuer(lab: Lab, controller: Controller) -> Iterator[str]:
    """A ClusterIssuer that is ready, bound to kid-1 of the lab's CA."""
    admin = Site(lab, lab.namespace)
    name = admin.cluster_issuer(f"ca-{secrets.token_hex(3)}")
    yield name
    admin.delete(f"{CERTIFICATES}/clusterissuers/{name}")


@pytest.fixture
def site(lab: Lab, namespace: str) -> Site:
    """The test's own namespace, as its people use it."""
    return Site(lab, namespace)


@pytest.fixture
def plain(site: Site, controller: Controller) -> Iterator[None]:
    """Whatever the test provokes is told in plain words, and nothing broke inside."""
    already = controller.log.stat().st_size
    yield
    assert_plain(site.said())
    assert "Traceback" not in controller.log.read_bytes()[already:].decode()


@pytest.fixture(scope="module")
def proxied(lab: Lab) -> Iterator[tuple[Controller, KubeProxy]]:
    """A controller of the module's own, and its way to the API server."""
    with proxied_controller(lab) as both:
        yield both


@pytest.fixture(scope="module")
def way(proxied: tuple[Controller, KubeProxy]) -> KubeProxy:
    """The way of that controller to the API server."""
    return proxied[1]
