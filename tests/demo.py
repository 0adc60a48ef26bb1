"""`make demo`: an annotated Ingress gets HTTPS, on real parts, as it happens.

`make demo CA=incommon`: a campus CA with External Account Binding, slow and without challenges, for two tenants.

Shows each step when it is seen from outside (the API server, Traefik, the CA's log), never from within the controller.
With --once it ends after the proof, with status 0 only if every step was seen; without, it stays to be looked at.
"""

from __future__ import annotations

import argparse
import http.client
import signal
import ssl
import sys
import threading
import time
import urllib.request
from collections import Counter
from typing import Any

import msgspec
from cryptography import x509

from tests.lab.acme_proxy import kind_of
from tests.lab.api import https_context
from tests.lab.controller import Controller, install_crds
from tests.lab.errors import LabError
from tests.lab.lab import Lab, running_lab
from tests.lab.presets import BoundCA, preset_ca
from tests.site import CERTIFICATES, Site, wait_for

HOST, SHORT_HOST = "shop.example.test", "brief.example.test"
CAMPUS_HOST = "app.example.edu"
CAMPUS_PACE = 0.1  # of the time that the real CA takes


class Missed(Exception):
    """A step that did not happen."""


def say(label: str, text: str) -> None:
    """One line: a label or a time, and what happened."""
    print(f"{label:<8} {text}", flush=True)


class Timeline:
    """Seconds since something was applied, and the Certificates of a namespace as a watch shows them."""

    def __init__(self, lab: Lab, namespace: str) -> None:
        self._lab = lab
        self._path = f"{CERTIFICATES}/namespaces/{namespace}/certificates"
        self._start = 0.0
        self._seen = threading.Condition()
        self._certificates: list[tuple[float, dict[str, Any]]] = []
        self._ready = threading.Event()

    def begin(self) -> None:
        """Watch, and count from now."""
        threading.Thread(target=self._watch, daemon=True).start()
        if not self._ready.wait(10):
            raise Missed("The API server did not start to watch Certificates.")
        self._start = time.monotonic()

    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._start

    def _watch(self) -> None:
        request = urllib.request.Request(
            f"{self._lab.api_server}{self._path}?watch=true", headers={"Authorization": f"Bearer {self._lab.api_token}"}
        )
        with urllib.request.urlopen(request, context=https_context(self._lab.api_ca_bundle), timeout=600) as stream:
            self._ready.set()
            for line in stream:
                event = msgspec.json.decode(line)
                with self._seen:
                    self._certificates.append((self.seconds(), event["object"]))
                    self._seen.notify_all()

    def first(self, what: str, test: Any, *, timeout: float = 60) -> tuple[float, dict[str, Any]]:
        """When the Certificate first fulfilled `test`, and how it was then."""
        end = time.monotonic() + timeout
        with self._seen:
            while True:
                for at, certificate in self._certificates:
                    if certificate["metadata"]["name"] == "web-tls" and test(certificate.get("status") or {}):
                        return at, certificate
                left = end - time.monotonic()
                if left <= 0:
                    words = self._certificates[-1][1].get("status") if self._certificates else "nothing"
                    raise Missed(f"{what}: not seen within {timeout:.0f} s. The Certificate says: {words}")
                self._seen.wait(left)


def challenge_served(lab: Lab, challenge: dict[str, str]) -> bool:
    """Whether Traefik answers a challenge as the CA will ask for it."""
    connection = http.client.HTTPConnection("127.0.0.1", lab.http_port, timeout=5)
    try:
        path = f"/.well-known/acme-challenge/{challenge['token']}"
        connection.request("GET", path, headers={"Host": challenge["identifier"]})
        answer = connection.getresponse()
        return answer.status == 200 and answer.read().decode() == challenge["keyAuthorization"]
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def issue(site: Site) -> None:
    """The main job, from the annotated Ingress to a verified HTTPS answer."""
    lab = site.lab
    time.sleep(0.5)  # the controller's own start is no part of the count
    mark, timeline = lab.mark(), Timeline(lab, site.namespace)
    say("apply", f"Ingress shop/web (host {HOST}, certbotk8s.io/cluster-issuer: pebble)")
    timeline.begin()
    site.ingress("web", [([HOST], "web-tls")], "pebble")
    at, _ = timeline.first("The Certificate", lambda _: True)
    say(f"{at:5.2f} s", "Certificate shop/web-tls created from the Ingress")
    at, _ = timeline.first("The order", lambda status: status.get("issuance", {}).get("orderURL"))
    say(f"{at:5.2f} s", f"order placed at {lab.acme.directory} (account bound to EAB key kid-1)")
    _, certificate = timeline.first("The challenge", lambda status: status.get("issuance", {}).get("challenges"))
    challenge = certificate["status"]["issuance"]["challenges"][0]
    wait_for(lambda: challenge_served(lab, challenge), "The challenge is served through Traefik", pause=0.005)
    say(f"{timeline.seconds():5.2f} s", f"challenge for {HOST} served through Traefik")
    at, _ = timeline.first("The validation", lambda status: status.get("issuance", {}).get("state") == "Finalizing")
    say(f"{at:5.2f} s", f"CA validated {HOST} by HTTP-01")
    at, certificate = timeline.first("Ready", lambda status: status.get("serialNumber"))
    status = certificate["status"]
    say(
        f"{at:5.2f} s",
        f"Secret shop/web-tls written: valid until {status['notAfter'][:10]}, renews {status['renewalTime'][:10]}",
    )
    root = lab.acme.root_pem()
    wait_for(lambda: site.served(HOST).serial == status["serialNumber"], "Traefik serves the new certificate")
    body = site.request(HOST, root)
    subject = x509.load_pem_x509_certificate(root).subject.rfc4514_string().removeprefix("CN=")
    answered = f'https://{HOST} answers "{body.strip()}" with it; chain verified to "{subject}"'
    say(f"{timeline.seconds():5.2f} s", answered)
    site.nothing_left()
    site.event("web-tls", "Issued")
    requests = [request for request in lab.acme_requests(mark) if not request.is_new_nonce]
    # The creation of the Certificate and its Event belong to the Ingress, not to the issuance.
    writes = [write for write in lab.kube_writes(mark) if (write.verb, write.resource) != ("create", "certificates")]
    say("", f"{len(requests)} requests to the CA, {len(writes) - 1} writes to Kubernetes, nothing left behind")


def renew(site: Site) -> None:
    """A certificate that lives a minute is replaced while it is in use."""
    site.certificate("brief-tls", [SHORT_HOST], "pebble", profile="shortlived")
    first = site.ready("brief-tls")["serialNumber"]
    site.ingress("brief", [([SHORT_HOST], "brief-tls")])
    wait_for(lambda: site.served(SHORT_HOST).serial == first, "Traefik serves the short-lived certificate")
    say("renew", "a certificate that lives 60 s (profile shortlived) is asked for over TLS 10 times a second ...")
    root, start, asked = site.lab.acme.root_pem(), time.monotonic(), 0
    while (served := site.served(SHORT_HOST, root=root)).serial == first:
        asked += 1
        if time.monotonic() - start > 60:
            raise Missed("The short-lived certificate was not renewed in its life.")
        if served.not_after < time.time():
            raise Missed("An expired certificate was served.")
        time.sleep(0.1)
    seconds = time.monotonic() - start
    say("", f"serial {first[:4]}.. -> {served.serial[:4]}.. after {seconds:.0f} s; {asked + 1} requests, none failed")


def look_around(lab: Lab) -> None:
    """How to see more."""
    print(
        f"""
Look around from another terminal:
  export KUBECONFIG={lab.kubeconfig} PATH={lab.bin}:$PWD/.venv/bin:$PATH
  certctl status -A
  certctl status -n shop web-tls
  kubectl -n shop describe certificates.certbotk8s.io web-tls
  kubectl -n shop get events
  curl --cacert <(curl -sk {lab.acme.root}) --resolve {HOST}:{lab.https_port}:127.0.0.1 https://{HOST}:{lab.https_port}/
Logs: {lab.logs}
Ctrl-C ends it all.""",
        flush=True,
    )


def campus(lab: Lab, ca: BoundCA, once: bool) -> None:
    """Two tenants of a campus CA: one gets a certificate without challenge, the other is refused that name."""
    first, second = (Site(lab, name) for name in ("app", "physics"))
    for site in (first, second):
        lab.api("/api/v1/namespaces", body={"metadata": {"name": site.namespace}})
    admin = Site(lab, lab.namespace)
    rules = [
        {"namespaces": ["app"], "dnsNames": [CAMPUS_HOST]},
        {"namespaces": ["physics"], "dnsNames": ["**.physics.example.edu"]},
    ]
    admin.put_secret("incommon-eab", {"secret": lab.eab["kid-1"].encode()})
    acme = admin.acme_spec("incommon", ca=ca.seen, solvers=None, profile=None)
    manifest = {"apiVersion": "certbotk8s.io/v1", "kind": "ClusterIssuer", "metadata": {"name": "incommon"}}
    admin.create(f"{CERTIFICATES}/clusterissuers", manifest | {"spec": {"acme": acme, "policy": {"rules": rules}}})
    admin.issuer_condition("ClusterIssuer", "incommon", "True")
    say("issuer", "ClusterIssuer incommon ready: account bound to key id kid-1, no solver; its policy:")
    for rule in rules:
        say("", f"namespace {rule['namespaces'][0]} may have {rule['dnsNames'][0]}")
    ca.validate(admin.secret_value("incommon-account", "tls.key"), CAMPUS_HOST)
    say("portal", f"the institution has {CAMPUS_HOST} validated at the CA, once for all orders")
    time.sleep(0.5)

    mark, asked, timeline = lab.mark(), len(ca.proxy.exchanges), Timeline(lab, "app")
    say("apply", f"Certificate app/web-tls ({CAMPUS_HOST}, issuerRef: ClusterIssuer incommon)")
    timeline.begin()
    first.certificate("web-tls", [CAMPUS_HOST], "incommon", privateKey={"algorithm": "RSA"})
    at, _ = timeline.first("The order", lambda status: status.get("issuance", {}).get("orderURL"))
    say(f"{at:5.2f} s", f"order placed at {ca.seen.directory}: born ready, no challenge")
    at, _ = timeline.first("Finalize", lambda status: status.get("issuance", {}).get("state") == "Finalizing")
    say(f"{at:5.2f} s", "finalize sent with the CSR of a stored key; the CA checks the organisation")
    waiting = first.condition("web-tls", "Issuing", "True", "OrderPending", "processing")
    say(f"{timeline.seconds():5.2f} s", waiting["message"])
    at, certificate = timeline.first("Ready", lambda status: status.get("serialNumber"))
    status = certificate["status"]
    say(
        f"{at:5.2f} s",
        f"Secret app/web-tls written: valid until {status['notAfter'][:10]}, renews {status['renewalTime'][:10]}",
    )
    first.nothing_left()
    first.event("web-tls", "Issued")
    requests = Counter(kind_of(each) for each in ca.proxy.asked(asked))
    looks = requests["order"] - 1
    if requests - Counter(order=looks) != Counter(newOrder=1, finalize=1, order=1, certificate=1):
        raise Missed(f"4 requests, and looks at the order, were expected. The CA was asked {dict(requests)}.")
    say(
        "",
        f"4 requests to the CA and {looks} more looks at the order, {len(lab.kube_writes(mark))} writes to Kubernetes, "
        "nothing left behind",
    )

    asked, timeline = len(ca.proxy.exchanges), Timeline(lab, "physics")
    say("apply", f"Certificate physics/web-tls ({CAMPUS_HOST}, which is not its own)")
    timeline.begin()
    second.certificate("web-tls", [CAMPUS_HOST], "incommon")
    refusal = second.condition("web-tls", "Ready", "False", "NotAllowed")
    say(f"{timeline.seconds():5.2f} s", refusal["message"])
    if ca.proxy.exchanges[asked:]:
        raise Missed("The CA was asked for a name that the policy does not allow.")
    say("", "the CA was asked nothing")
    if not once:
        print(
            f"""
Look around from another terminal:
  export KUBECONFIG={lab.kubeconfig} PATH={lab.bin}:$PWD/.venv/bin:$PATH
  certctl status -A
  kubectl describe clusterissuers.certbotk8s.io incommon
  kubectl -n physics get events
Logs: {lab.logs}
Ctrl-C ends it all.""",
            flush=True,
        )
        signal.pause()


def show(once: bool, ca: str = "") -> None:
    """The demo; raises Missed, AssertionError or LabError when a step was not seen."""
    with running_lab() as running:
        lab = running.lab
        install_crds(lab)
        with Controller(lab) as controller:
            controller.wait_ready()
            if ca:
                with preset_ca(lab, ca, scale=CAMPUS_PACE) as bound:
                    campus(lab, bound, once)
                return
            lab.api("/api/v1/namespaces", body={"metadata": {"name": "shop"}})
            site = Site(lab, "shop")
            admin = Site(lab, lab.namespace)
            admin.cluster_issuer("pebble")
            say("issuer", "ClusterIssuer pebble ready: account registered with External Account Binding kid-1")
            with site.application():
                issue(site)
                renew(site)
                if not once:
                    look_around(lab)
                    signal.pause()


def main() -> int:
    """0 only if every step was seen."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end after the proof")
    parser.add_argument("--ca", choices=["incommon"], help="a CA that binds accounts, instead of plain Pebble")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    arguments = parser.parse_args()
    once = arguments.once
    try:
        show(once, "incommon-certinext" if arguments.ca else "")
    except KeyboardInterrupt:
        return 130 if once else 0
    except (Missed, AssertionError, LabError, OSError, ssl.SSLError) as error:
        print(f"demo     FAILED: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
