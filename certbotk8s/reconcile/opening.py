"""Opens one account of an Issuer: finds its key, or makes it; finds its account at the CA, or registers it.

The CA is asked for the account of a key first (`onlyReturnExisting`), and only when it knows none is one registered: an
external account binding may be good for one use. Whatever must not be lost is in the Secret before the CA hears of it
(reconcile.keyring), so that a restart goes on from there; an account that is known there is opened without a request.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import structs

from certbotk8s.domain import api, pem
from certbotk8s.domain.bindings import DEFAULT
from certbotk8s.domain.errors import PermanentError, TemporaryError
from certbotk8s.domain.names import listing
from certbotk8s.domain.plan import issuer_ready, rollover_wish
from certbotk8s.domain.reasons import Reason
from certbotk8s.ports import Binding, Key, Server, call
from certbotk8s.reconcile import keyring
from certbotk8s.reconcile.accounts import Account, Inputs
from certbotk8s.reconcile.keyring import KnownAccount, Notes
from certbotk8s.reconcile.status import report

if TYPE_CHECKING:
    from collections.abc import Generator

    from certbotk8s.domain.api import Issuer
    from certbotk8s.ports import Authority, Cluster, KeyMaker, Session
    from certbotk8s.reconcile.accounts import Accounts
    from certbotk8s.reconcile.keyring import Keyring

# The member of the binding's Secret, where the reference names none.
HMAC_KEY = "secret"
_BINDING = "spec.acme.externalAccountBinding"
# Refusals that no look at the account explains: they stand until somebody has done something at the CA.
_STANDING = frozenset({Reason.TERMS_CHANGED, Reason.EAB_REQUIRED})


class Slot(NamedTuple):
    """One account of an Issuer: what it is called, where its key is, what it is bound with."""

    name: str
    secret: str
    binding: api.ExternalAccountBinding | None


def slots(issuer: Issuer) -> tuple[Slot, ...]:
    """The accounts that an Issuer wants: one, or one for each of its bindings."""
    acme = issuer.spec.acme
    name = acme.private_key_secret_ref.name
    if not acme.bindings:
        return (Slot(DEFAULT, name, acme.external_account_binding),)
    return tuple(Slot(each.name, f"{name}-{each.name}", each.external_account_binding) for each in acme.bindings)


@dataclass
class Opening:
    """One try. `home` is the namespace of the Secrets; `secret` and `binding_secret` are as read just now."""

    key: Key
    issuer: Issuer
    slot: Slot
    home: str
    secret: api.Secret | None
    binding_secret: api.Secret | None
    cluster: Cluster
    authority: Authority
    key_maker: KeyMaker
    accounts: Accounts

    ring: Keyring | None = None
    note: str = ""
    server: Server = field(init=False)

    def inputs(self) -> Inputs:
        """What this try rests on, our own writes included."""
        meta, secret = self.issuer.metadata, self.ring.secret if self.ring else self.secret
        return Inputs(
            issuer_uid=meta.uid,
            generation=meta.generation,
            rollover=rollover_wish(self.issuer),
            key_version=secret.metadata.resource_version if secret else "",
            binding_version=self.binding_secret.metadata.resource_version if self.binding_secret else "",
        )

    def run(self, server: Server) -> Generator[Any, Any, Account]:
        """The account, open. PermanentError, TemporaryError: it is not, and why."""
        acme, self.server = self.issuer.spec.acme, server
        self.ring = self._read()
        yield from self._settle_next_key()
        binding = self._fingerprint()
        known = self._choose(binding)
        doubt = self.accounts.doubt_about(self.key, known.uri) if known else None
        if known and doubt and doubt.reason in _STANDING:
            self.accounts.settle(self.key, known.uri)
            raise doubt
        fresh = known is None or doubt is not None
        if known is None or doubt:
            known = yield from self._register(known, binding)
        elif binding and not known.binding:
            known = structs.replace(known, binding=binding)
        ready = issuer_ready(self.issuer)
        if fresh or ready is None or ready.status != "True":
            # Of a new or changed spec the profile is checked; an account reopened after a restart asks nothing.
            yield from self._check_profile()
        if known.contact != acme.email:
            known = yield from self._tell_contact(known)
        wish = rollover_wish(self.issuer)
        if wish and wish != self.ring.notes.rollover:
            known = yield from self._change_key(known, wish)
        former = self._tidy(known)
        for one in former:
            key = one.key.encode() or self.ring.key
            server = Server(one.server, self.server.ca_bundle)
            self.accounts.keep(self.key, self.authority.session(server, key, one.uri))
        status = api.AccountStatus(
            name=self.slot.name,
            uri=known.uri,
            key_thumbprint=known.thumbprint,
            bound_key_id=known.key_id,
            contact=known.contact,
            key_secret_name=self.slot.secret,
        )
        session = self.authority.session(self.server, self.ring.key, known.uri)
        unsettled = bool(former) or known.contact != acme.email
        return Account(session, self.inputs(), status, self.note, unsettled, self.ring.notes.rollover)

    # --- the key ------------------------------------------------------------------------------------------------------

    @property
    def _ring(self) -> Keyring:
        assert self.ring
        return self.ring

    def _thumbprint(self) -> str:
        return self.authority.thumbprint(self._ring.key)

    def _is_ours(self) -> bool:
        """Whether the controller made the key itself, and may make another one."""
        return self._ring.notes.made == self._thumbprint()

    def _read(self) -> Keyring:
        """The Secret with the account key; one with a new key when there is none."""
        acme = self.issuer.spec.acme
        member, name = acme.private_key_secret_ref.key or keyring.ACCOUNT_KEY, f"{self.home}/{self.slot.secret}"
        if self.secret is None:
            if acme.disable_account_key_generation:
                raise PermanentError(
                    Reason.ACCOUNT_KEY_MISSING,
                    f"Secret {name} with the account key does not exist, and spec.acme.disableAccountKeyGeneration "
                    f"forbids to make one. Create it with the key as its member {member}.",
                )
            made = self.key_maker.account_key(acme.account_key_algorithm)
            notes = Notes(made=self.authority.thumbprint(made), rollover=rollover_wish(self.issuer))
            return keyring.create(self.cluster, self.home, self.slot.secret, member, made, notes)
        ring = keyring.read(self.secret, member)
        if not ring.key:
            raise PermanentError(
                Reason.ACCOUNT_KEY_MISSING,
                f"Secret {name}, which spec.acme.privateKeySecretRef names, has no member {member} with the account "
                "key. Add it, or delete the Secret to get a new key and account.",
            )
        if ring.notes.made and ring.notes.made != self.authority.thumbprint(ring.key):
            # Somebody has put another key there, which is theirs.
            ring = keyring.Keyring(ring.secret, member, ring.key, structs.replace(ring.notes, made="", next_key=""))
        return ring

    def _new_key(self, algorithm: str = "") -> bytes:
        """A new key: of that algorithm, else of the present key's where the CA has taken no other."""
        present = pem.private_key_facts(self._ring.key)[1] if self._is_ours() else ""
        wanted = self.issuer.spec.acme.account_key_algorithm
        return self.key_maker.account_key(algorithm or ("RSA" if "RSA" in {present, wanted} else wanted))

    def _replace_key(self, key: bytes, notes: Notes) -> None:
        self.ring = self._ring.write(self.cluster, structs.replace(notes, made=self.authority.thumbprint(key)), key=key)

    def _put_aside(self, known: KnownAccount) -> Notes:
        """The notes in which an account keeps its key, because the Secret's member gets another one."""
        return self._ring.notes.knowing(structs.replace(known, key=self._ring.key.decode()))

    # --- which account ------------------------------------------------------------------------------------------------

    def _choose(self, binding: str) -> KnownAccount | None:
        """The account to use, as far as it is known; None when the CA has to be asked about the present key.

        Another binding gets another account, and so another key. The one before keeps its key while it is needed, and
        is used again when its binding comes back.
        """
        notes, server = self._ring.notes, self.server.url
        known = notes.find(server, self._thumbprint())
        if known and (not binding or known.binding in {"", binding}):
            return known
        if not self._is_ours():
            if known is None:
                return None
            raise PermanentError(
                Reason.ACCOUNT_KEY_BOUND,
                "Another external account binding needs another account key, and that in Secret "
                f"{self.home}/{self.slot.secret} was not made by certbotk8s, so that it stays. Put a new key into it, "
                "or name another Secret in spec.acme.privateKeySecretRef.",
            )
        before = [one for one in notes.accounts if one.server == server and one.key and binding in {"", one.binding}]
        if before:
            again = before[-1]
            if known:
                notes = self._put_aside(known)
            self._replace_key(again.key.encode(), notes.knowing(structs.replace(again, key="")))
            return structs.replace(again, key="")
        if known:
            if self.issuer.spec.acme.disable_account_key_generation:
                raise PermanentError(
                    Reason.ACCOUNT_KEY_BOUND,
                    f"Another external account binding needs another account key, and Secret {self.home}/"
                    f"{self.slot.secret} keeps its key because of spec.acme.disableAccountKeyGeneration. Put a new key "
                    "into it.",
                )
            self._replace_key(self._new_key(), self._put_aside(known))
        return None

    def _tidy(self, known: KnownAccount) -> tuple[KnownAccount, ...]:
        """Forget former accounts that no order under way names; those that stay."""
        under_way = {
            certificate.status.issuance.account_uri
            for certificate in (self.cluster.store(api.CERTIFICATE).all() if self._ring.notes.accounts[1:] else ())
            if certificate.status.issuance
        }
        former = tuple(one for one in self._ring.notes.accounts if one.uri != known.uri and one.uri in under_way)
        notes = structs.replace(self._ring.notes, accounts=(*former, known))
        self.ring = self._ring.write(self.cluster, notes, uri=known.uri)
        return former

    # --- the CA -------------------------------------------------------------------------------------------------------

    def _register(self, before: KnownAccount | None, binding: str) -> Generator[Any, Any, KnownAccount]:
        """The account of the present key, found or made, and remembered; with an RSA key where the CA wants one."""
        try:
            found = yield from self._find_or_make(before, binding)
        except PermanentError as error:
            problem = error.problem
            if problem is None or problem.type not in {"badPublicKey", "badSignatureAlgorithm"}:
                raise
            if not self._is_ours():
                raise PermanentError(
                    error.reason,
                    f"{error} The key in Secret {self.home}/{self.slot.secret} was not made by certbotk8s, so that it "
                    "stays.",
                    problem=problem,
                ) from error
            accepted = not problem.algorithms or "RS256" in problem.algorithms
            if not accepted or pem.private_key_facts(self._ring.key)[1] == "RSA":
                raise
            self._replace_key(self._new_key("RSA"), self._ring.notes)
            found = yield from self._find_or_make(None, binding)
        self.ring = self._ring.write(self.cluster, self._ring.notes.knowing(found), uri=found.uri)
        return found

    def _find_or_make(self, before: KnownAccount | None, binding: str) -> Generator[Any, Any, KnownAccount]:
        acme, key = self.issuer.spec.acme, self._ring.key
        directory = yield from call(self.server.url, self.authority.directory, self.server)
        found = yield from call(self.server.url, self.authority.find_account, self.server, key)
        key_id, contact = "", acme.email
        if found:
            same = before if before and before.uri == found.uri else None
            key_id = found.key_id or (same.key_id if same else "")
            if found.contact is not None or same is None:
                contact = (found.contact or "") if contact else ""  # an address that nobody gave here is not taken away
            else:
                contact = same.contact
        else:
            asked = self._binding()
            if directory.external_account_required and asked is None:
                raise PermanentError(
                    Reason.EAB_REQUIRED,
                    f"{acme.server} demands an external account binding. Get a key id and an HMAC key from the CA and "
                    "name them in spec.acme.externalAccountBinding.",
                )
            found = yield from call(self.server.url, self.authority.register, self.server, key, acme.email, asked)
            if asked and (directory.external_account_required or found.key_id):
                key_id = asked.key_id
            elif asked:
                self._say(
                    Reason.EAB_NOT_NEEDED,
                    f"The CA demands no external account binding, and has not confirmed that of key id {asked.key_id}: "
                    "remove spec.acme.externalAccountBinding, unless the CA told you to set it.",
                )
        return KnownAccount(
            uri=found.uri,
            server=self.server.url,
            thumbprint=self._thumbprint(),
            key_id=key_id,
            binding=binding,
            contact=contact,
        )

    def _check_profile(self) -> Generator[Any, Any, None]:
        asked = self.issuer.spec.acme.profile
        if asked:
            directory = yield from call(self.server.url, self.authority.directory, self.server)
            if asked not in directory.profiles:
                offered = listing(sorted(directory.profiles), most=20) or "none"
                raise PermanentError(
                    Reason.UNKNOWN_PROFILE, f"{self.server.url} offers no profile {asked}. Its profiles: {offered}."
                )

    def _session(self, known: KnownAccount) -> Session:
        """The session that orders under way use too, so that a change of key is one for them."""
        open_one = self.accounts.session(self.key, known.uri)
        return open_one or self.authority.session(self.server, self._ring.key, known.uri)

    def _tell_contact(self, known: KnownAccount) -> Generator[Any, Any, KnownAccount]:
        """Tell the CA a changed address, once: many CAs never show it, and some refuse the request."""
        email = self.issuer.spec.acme.email
        try:
            session = self.authority.session(self.server, self._ring.key, known.uri)
            yield from call(self.server.url, session.update_contact, email)
        except TemporaryError as error:
            self.note = f"The CA was not told the contact address yet: {error}"
            return known
        except PermanentError as error:
            self._say(Reason.CONTACT_REFUSED, f"{error} The account is used all the same.")
        told = structs.replace(known, contact=email)
        self.ring = self._ring.write(self.cluster, self._ring.notes.knowing(told), uri=told.uri)
        return told

    # --- another key for the same account -----------------------------------------------------------------------------

    def _change_key(self, known: KnownAccount, wish: str) -> Generator[Any, Any, KnownAccount]:
        """Give the account a new key (RFC 8555 section 7.3.5), which is stored before the CA hears of it."""
        immutable = self._ring.secret.immutable
        if immutable or self.issuer.spec.acme.disable_account_key_generation:
            why = (
                "its Secret is immutable" if immutable else "spec.acme.disableAccountKeyGeneration forbids to make one"
            )
            self._say(Reason.ACCOUNT_KEY_KEPT, f"The account key is not changed, because {why}.")
            self._answer_wish(known, wish)
            return known
        notes = self._ring.notes
        if not notes.next_key:
            notes = structs.replace(notes, next_key=self._new_key().decode())
            self.ring = self._ring.write(self.cluster, notes)
        try:
            yield from call(self.server.url, self._session(known).change_key, notes.next_key.encode())
        except PermanentError as error:
            # A CA that has done it before, and whose answer was lost, refuses it now.
            found = yield from call(self.server.url, self.authority.find_account, self.server, notes.next_key.encode())
            if found is None or found.uri != known.uri:
                self._say(Reason.ACCOUNT_KEY_KEPT, f"{error} The account keeps its key.")
                self._answer_wish(known, wish)
                return known
        return self._take_next_key(known, wish)

    def _answer_wish(self, known: KnownAccount, wish: str) -> None:
        notes = structs.replace(self._ring.notes, next_key="", rollover=wish)
        self.ring = self._ring.write(self.cluster, notes, uri=known.uri)

    def _take_next_key(self, known: KnownAccount, wish: str) -> KnownAccount:
        """The CA has confirmed the next key: it is the key."""
        notes = self._ring.notes
        key = notes.next_key.encode()
        changed = structs.replace(known, thumbprint=self.authority.thumbprint(key))
        others = tuple(one for one in notes.accounts if one.uri != known.uri)
        notes = structs.replace(notes, accounts=(*others, changed), next_key="", rollover=wish)
        self._replace_key(key, notes)
        report(
            self.cluster, self.key.kind, self.issuer, Reason.ACCOUNT_KEY_CHANGED, f"Account {known.uri} has a new key"
        )
        return changed

    def _settle_next_key(self) -> Generator[Any, Any, None]:
        """After a crash, or a lost answer, in a change of key: which of the two keys the CA has."""
        notes = self._ring.notes
        known = notes.find(self.server.url, self._thumbprint()) if notes.next_key else None
        if known is None:
            return
        found = yield from call(self.server.url, self.authority.find_account, self.server, notes.next_key.encode())
        wish = rollover_wish(self.issuer)
        if found and found.uri == known.uri:
            self._take_next_key(known, wish)
        elif wish in {"", notes.rollover}:  # taken back meanwhile
            self._answer_wish(known, notes.rollover)

    # --- the binding --------------------------------------------------------------------------------------------------

    def _binding(self) -> Binding | None:
        """The binding that is configured. PermanentError when its Secret is missing, or has no HMAC key."""
        asked = self.slot.binding
        if asked is None:
            return None
        name, member = f"{self.home}/{asked.key_secret_ref.name}", asked.key_secret_ref.key or HMAC_KEY
        if self.binding_secret is None:
            raise PermanentError(
                Reason.EAB_SECRET_MISSING,
                f"Secret {name}, which {self._field()}.keySecretRef names, does not exist.",
            )
        hmac_key = pem.secret_value(self.binding_secret.data, member)
        if not hmac_key:
            has = listing(sorted(self.binding_secret.data)) or "no member"
            raise PermanentError(
                Reason.EAB_SECRET_MISSING,
                f"Secret {name} has no member {member} with the HMAC key of key id {asked.key_id}; it has {has}.",
            )
        return Binding(asked.key_id, hmac_key, asked.key_algorithm)

    def _field(self) -> str:
        """Where the binding is configured."""
        one_of_several = self.issuer.spec.acme.bindings
        return f"externalAccountBinding of binding {self.slot.name}" if one_of_several else _BINDING

    def _fingerprint(self) -> str:
        """That of the binding, "" without one: an account that is there needs none."""
        try:
            binding = self._binding()
        except PermanentError:
            return ""
        return keyring.fingerprint(binding) if binding else ""

    # --- saying it ----------------------------------------------------------------------------------------------------

    def _say(self, why: Reason, text: str) -> None:
        self.note = f"{self.note} {text}".strip()
        report(self.cluster, self.key.kind, self.issuer, why, text, warning=True)
