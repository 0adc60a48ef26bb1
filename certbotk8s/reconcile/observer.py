"""Gathers from the caches what a decision about a Certificate rests on. Looks, and changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from certbotk8s.domain import api, pem
from certbotk8s.domain.errors import PermanentError
from certbotk8s.domain.names import common_name, wanted_names
from certbotk8s.domain.plan import Finding, Observed, account_name, request_hash
from certbotk8s.reconcile.indexes import BY_SECRET, contenders, issuer_key, secret_key, store_key

if TYPE_CHECKING:
    from collections.abc import Mapping

    from certbotk8s.domain.api import Certificate
    from certbotk8s.ports import Clock, Cluster, Key
    from certbotk8s.reconcile.accounts import Account, Accounts


class Observer:
    """Reads the watched collections, and the open accounts."""

    def __init__(self, cluster: Cluster, clock: Clock, accounts: Accounts) -> None:
        self._cluster = cluster
        self._clock = clock
        self._accounts = accounts

    def observe(self, certificate: Certificate) -> Observed:
        """The Certificate, and what belongs to it, at this moment."""
        ref, secret = issuer_key(certificate), secret_key(certificate)
        names: tuple[str, ...] = ()
        invalid = None
        try:
            common_name(certificate.spec, None)
            names = wanted_names(certificate.spec)
        except PermanentError as error:
            invalid = Finding(
                error.reason, f"{error} Nothing is ordered until spec.dnsNames and spec.commonName are mended"
            )
        return Observed(
            certificate=certificate,
            names=names,
            invalid=invalid,
            issuer=self.issuer(ref),
            secret=self._cluster.store(pem.SECRET_FACTS).get(secret),
            rivals=tuple(
                other
                for other in self._cluster.store(api.CERTIFICATE).find(BY_SECRET, secret)
                if other.metadata.uid != certificate.metadata.uid and not other.metadata.deletion_timestamp
            ),
            now=self._clock.now().replace(microsecond=0),
            labels=self._labels(certificate.metadata.namespace),
            contenders=tuple(contenders(self._cluster.store(api.CERTIFICATE), certificate)),
        )

    def _labels(self, namespace: str) -> Mapping[str, str] | None:
        found = self._cluster.store(api.NAMESPACE).get(namespace)
        return found.metadata.labels if found else None

    def issuer(self, key: Key) -> api.Issuer | None:
        """The Issuer or ClusterIssuer of a queue key, unless it is gone or going."""
        kind = api.ISSUER_KINDS.get(key.kind)
        issuer = self._cluster.store(kind).get(store_key(key)) if kind else None
        return None if issuer is None or issuer.metadata.deletion_timestamp else issuer

    def account(self, seen: Observed) -> Account | None:
        """The open account that the Certificate would order with now."""
        name = account_name(seen)
        account = self._accounts.of(issuer_key(seen.certificate), name) if name else None
        return account if account and seen.issuer and account.issuer_uid == seen.issuer.metadata.uid else None

    def asked(self, seen: Observed, account: Account) -> str:
        """The hash of what would be asked for now."""
        return request_hash(
            seen,
            issuer_uid=account.issuer_uid,
            account_uri=account.session.account_uri,
            account_key=account.status.key_thumbprint,
        )
