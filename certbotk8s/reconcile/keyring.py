"""The Secret of an account key, and what stands beside the key in it: nothing here may be lost in a crash.

The key itself is the member that `privateKeySecretRef` names, as people and other tools expect it. All else that the
controller has to know is one more member, `accounts.json`: of which accounts the key is, keys of former accounts that
still have orders under way, and the key that an account is being given.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec
from msgspec import structs

from certbotk8s.domain import api, pem
from certbotk8s.domain.errors import AlreadyExists, Conflict
from certbotk8s.domain.sensitive import Sensitive

if TYPE_CHECKING:
    from certbotk8s.ports import Binding, Cluster

# The members of the account key's Secret: the key, where the reference names none, and the notes.
ACCOUNT_KEY = "tls.key"
NOTES = "accounts.json"
# Accounts that are remembered; the oldest go first.
_MOST = 20


class KnownAccount(api.Struct, frozen=True):
    """An account at `server` of the key with that thumbprint (RFC 7638).

    `key_id` is the EAB key id that it was bound with, `binding` the fingerprint of the binding that the issuer had then
    ("" for none), `contact` the address that the CA was told. `key` is its key where the Secret has another one by now.
    """

    uri: str
    server: str
    thumbprint: str
    key_id: str = ""
    binding: str = ""
    contact: str = ""
    key: str = ""

    def __repr__(self) -> str:
        return f"KnownAccount({self.uri})"


class Notes(api.Struct, frozen=True):
    """What stands beside the key. `made` is the thumbprint of the key that the controller made itself, `next_key` one
    that the CA is being told, `rollover` the wish for a new key that was answered last.
    """

    accounts: tuple[KnownAccount, ...] = ()
    made: str = ""
    next_key: str = ""
    rollover: str = ""

    def __repr__(self) -> str:
        return f"Notes({self.accounts})"

    def find(self, server: str, thumbprint: str) -> KnownAccount | None:
        """The account of that key at that server."""
        return next((one for one in self.accounts if (one.server, one.thumbprint) == (server, thumbprint)), None)

    def knowing(self, account: KnownAccount) -> Notes:
        """With that account, in place of what was known of it."""
        others = [one for one in self.accounts if (one.server, one.thumbprint) != (account.server, account.thumbprint)]
        return structs.replace(self, accounts=(*others, account)[-_MOST:])


_decode_notes = msgspec.json.Decoder(Notes).decode


@dataclass(frozen=True)
class Keyring:
    """A Secret as it was read, with its key and its notes."""

    secret: api.Secret
    member: str
    key: Sensitive
    notes: Notes

    def write(self, cluster: Cluster, notes: Notes, *, key: bytes = b"", uri: str = "") -> Keyring:
        """The Secret with these notes, and with that key if one is given; as it is where that is nothing new.

        The key is always among what is applied: one that we had applied before would be removed if it were left out.
        Conflict when the Secret was changed meanwhile.
        """
        meta = self.secret.metadata
        uri = uri or meta.annotations.get(api.ANNOTATION_ACCOUNT_URI, "")
        same = uri == meta.annotations.get(api.ANNOTATION_ACCOUNT_URI, "")
        if notes == self.notes and same and key in {b"", self.key}:
            return self
        if self.secret.immutable and not key:
            return replace(self, notes=notes)  # somebody's own; after a restart the CA is asked again
        members = {NOTES: msgspec.json.encode(notes), self.member: key or self.key}
        written = cluster.apply(
            api.SECRET,
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {
                    "name": meta.name,
                    "namespace": meta.namespace,
                    "uid": meta.uid,
                    "resourceVersion": meta.resource_version,
                    **({"annotations": {api.ANNOTATION_ACCOUNT_URI: uri}} if uri else {}),
                },
                "type": self.secret.type,
                "data": _encoded(members),
            },
        )
        return read(written, self.member)


def read(secret: api.Secret, member: str) -> Keyring:
    """The key and the notes of a Secret; an empty key where there is none, no notes where they cannot be read."""
    try:
        notes = _decode_notes(pem.secret_value(secret.data, NOTES) or b"{}")
    except msgspec.MsgspecError:
        notes = Notes()
    return Keyring(secret, member, pem.secret_value(secret.data, member), notes)


def create(cluster: Cluster, namespace: str, name: str, member: str, key: bytes, notes: Notes) -> Keyring:
    """A new Secret with a new key. Conflict when somebody else made one first."""
    manifest = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": namespace},
        "type": "Opaque",
        "data": _encoded({member: key, NOTES: msgspec.json.encode(notes)}),
    }
    try:
        return read(cluster.create(api.SECRET, manifest), member)
    except AlreadyExists:
        raise Conflict(f"Secret {namespace}/{name} appeared just now") from None


def fingerprint(binding: Binding) -> str:
    """Equal for the same key id and HMAC key, in whichever base64 the key is written."""
    text = binding.hmac_key.strip().translate(bytes.maketrans(b"+/", b"-_")).rstrip(b"=")
    return hashlib.sha256(b"%s %s" % (binding.key_id.encode(), text)).hexdigest()


def _encoded(members: dict[str, bytes]) -> dict[str, str]:
    return {member: base64.b64encode(value).decode() for member, value in members.items()}
