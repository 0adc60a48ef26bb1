"""The Secrets of a Certificate: the tls Secret that people use, and the next-key Secret of an issuance under way.

Secrets are created by POST (a taken name is read and judged) and changed by apply with uid and resourceVersion; `type`
is never fought. A reference in status or a name proves nothing: our label and the Certificate's UID do.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from certbotk8s.domain import api, pem
from certbotk8s.domain.errors import AlreadyExists, Conflict, PermanentError
from certbotk8s.domain.names import common_name
from certbotk8s.domain.plan import Finding, Ownership, adoption_asked, immutable, key_size, misfit, ownership, when
from certbotk8s.domain.reasons import Reason
from certbotk8s.ports import call
from certbotk8s.reconcile.indexes import BY_OWNER
from certbotk8s.reconcile.status import report

if TYPE_CHECKING:
    from collections.abc import Generator
    from datetime import datetime

    from certbotk8s.domain.api import Certificate, Issuance, SecretFacts
    from certbotk8s.domain.plan import Observed
    from certbotk8s.ports import Cluster, KeyMaker

# Making a key has a pool of its own: RSA costs 0.1 s and more.
POOL = "keys"

# What stands in a next-key Secret beside the key: its CSR (DER), and the hash of the request that both were made for.
CSR = "tls.csr"
REQUEST = "request"

# A Secret that somebody else rewrites this often in this time is left alone: two controllers would go on for ever.
REWRITES = 5
REWRITES_WINDOW = timedelta(minutes=10)


def next_key_name(certificate: Certificate) -> str:
    """The one name of a Certificate's next-key Secret, so that two controllers cannot both store one."""
    meta = certificate.metadata
    return f"{meta.name[:200]}-{hashlib.sha256(meta.uid.encode()).hexdigest()[:8]}-next-key"


def _is_next_key(secret: SecretFacts | api.Secret) -> bool:
    return secret.metadata.labels.get(api.LABEL_ROLE) == api.ROLE_NEXT_KEY


def _belongs(secret: SecretFacts | api.Secret, certificate: Certificate) -> bool:
    uid = secret.metadata.annotations.get(api.ANNOTATION_CERTIFICATE_UID)
    return _is_next_key(secret) and uid == certificate.metadata.uid


def _pair(secret: api.Secret) -> tuple[bytes, bytes] | None:
    key, csr = pem.secret_value(secret.data, "tls.key"), pem.secret_value(secret.data, CSR)
    return (key, csr) if key and csr else None


def _encode(content: bytes) -> str:
    return base64.b64encode(content).decode()


class CertificateSecrets:
    """Reads and writes the Secrets of Certificates."""

    def __init__(self, cluster: Cluster, key_maker: KeyMaker) -> None:
        self._cluster = cluster
        self._key_maker = key_maker
        self._claimed: dict[str, list[datetime]] = {}

    # --- the tls Secret -----------------------------------------------------------------------------------------------

    def live(self, certificate: Certificate) -> SecretFacts | None:
        """The tls Secret as it is at this moment."""
        return self._cluster.get(pem.SECRET_FACTS, certificate.metadata.namespace, certificate.spec.secret_name)

    def claim(self, seen: Observed, found: SecretFacts) -> Finding | None:
        """Make an existing Secret ours as it is: one left behind, or one to be adopted. Orders nothing.

        The finding says why not; then nothing was touched.
        """
        if ownership(found, seen.certificate, seen.rivals) is not Ownership.LEFT:
            if not adoption_asked(seen.certificate):
                return Finding(
                    Reason.SECRET_NOT_OWNED,
                    f"Secret {found.key} exists and was not made by certbotk8s; it is not overwritten. Delete it, "
                    f"choose another secretName, or annotate this Certificate {api.ANNOTATION_ADOPT}=true to adopt it",
                )
            if lack := misfit(replace(seen, secret=found)):
                return Finding(
                    Reason.SECRET_NOT_OWNED,
                    f"Secret {found.key} was not made by certbotk8s and is not adopted, since it does not fit. "
                    f"{lack.message}. Delete it or choose another secretName",
                )
        if fight := self._fight(found.key, seen.now):
            return fight
        meta = found.metadata
        raw = self._cluster.get(api.SECRET, meta.namespace, meta.name)
        if raw is None or raw.metadata.resource_version != meta.resource_version:
            raise Conflict(f"Secret {found.key} changed while it was looked at")
        # Data that an earlier apply of ours set would be removed by an apply without it.
        data: dict[str, str] = {name: raw.data[name] for name in ("tls.crt", "tls.key") if name in raw.data}
        issued_by = meta.annotations.get(api.ANNOTATION_ISSUER, "")
        account_uri = meta.annotations.get(api.ANNOTATION_ACCOUNT_URI, "")
        self._apply(seen.certificate, found, data, issued_by, account_uri)
        report(
            self._cluster,
            "Certificate",
            seen.certificate,
            Reason.ADOPTED,
            f"Secret {found.key} is taken over as it is; nothing was ordered",
        )
        return None

    def _fight(self, secret: str, now: datetime) -> Finding | None:
        """Whether somebody else undoes what is written to a Secret; counts this writing of it."""
        times = [time for time in self._claimed.get(secret, []) if now - time < REWRITES_WINDOW]
        if len(times) < REWRITES:
            self._claimed[secret] = [*times, now]
            return None
        until = times[0] + REWRITES_WINDOW
        return Finding(
            Reason.SECRET_CONFLICT,
            f"Somebody else changed Secret {secret} {len(times)} times in 10 minutes, so that it is left alone until "
            f"{when(until)}. See who writes it: kubectl get secret --show-managed-fields",
        )

    def install(self, seen: Observed, chain: bytes, key: bytes, issuance: Issuance) -> None:
        """Write a checked certificate and its key; raises PermanentError when the Secret is not ours to write."""
        certificate, meta = seen.certificate, seen.certificate.metadata
        ref, account_uri = issuance.issuer_ref, issuance.account_uri
        data, issued_by = {"tls.crt": _encode(chain), "tls.key": _encode(key)}, f"{ref.kind}/{ref.name}"
        found = seen.secret
        if found is None:
            try:
                manifest = _tls_manifest(certificate, data, issued_by, account_uri)
                self._cluster.create(api.SECRET, manifest | {"type": "kubernetes.io/tls"})
            except AlreadyExists:
                found = self.live(certificate)
            else:
                return
        ours = {Ownership.OURS, Ownership.LEFT}
        if found is None or ownership(found, certificate, seen.rivals) not in ours:
            raise PermanentError(
                Reason.SECRET_NOT_OWNED,
                f"Secret {meta.namespace}/{certificate.spec.secret_name} was made by somebody else meanwhile; "
                "it is not overwritten.",
            )
        if unwritable := immutable(replace(seen, secret=found)):
            raise PermanentError(unwritable.reason, unwritable.message)
        self._apply(certificate, found, data, issued_by, account_uri)

    def _apply(
        self, certificate: Certificate, found: SecretFacts, data: dict[str, str], issued_by: str, account_uri: str
    ) -> None:
        manifest = _tls_manifest(certificate, data, issued_by, account_uri)
        manifest["metadata"] |= {"uid": found.metadata.uid, "resourceVersion": found.metadata.resource_version}
        self._cluster.apply(api.SECRET, manifest | {"type": found.type})

    # --- the next key -------------------------------------------------------------------------------------------------

    def store_next_key(self, seen: Observed, asked: str, found: SecretFacts | None) -> Generator[Any, Any, None]:
        """Have a new key pair and its CSR in a Secret before anybody is asked to certify it.

        `asked` is the request hash; `found` the live tls Secret. Raises Conflict when there is a next key already.
        """
        certificate, meta = seen.certificate, seen.certificate.metadata
        key = self._kept_key(certificate, found)
        if key is None:
            spec = certificate.spec.private_key
            key = yield from call(POOL, self._key_maker.certificate_key, spec.algorithm, key_size(spec), spec.encoding)
        acme = seen.issuer.spec.acme if seen.issuer else None
        csr = self._key_maker.csr(key, seen.names, common_name(certificate.spec, acme))
        try:
            self._cluster.create(api.SECRET, _next_key_manifest(certificate, key, csr, asked))
        except AlreadyExists:
            there = self._cluster.get(pem.SECRET_FACTS, meta.namespace, next_key_name(certificate))
            name = f"{meta.namespace}/{next_key_name(certificate)}"
            if there and not _belongs(there, certificate):
                raise PermanentError(
                    Reason.SECRET_NOT_OWNED,
                    f"Secret {name} stands where the next key must be stored, and was not made by certbotk8s. "
                    "Delete it.",
                ) from None
            raise Conflict(f"Secret {name} is in the way") from None

    def next_key(self, certificate: Certificate) -> tuple[bytes, bytes] | None:
        """(private key PEM, CSR DER) of the issuance under way, by a live read.

        None when there is none of ours, or somebody has emptied it.
        """
        secret = self._live_next_key(certificate)
        return _pair(secret) if secret else None

    def take_next_key(self, certificate: Certificate, asked: str) -> tuple[bytes, bytes] | None:
        """The same, to be certified for the request of that hash; one that cannot be is removed.

        The order under way is in status: nobody else uses a key for another, nor discards one from now on.
        """
        secret = self._live_next_key(certificate)
        if secret is None:
            return None
        pair, meta = _pair(secret), secret.metadata
        if pair is None or pem.secret_value(secret.data, REQUEST) != asked.encode():
            self._cluster.delete(api.SECRET, meta.namespace, meta.name, uid=meta.uid)
            return None
        if api.ANNOTATION_DISCARDED in meta.annotations:
            self._mark(secret, {})
        return pair

    def next_keys(self, seen: Observed) -> list[SecretFacts]:
        """The next keys that are there, as the cache knows."""
        meta = seen.certificate.metadata
        found = self._cluster.store(pem.SECRET_FACTS).find(BY_OWNER, meta.uid)
        return [secret for secret in found if secret.metadata.namespace == meta.namespace]

    def drop_next_keys(self, left: list[SecretFacts]) -> None:
        """Remove the keys of an issuance that has ended.

        They were looked up before its end was written to status, and that write was not refused: so nobody had begun
        another by then, and who begins one later discards what is there.
        """
        for secret in left:
            meta = secret.metadata
            self._cluster.delete(api.SECRET, meta.namespace, meta.name, uid=meta.uid)

    def discard_next_keys(self, seen: Observed) -> None:
        """Remove keys of which nobody knows whether an order needs them, if none is under way; else raise Conflict.

        Such a key is never used again: it may have been certified. Mark, look, delete the marked version: another
        leader stores its order's URL, looks at its key, finalizes. Either its order is seen here, or it sees the mark
        and takes it away, so that the deletion is refused.
        """
        for secret in self.next_keys(seen):
            meta = self._mark(secret, {api.ANNOTATION_DISCARDED: "true"}).metadata
            live = self._cluster.get(api.CERTIFICATE, meta.namespace, seen.certificate.metadata.name)
            if live and live.status.issuance:
                raise Conflict(f"Another order for Certificate {seen.certificate.key} is under way")
            self._cluster.delete(api.SECRET, meta.namespace, meta.name, uid=meta.uid, version=meta.resource_version)

    def _mark(self, secret: SecretFacts | api.Secret, annotations: dict[str, str]) -> api.Secret:
        """With these annotations besides those that it was created with."""
        meta = secret.metadata
        marked = {
            "name": meta.name,
            "namespace": meta.namespace,
            "uid": meta.uid,
            "resourceVersion": meta.resource_version,
            "annotations": annotations,
        }
        return self._cluster.apply(api.SECRET, {"apiVersion": "v1", "kind": "Secret", "metadata": marked})

    def _live_next_key(self, certificate: Certificate) -> api.Secret | None:
        secret = self._cluster.get(api.SECRET, certificate.metadata.namespace, next_key_name(certificate))
        return secret if secret and _belongs(secret, certificate) else None

    def _kept_key(self, certificate: Certificate, found: SecretFacts | None) -> bytes | None:
        """The key in use, where rotationPolicy Never keeps it and it is of the wanted kind."""
        wanted = certificate.spec.private_key
        if wanted.rotation_policy != "Never" or found is None or found.problem or not found.certificate:
            return None
        have = (found.certificate.key_algorithm, found.certificate.key_size, found.key_encoding)
        if have != (wanted.algorithm, key_size(wanted), wanted.encoding):
            return None
        raw = self._cluster.get(api.SECRET, certificate.metadata.namespace, certificate.spec.secret_name)
        return pem.secret_value(raw.data, "tls.key") or None if raw else None


def _tls_manifest(certificate: Certificate, data: dict[str, str], issued_by: str, account_uri: str) -> dict[str, Any]:
    meta = certificate.metadata
    annotations = {
        api.ANNOTATION_CERTIFICATE: meta.name,
        api.ANNOTATION_CERTIFICATE_UID: meta.uid,
        api.ANNOTATION_ISSUER: issued_by,
        api.ANNOTATION_ACCOUNT_URI: account_uri,
    }
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": certificate.spec.secret_name,
            "namespace": meta.namespace,
            "labels": {api.LABEL_ROLE: api.ROLE_TLS},
            "annotations": {name: value for name, value in annotations.items() if value},
        },
        "data": data,
    }


def _next_key_manifest(certificate: Certificate, key: bytes, csr: bytes, asked: str) -> dict[str, Any]:
    meta = certificate.metadata
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": next_key_name(certificate),
            "namespace": meta.namespace,
            "labels": {api.LABEL_ROLE: api.ROLE_NEXT_KEY},
            "annotations": {api.ANNOTATION_CERTIFICATE: meta.name, api.ANNOTATION_CERTIFICATE_UID: meta.uid},
            "ownerReferences": [
                {"apiVersion": api.API_VERSION, "kind": "Certificate", "name": meta.name, "uid": meta.uid}
            ],
        },
        "type": "Opaque",
        "data": {
            "tls.key": _encode(key),
            CSR: _encode(csr),
            REQUEST: _encode(asked.encode()),
        },
    }
