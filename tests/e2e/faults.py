"""The controller and its CA behind proxies that make trouble; and certificates that a good CA would not issue."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from tests.lab.acme_proxy import AcmeProxy, acme_proxy, kind_of
from tests.lab.controller import Controller, install_crds
from tests.lab.kube_proxy import KubeProxy, kube_proxy
from tests.lab.proxy import Answer, Fault, changed
from tests.site import CERTIFICATES, Site, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes

    from tests.lab.lab import Lab

# Of the controller's requests in trouble, for each second that it lasts: what its watches, its lease, and a handful of
# keys that are tried again later each time may ask.
PER_SECOND = 40


@contextlib.contextmanager
def proxied_controller(lab: Lab) -> Iterator[tuple[Controller, KubeProxy]]:
    """A controller that is ready, and its way to the API server."""
    install_crds(lab)
    arguments = ["--log-level=debug", "--log-format=text"]
    with kube_proxy(lab) as way, Controller(lab, arguments=arguments, environment=way.environment) as running:
        running.wait_ready()
        yield running, way


@contextlib.contextmanager
def in_trouble(
    lab: Lab, site: Site, way: KubeProxy, controller: Controller, issuer: str, suffix: str, *, count: int = 5
) -> Iterator[None]:
    """Some Certificates are asked for; trouble, which the body makes and ends, meets them; all are issued once, and the
    next one too.

    Around an order that was placed but could not be remembered another one is placed: that costs no certificate.
    """
    site.certificate("before", [f"before.{suffix}"], issuer)
    serial = site.ready("before")["serialNumber"]
    site.nothing_left()
    since, mark, asked, start = lab.acme.mark(), lab.mark(), len(way.exchanges), time.monotonic()
    for number in range(count):
        site.certificate(f"web{number}", [f"web{number}.{suffix}"], issuer)
    yield
    site.certificate("after", [f"after.{suffix}"], issuer)
    names = [*(f"web{number}" for number in range(count)), "after"]
    # Even now its Lease may turn out to be lost.
    wait_for(lambda: kept_running(controller) and all(map(site.ended, names)), "an end of all", timeout=180, pause=0.5)
    assert [site.says(name) for name in names if site.status(name).get("nextAttemptTime")] == []
    for name in names:
        assert {each["outcome"] for each in site.ready(name)["recentOrders"]} == {"Issued"}
    count += 1
    seconds, requests = time.monotonic() - start, len(way.requests(asked))
    controller.restart()  # a clean-up that failed is left to the sweep, which also comes at the start
    controller.wait_ready()
    site.nothing_left()
    issued, orders = lab.acme.issued(since), lab.orders(mark)
    print(f"\n{issued} certificates, {orders} orders, {requests} requests to the API server in {seconds:.1f} s")
    assert issued == count
    assert count <= orders <= 2 * count
    assert requests <= 30 * count + PER_SECOND * seconds
    assert site.ready("before")["serialNumber"] == serial


def keep_running(controller: Controller, seconds: float) -> None:
    """What a kubelet does meanwhile: a controller that ended is started again."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        kept_running(controller)
        time.sleep(0.5)


def kept_running(controller: Controller) -> bool:
    """Whether it is ready, after it was started again if it had ended."""
    if controller.ended() is not None:
        controller.start()
    return controller.is_ready()


@dataclass
class FaultyCA:
    """A ClusterIssuer whose CA is behind a proxy, and what has reached that CA since."""

    issuer: str
    proxy: AcmeProxy
    lab: Lab
    since: int

    def counts(self) -> Counter[str]:
        """Requests that reached the CA, by kind."""
        return Counter(kind_of(each) for each in self.proxy.asked() if each.reached)

    def issued(self) -> int:
        """How many certificates the CA has issued."""
        return self.lab.acme.issued(self.since)


@contextlib.contextmanager
def faulty_ca(lab: Lab) -> Iterator[FaultyCA]:
    """A new ClusterIssuer with an account of its own at the lab's CA, through a new proxy."""
    admin = Site(lab, lab.namespace)
    with acme_proxy(lab) as (server, proxy):
        name = admin.cluster_issuer(f"faulty-{secrets.token_hex(3)}", ca=server)
        try:
            yield FaultyCA(name, proxy, lab, lab.acme.mark())
        finally:
            admin.delete(f"{CERTIFICATES}/clusterissuers/{name}")


def forged(
    site: Site,
    names: Sequence[str],
    *,
    life: tuple[timedelta, timedelta] = (-timedelta(hours=1), timedelta(days=90)),
    common_name: str = "forged",
    for_our_key: bool = True,
) -> Fault:
    """In place of the CA's certificate one for the CSR of the namespace's issuance, of another root.

    `life` is its begin and end, from now.
    """

    def respond(answer: Answer) -> Answer:
        if answer.status >= 400:
            return answer
        (pending,) = site.next_keys()
        key = _key_of(site, pending) if for_our_key else ec.generate_private_key(ec.SECP256R1()).public_key()
        return answer._replace(body=_chain(key, names, common_name, *life))

    return changed(respond)


def _key_of(site: Site, pending: str) -> CertificatePublicKeyTypes:
    return x509.load_der_x509_csr(site.secret_value(pending, "tls.csr")).public_key()


def _chain(
    key: CertificatePublicKeyTypes, names: Sequence[str], common_name: str, begin: timedelta, end: timedelta
) -> bytes:
    root_key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    root = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "another root")])

    def sign(
        subject: x509.Name, key: CertificatePublicKeyTypes, begin: timedelta, *extensions: x509.ExtensionType
    ) -> bytes:
        builder = x509.CertificateBuilder(
            subject_name=subject,
            issuer_name=root,
            public_key=key,
            serial_number=x509.random_serial_number(),
            not_valid_before=now + begin,
            not_valid_after=now + end,
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(root_key, hashes.SHA256()).public_bytes(Encoding.PEM)

    leaf = sign(
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)]),
        key,
        begin,
        x509.SubjectAlternativeName([x509.DNSName(name) for name in names]),
    )
    above = sign(root, root_key.public_key(), begin, x509.BasicConstraints(ca=True, path_length=0))
    return leaf + above
