"""The CRDs on the real API server: what is refused, with which words, and what is accepted."""

from __future__ import annotations

import subprocess
import urllib.error
from typing import Any

import msgspec
import pytest

from certbotk8s.domain import api
from tests.lab.controller import install_crds
from tests.lab.lab import Lab

Spec = dict[str, Any]
KINDS: dict[str, api.Kind[Any]] = {kind.kind: kind for kind in (api.CERTIFICATE, api.ISSUER, api.CLUSTER_ISSUER)}
# What is asked of an object in a test, and nothing is stored: neither a name nor a namespace of its own is needed.
STRICT_DRY_RUN = "?fieldValidation=Strict&dryRun=All"


@pytest.fixture(scope="module", autouse=True)
def _crds(lab: Lab) -> None:
    install_crds(lab)


def certificate(**changes: Any) -> Spec:
    """The spec of a good Certificate with these changes; a field given as None is left out."""
    spec = {"secretName": "web-tls", "issuerRef": {"name": "letsencrypt"}, "dnsNames": ["shop.example.test"], **changes}
    return {name: value for name, value in spec.items() if value is not None}


def acme(**changes: Any) -> Spec:
    """The spec of a good Issuer and ClusterIssuer with these changes."""
    good = {
        "server": "https://ca.example.test/directory",
        "privateKeySecretRef": {"name": "account"},
        "solvers": [{"http01": {"ingress": {}}}],
    }
    return {"acme": {name: value for name, value in {**good, **changes}.items() if value is not None}}


def policy(*rules: Spec) -> Spec:
    """The spec of a ClusterIssuer without solvers, with these rules."""
    return {**acme(solvers=None), "policy": {"rules": list(rules)}}


def rule(*patterns: str, **changes: Any) -> Spec:
    """A rule that allows these patterns to all namespaces, with these changes; a field given as None is left out."""
    made = {"namespaces": ["*"], "dnsNames": list(patterns or ["**"]), **changes}
    return {name: value for name, value in made.items() if value is not None}


def selector(**expression: Any) -> Spec:
    """A rule for the namespaces that a requirement selects."""
    return rule(namespaces=None, namespaceSelector={"matchExpressions": [{"key": "team", **expression}]})


def eab(**changes: Any) -> Spec:
    """The same with an external account binding."""
    return acme(externalAccountBinding={"keyID": "kid-1", "keySecretRef": {"name": "eab"}, **changes})


def create(lab: Lab, kind: str, spec: Spec) -> dict[str, Any]:
    """The object as it would be stored. urllib.error.HTTPError when the API server refuses it."""
    body = {"apiVersion": api.API_VERSION, "kind": kind, "metadata": {"name": "sample"}, "spec": spec}
    return lab.api(KINDS[kind].path("default") + STRICT_DRY_RUN, body=body)


REFUSED = [
    # no names
    ("Certificate", certificate(dnsNames=None), "spec.dnsNames: Required value: give at least one DNS name"),
    ("Certificate", certificate(dnsNames=[]), "spec.dnsNames: Required value: give at least one DNS name"),
    (
        "Certificate",
        certificate(dnsNames=[], commonName=""),
        "spec.dnsNames: Required value: give at least one DNS name",
    ),
    # an empty or malformed DNS name
    ("Certificate", certificate(dnsNames=[""]), "spec.dnsNames[0]: "),
    *(
        ("Certificate", certificate(dnsNames=["good.example.test", name]), "spec.dnsNames[1]: ")
        for name in (
            "a..example.test",
            ".example.test",
            "-a.example.test",
            "a-.example.test",
            "a b.example.test",
            "a_b.example.test",
            "*",
            "*example.test",
            "a.*.example.test",
            "*.*.example.test",
            "https://example.test",
            "example.test/",
            "user@example.test",
            "example.test\n",
            f"{'a' * 64}.example.test",
            ".".join(["a" * 50] * 6),
        )
    ),
    ("Certificate", certificate(dnsNames=["192.0.2.1"]), 'spec.dnsNames[0]: Invalid value: "192.0.2.1": must be a DNS'),
    ("Certificate", certificate(dnsNames=["2001:db8::1"]), "spec.dnsNames[0]: "),
    ("Certificate", certificate(dnsNames=[f"{n}.example.test" for n in range(101)]), "spec.dnsNames: Too many: 101"),
    # commonName over 64 or not among the names
    (
        "Certificate",
        certificate(dnsNames=None, commonName=f"{'a' * 53}.example.test"),
        'spec.commonName: Invalid value: "aaa',
    ),
    (
        "Certificate",
        certificate(commonName="other.example.test"),
        "spec.commonName: Invalid value: commonName must be one",
    ),
    (
        "Certificate",
        certificate(dnsNames=None, commonName="a..b"),
        'spec.commonName: Invalid value: "a..b": must be a DNS',
    ),
    ("Certificate", certificate(dnsNames=None, commonName="192.0.2.1"), "spec.commonName: "),
    # key size outside its algorithm
    *(
        (
            "Certificate",
            certificate(privateKey={"algorithm": algorithm, "size": size}),
            f"spec.privateKey.size: Invalid value: an {algorithm} key has",
        )
        for algorithm, size in [("RSA", 0), ("RSA", 256), ("RSA", 2047), ("RSA", 8192), ("ECDSA", 255), ("ECDSA", 2048)]
    ),
    ("Certificate", certificate(privateKey={"size": 1024}), "spec.privateKey.size: Invalid value: an RSA key has"),
    (
        "Certificate",
        certificate(privateKey={"algorithm": "Ed25519"}),
        'spec.privateKey.algorithm: Invalid value: "Ed25519": Ed25519 is signed by no public CA; use ECDSA or RSA',
    ),
    (
        "Certificate",
        certificate(privateKey={"algorithm": "DSA"}),
        'spec.privateKey.algorithm: Invalid value: "DSA": must',
    ),
    ("Certificate", certificate(privateKey={"encoding": "DER"}), 'spec.privateKey.encoding: Unsupported value: "DER"'),
    (
        "Certificate",
        certificate(privateKey={"rotationPolicy": "No"}),
        "spec.privateKey.rotationPolicy: Unsupported value",
    ),
    # issuerRef of an unknown kind
    (
        "Certificate",
        certificate(issuerRef={"name": "ca", "kind": "VaultIssuer"}),
        'spec.issuerRef.kind: Unsupported value: "VaultIssuer": supported values: "Issuer", "ClusterIssuer"',
    ),
    (
        "Certificate",
        certificate(issuerRef={"name": "ca", "group": "cert-manager.io"}),
        'spec.issuerRef.group: Invalid value: "cert-manager.io": must be certbotk8s.io, or left out',
    ),
    ("Certificate", certificate(issuerRef={"kind": "Issuer"}), "spec.issuerRef.name: Required value"),
    ("Certificate", certificate(issuerRef={"name": ""}), "spec.issuerRef.name: "),
    ("Certificate", certificate(issuerRef=None), "spec.issuerRef: Required value"),
    # http:// server
    *(
        (
            kind,
            acme(server="http://ca.example.test/directory"),
            'spec.acme.server: Invalid value: "http://ca.example.test',
        )
        for kind in ("Issuer", "ClusterIssuer")
    ),
    ("Issuer", acme(server="https://"), 'spec.acme.server: Invalid value: "https://": must be the URL of an ACME'),
    ("Issuer", acme(server="https://user@ca.example.test/"), "spec.acme.server: "),
    (
        "Issuer",
        acme(server="ca.example.test"),
        'spec.acme.server: Invalid value: "ca.example.test": must begin with https',
    ),
    ("Issuer", acme(server=None), "spec.acme.server: Required value"),
    ("Issuer", acme(privateKeySecretRef=None), "spec.acme.privateKeySecretRef: Required value"),
    # both renewBefore and renewBeforePercentage
    (
        "Certificate",
        certificate(renewBefore="360h", renewBeforePercentage=30),
        "spec.renewBefore: Invalid value: renewBefore and renewBeforePercentage exclude each other; remove one of them",
    ),
    *(
        ("Certificate", certificate(renewBefore=text), f'spec.renewBefore: Invalid value: "{text}": must be a duration')
        for text in ("0s", "0h0m", "30", "30d", "-1h", "1h 30m", "1m1h", "soon", "9999999h")
    ),
    ("Certificate", certificate(renewBeforePercentage=0), "spec.renewBeforePercentage: Invalid value: 0"),
    ("Certificate", certificate(renewBeforePercentage=100), "spec.renewBeforePercentage: Invalid value: 100"),
    # secretName that is no DNS subdomain
    *(
        (
            "Certificate",
            certificate(secretName=name),
            f'spec.secretName: Invalid value: "{name}": must be an object name',
        )
        for name in ("Web-TLS", "web_tls", "-web", "web-", "web..tls", "web/tls")
    ),
    ("Certificate", certificate(secretName=""), "spec.secretName: "),
    ("Certificate", certificate(secretName="a" * 254), "spec.secretName: Too long"),
    ("Certificate", certificate(secretName=None), "spec.secretName: Required value"),
    # unknown fields
    ("Certificate", certificate(duration="2160h"), 'unknown field "spec.duration"'),
    ("Certificate", certificate(privateKey={"bits": 2048}), 'unknown field "spec.privateKey.bits"'),
    ("Issuer", acme(skipTLSVerify=True), 'unknown field "spec.acme.skipTLSVerify"'),
    ("ClusterIssuer", acme(solvers=[{"dns01": {"route53": {}}}]), 'unknown field "spec.acme.solvers[0].dns01"'),
    # solvers
    (
        "ClusterIssuer",
        acme(solvers=None),
        "spec.policy: Required value: a ClusterIssuer without solvers needs a policy",
    ),
    ("ClusterIssuer", acme(solvers=[]), "spec.policy: Required value: a ClusterIssuer without solvers needs a policy"),
    # the policy
    ("Issuer", {**acme(), "policy": {"rules": []}}, 'unknown field "spec.policy"'),
    ("ClusterIssuer", {**acme(), "policy": {}}, "spec.policy.rules: Required value"),
    *(
        ("ClusterIssuer", policy(rule("good.example.test", pattern)), "spec.policy.rules[0].dnsNames[1]: ")
        for pattern in (
            "",
            "*",
            "***",
            "**example.test",
            "a.*.example.test",
            "a.**.example.test",
            "*.*.example.test",
            "***.example.test",
            "a*.example.test",
            "a..example.test",
            "-a.example.test",
            "a_b.example.test",
            "example.test\n",
        )
    ),
    ("ClusterIssuer", policy(rule("*")), 'Invalid value: "*": must be a DNS name, or a pattern such as *.example.org'),
    ("ClusterIssuer", policy(rule(dnsNames=[])), "spec.policy.rules[0].dnsNames: Invalid value: "),
    ("ClusterIssuer", policy(rule(dnsNames=None)), "spec.policy.rules[0].dnsNames: Required value"),
    ("ClusterIssuer", policy(rule(ipRanges=["192.0.2.0/24"])), 'unknown field "spec.policy.rules[0].ipRanges"'),
    (
        "ClusterIssuer",
        policy(rule(namespaces=None)),
        "spec.policy.rules[0].namespaces: Invalid value: give either namespaces or namespaceSelector",
    ),
    (
        "ClusterIssuer",
        policy(rule(namespaceSelector={})),
        "spec.policy.rules[0].namespaces: Invalid value: give either namespaces or namespaceSelector",
    ),
    ("ClusterIssuer", policy(rule(namespaces=[])), "spec.policy.rules[0].namespaces: Invalid value: "),
    *(
        ("ClusterIssuer", policy(rule(namespaces=[name])), "spec.policy.rules[0].namespaces[0]: ")
        for name in ("", "**", "team-*", "Shop", "a.b", "a" * 64)
    ),
    (
        "ClusterIssuer",
        policy(selector(operator="Is")),
        "spec.policy.rules[0].namespaceSelector.matchExpressions[0].operator: Unsupported value",
    ),
    *(
        (
            "ClusterIssuer",
            policy(selector(**expression)),
            "matchExpressions[0].values: Invalid value: In and NotIn need values; Exists and DoesNotExist take none",
        )
        for expression in (
            {"operator": "In"},
            {"operator": "NotIn", "values": []},
            {"operator": "Exists", "values": ["a"]},
        )
    ),
    (
        "Issuer",
        acme(solvers=[{"http01": {"ingress": {}}}] * 2),
        "spec.acme.solvers: Invalid value: give one solver at most",
    ),
    ("Issuer", acme(solvers=[{}]), "spec.acme.solvers[0].http01: Required value: choose how the solver proves"),
    (
        "Issuer",
        acme(solvers=[{"http01": {}}]),
        "spec.acme.solvers[0].http01.ingress: Required value: choose how the token",
    ),
    (
        "Issuer",
        acme(solvers=[{"http01": {"ingress": {"ingressClassName": "My Class"}}}]),
        'spec.acme.solvers[0].http01.ingress.ingressClassName: Invalid value: "My Class"',
    ),
    # the account
    ("Issuer", acme(email="admin"), 'spec.acme.email: Invalid value: "admin": must be one bare e-mail address'),
    ("Issuer", acme(email="a@example.test, b@example.test"), "spec.acme.email: Invalid value: "),
    ("Issuer", eab(keyAlgorithm="HS1"), 'spec.acme.externalAccountBinding.keyAlgorithm: Unsupported value: "HS1"'),
    ("Issuer", eab(keyID=None), "spec.acme.externalAccountBinding.keyID: "),
    ("Issuer", eab(keyID=""), "spec.acme.externalAccountBinding.keyID: "),
    ("Issuer", eab(keySecretRef={"name": "EAB"}), "spec.acme.externalAccountBinding.keySecretRef.name: Invalid value"),
    (
        "Issuer",
        eab(keySecretRef={"name": "eab", "key": "a/b"}),
        'spec.acme.externalAccountBinding.keySecretRef.key: Invalid value: "a/b": must be a key of a Secret',
    ),
    ("Issuer", acme(caBundle="%%%"), "spec.acme.caBundle: "),
    ("Issuer", acme(maxConcurrentOrders=0), "spec.acme.maxConcurrentOrders: Invalid value: 0"),
    ("ClusterIssuer", acme(maxConcurrentOrders=10001), "spec.acme.maxConcurrentOrders: Invalid value: 10001"),
    ("Issuer", acme(caBundle="bm8gUEVN"), 'spec.acme.caBundle: Invalid value: "bm8gUEVN": must be PEM certificates'),
]


@pytest.mark.parametrize(("kind", "spec", "words"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_refused_by_name(lab: Lab, kind: str, spec: Spec, words: str) -> None:
    """The API server refuses it, names the field and says what to do.

    Fails when the rule, limit or enum of that field is removed from the CRD.
    """
    with pytest.raises(urllib.error.HTTPError) as caught:
        create(lab, kind, spec)
    message = msgspec.json.decode(str(caught.value.reason).partition(": ")[2])["message"]
    assert caught.value.code in (400, 422)
    assert words in message


ACCEPTED = [
    ("Certificate", certificate()),
    ("Certificate", certificate(dnsNames=None, commonName="shop.example.test")),
    ("Certificate", certificate(dnsNames=[], commonName="*.example.test")),
    ("Certificate", certificate(dnsNames=["Shop.Example.Test"], commonName="shop.example.test")),
    ("Certificate", certificate(dnsNames=[f"{n}.example.test" for n in range(100)], commonName="99.example.test")),
    (
        "Certificate",
        certificate(
            dnsNames=[
                "*.example.test",
                "intranet",
                "trailing.dot.example.test.",
                "xn--bcher-kva.example.test",
                "bücher.example.test",
                "例え.テスト",
                "col·legi.example.test",
                "1.example.test",
                f"{'a' * 63}.example.test",
            ]
        ),
    ),
    *(
        ("Certificate", certificate(privateKey={"algorithm": algorithm, "size": size}))
        for algorithm, size in [
            ("RSA", 2048),
            ("RSA", 3072),
            ("RSA", 4096),
            ("ECDSA", 256),
            ("ECDSA", 384),
            ("ECDSA", 521),
        ]
    ),
    *(("Certificate", certificate(renewBefore=text)) for text in ("360h", "30m", "30s", "1h30m", "1.5h", "2592000s")),
    ("Certificate", certificate(renewBefore="", renewBeforePercentage=99, commonName="", profile="")),
    ("Certificate", certificate(issuerRef={"name": "ca", "kind": "ClusterIssuer", "group": "certbotk8s.io"})),
    ("Issuer", acme(solvers=None)),
    ("Issuer", acme(email="", profile="")),
    ("Issuer", acme(maxConcurrentOrders=1)),
    ("ClusterIssuer", acme(maxConcurrentOrders=10000)),
    ("Issuer", acme(caBundle="LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0tCg==", email="certificates@example.test")),
    ("Issuer", eab(keyAlgorithm="HS512")),
    ("ClusterIssuer", policy()),
    ("ClusterIssuer", {**acme(), "policy": {"rules": [rule("pay.example.test", namespaces=["shop", "pay"])]}}),
    (
        "ClusterIssuer",
        policy(
            rule(
                "**",
                "**.example.test",
                "*.Example.Test",
                "*.bücher.example.test.",
                "intranet",
                "xn--bcher-kva.example.test",
                f"**.{'a' * 63}.example.test",
            ),
            rule(namespaces=None, namespaceSelector={}),
            rule(namespaces=None, namespaceSelector={"matchLabels": {"team": "web"}}),
            selector(operator="In", values=["a", "b"]),
            selector(operator="DoesNotExist"),
        ),
    ),
    ("ClusterIssuer", policy(*[rule(*[f"{n}.example.test" for n in range(20)])] * 500)),
    ("ClusterIssuer", acme(profile="shortlived", solvers=[{"http01": {"ingress": {"ingressClassName": "traefik"}}}])),
]


@pytest.mark.parametrize(("kind", "spec"), ACCEPTED)
def test_good_input_is_accepted(lab: Lab, kind: str, spec: Spec) -> None:
    """Every form that is meant to work is stored as it was given. Fails when a rule is stricter than its message."""
    stored = create(lab, kind, spec)["spec"]
    plain = {name: value for name, value in spec.items() if not isinstance(value, dict)}
    assert {name: stored[name] for name in plain} == plain


def test_defaults_are_filled_in(lab: Lab) -> None:
    """An object with the least that is required carries the documented defaults, and no more.

    Fails when `privateKey` loses its `default: {}`, without which its members' defaults do not come into being.
    """
    assert create(lab, "Certificate", certificate())["spec"] == {
        "secretName": "web-tls",
        "dnsNames": ["shop.example.test"],
        "issuerRef": {"name": "letsencrypt", "kind": "Issuer", "group": "certbotk8s.io"},
        "privateKey": {"algorithm": "RSA", "encoding": "PKCS1", "rotationPolicy": "Always"},
    }
    assert create(lab, "Issuer", eab())["spec"]["acme"] == {
        "server": "https://ca.example.test/directory",
        "privateKeySecretRef": {"name": "account", "key": "tls.key"},
        "externalAccountBinding": {
            "keyID": "kid-1",
            "keySecretRef": {"name": "eab", "key": "secret"},
            "keyAlgorithm": "HS256",
        },
        "accountKeyAlgorithm": "ECDSA",
        "commonName": "Auto",
        "maxConcurrentOrders": 200,
        "solvers": [{"http01": {"ingress": {}}}],
    }


def test_kubectl_refuses_what_is_unknown(lab: Lab, namespace: str) -> None:
    """kubectl apply, with its own defaults, names an unknown field and stores nothing.

    Fails when the schema keeps unknown fields.
    """
    manifest = msgspec.json.encode(
        {
            "apiVersion": api.API_VERSION,
            "kind": "Certificate",
            "metadata": {"name": "web", "namespace": namespace},
            "spec": certificate(isCA=True),
        }
    ).decode()
    with pytest.raises(subprocess.CalledProcessError) as caught:
        lab.kubectl("apply", "-f", "-", input=manifest)
    assert 'unknown field "spec.isCA"' in caught.value.stderr
    assert lab.kubectl("get", "certificates.certbotk8s.io", "-n", namespace, "-o", "name") == ""


def test_kubectl_finds_and_shows_the_objects(lab: Lab, namespace: str) -> None:
    """Short names, the category, the columns and the field selectors work in kubectl.

    Fails when Expires is a column of type date (a time to come would read <invalid>), or when a short name is dropped.
    """
    status = {
        "notAfter": "2099-01-19T12:00:00Z",
        "renewalTime": "2098-12-20T12:00:00Z",
        "conditions": [
            {
                "type": "Ready",
                "status": "True",
                "reason": "Ready",
                "message": "Up to date",
                "lastTransitionTime": "2026-11-21T12:00:00Z",
            }
        ],
    }
    store(lab, "Certificate", namespace, "web", certificate(), status)
    store(lab, "Certificate", namespace, "api", certificate(secretName="api-tls"))
    store(lab, "Issuer", namespace, "ca", acme(), {"conditions": status["conditions"]})
    store(lab, "ClusterIssuer", "", namespace, acme())
    try:
        table = [line.split() for line in lab.kubectl("get", "cbcert", "web", "-n", namespace).splitlines()]
        wide = lab.kubectl("get", "cbcert", "web", "-n", namespace, "-o", "wide").splitlines()
        issuers = [line.split()[:-1] for line in lab.kubectl("get", "cbiss", "-n", namespace).splitlines()]
        assert lab.kubectl("get", "cbciss", namespace, "-o", "name") == f"clusterissuer.certbotk8s.io/{namespace}\n"
        assert set(lab.kubectl("get", "certbotk8s", "-n", namespace, "-o", "name").split()) >= {
            "certificate.certbotk8s.io/web",
            "certificate.certbotk8s.io/api",
            "issuer.certbotk8s.io/ca",
        }
        for selector in ("spec.secretName=api-tls,spec.issuerRef.kind=Issuer", "spec.issuerRef.name=letsencrypt"):
            found = lab.kubectl("get", "cbcert", "-n", namespace, f"--field-selector={selector}", "-o", "name")
            assert "certificate.certbotk8s.io/api" in found.split()
            assert ("certificate.certbotk8s.io/web" in found) == ("secretName" not in selector)
    finally:
        lab.kubectl("delete", "cbciss", namespace)
    assert table == [
        ["NAME", "READY", "SECRET", "ISSUER", "STATUS", "EXPIRES"],
        ["web", "True", "web-tls", "letsencrypt", "Up", "to", "date", "2099-01-19T12:00:00Z"],
    ]
    assert wide[0].split()[-2:] == ["RENEWS", "NAMES"]
    assert wide[1].split()[-2:] == ["2098-12-20T12:00:00Z", '["shop.example.test"]']
    assert issuers == [
        ["NAME", "READY", "SERVER", "STATUS"],
        ["ca", "True", "https://ca.example.test/directory", "Up", "to", "date"],
    ]


def test_explain_prints_the_descriptions(lab: Lab) -> None:
    """`kubectl explain` shows every field of the spec with its sentence. Fails when a description is removed."""
    text = lab.kubectl("explain", "certificates.spec", f"--api-version={api.API_VERSION}")
    words = " ".join(text.split())
    assert "dnsNames <[]string> The DNS names to certify" in words
    assert "renewBefore <string> How long before its expiry the certificate is renewed" in words
    assert "secretName <string> -required- Name of the kubernetes.io/tls Secret to write" in words
    assert "<no description>" not in text


def store(lab: Lab, kind: str, namespace: str, name: str, spec: Spec, status: Spec | None = None) -> None:
    """An object of that name, with that status."""
    identity = {"apiVersion": api.API_VERSION, "kind": kind, "metadata": {"name": name}}
    stored = lab.api(KINDS[kind].path(namespace), body={**identity, "spec": spec})
    if status:
        path = KINDS[kind].path(namespace, name, "status")
        lab.api(path, method="PUT", body={**stored, "status": status})
