"""The ACME adapter against Pebble, a real ACME server that demands External Account Binding.

Pebble validates over HTTP: a responder here answers with the key authorizations that the session computes.
"""

import base64
import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from josepy.jwk import JWKEC, JWKRSA

from certbotk8s.ca.authority import Authority, Session
from certbotk8s.ca.keys import Keys
from certbotk8s.clock import SystemClock
from certbotk8s.domain.acme import Identifier, Order
from certbotk8s.domain.errors import PermanentError, TemporaryError
from certbotk8s.domain.problems import Side, side
from certbotk8s.domain.reasons import Reason
from certbotk8s.ports import Binding, Server
from tests.lab.acme import BLOCKED_NAME, AcmeServer, running_pebble
from tests.lab.lab import Lab

LOOKS = 200


class Responder:
    """Answers HTTP-01 for every name; `answers` maps a token to its key authorization."""

    def __init__(self) -> None:
        self.answers: dict[str, str] = {}
        answers = self.answers

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = answers.get(self.path.rsplit("/", 1)[-1], "").encode()
                self.send_response(200 if body else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Keeps the test's output clean."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]

    def __enter__(self) -> "Responder":
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture(scope="module")
def responder() -> Iterator[Responder]:
    with Responder() as running:
        yield running


@contextmanager
def pebble_of_our_own(
    lab: Lab, responder: Responder, folder: Path, *, nonce_reject: int = 0, retry_after: int = 0
) -> Iterator[AcmeServer]:
    with running_pebble(
        f"pebble-ca-{secrets.token_hex(3)}",
        folder=folder / "pebble",
        logs=folder,
        bin_folder=Path(lab.bin),
        dns=lab.dns,
        http_port=responder.port,
        eab=lab.eab,
        nonce_reject=nonce_reject,
        retry_after=retry_after,
    ) as (server, _):
        yield server


@pytest.fixture(scope="module")
def pebble(lab: Lab, responder: Responder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AcmeServer]:
    with pebble_of_our_own(lab, responder, tmp_path_factory.mktemp("ca")) as server:
        yield server


@pytest.fixture
def server(pebble: AcmeServer) -> Server:
    return Server(pebble.directory, Path(pebble.ca_bundle).read_bytes())


@pytest.fixture
def authority() -> Authority:
    return Authority(SystemClock())


@pytest.fixture
def binding(lab: Lab) -> Binding:
    return Binding("kid-1", lab.eab["kid-1"].encode())


def registered(authority: Authority, server: Server, binding: Binding) -> Session:
    key = Keys().account_key()
    return authority.session(server, key, authority.register(server, key, "", binding).uri)


def until(session: Session, url: str, *statuses: str) -> Order:
    """The order once it has one of these statuses; Pebble takes some milliseconds."""
    for _ in range(LOOKS):
        order = session.order(url)
        if order.status in statuses:
            return order
        threading.Event().wait(0.05)
    raise AssertionError(f"order {url} is still {order.status}, not {statuses}")


def authorized(session: Session, responder: Responder, *names: str) -> Order:
    order = session.new_order([Identifier("dns", name) for name in names], "default")
    for url in order.authorizations:
        authorization = session.authorization(url)
        challenge = next(one for one in authorization.challenges if one.type == "http-01")
        responder.answers[challenge.token] = session.key_authorization(challenge.token)
        session.answer(challenge.url)
    return until(session, order.url, "ready")


def issued(session: Session, responder: Responder, *names: str) -> list[x509.Certificate]:
    order = authorized(session, responder, *names)
    keys = Keys()
    csr = keys.csr(keys.certificate_key("ECDSA", 0, "PKCS8"), names, names[0])
    finished = session.finalize(order.finalize, csr)
    if finished.status != "valid":
        finished = until(session, order.url, "valid")
    return x509.load_pem_x509_certificates(session.certificate(finished.certificate))


def hmac_texts() -> list[str]:
    return ["unpadded", "padded", "standard", "newline", "spaces"]


def hmac_text(key: str, form: str) -> bytes:
    raw = base64.urlsafe_b64decode(key + "=" * (-len(key) % 4))
    texts = {
        "unpadded": key.encode(),
        "padded": base64.urlsafe_b64encode(raw),
        "standard": base64.b64encode(raw),
        "newline": key.encode() + b"\n",
        "spaces": b"  " + key.encode() + b"\r\n",
    }
    return texts[form]


def test_one_name_takes_seven_requests(
    authority: Authority, server: Server, binding: Binding, pebble: AcmeServer, responder: Responder, suffix: str
) -> None:
    """A new name costs newOrder, authorization, answer, order, finalize, order and certificate, and no other request.

    Mutation: fetch a nonce for each request, or read the directory in each session.
    """
    session = registered(authority, server, binding)
    name = f"seven.{suffix}"
    mark = pebble.mark()
    order = session.new_order([Identifier("dns", name)], "default")
    challenge = next(one for one in session.authorization(order.authorizations[0]).challenges if one.type == "http-01")
    responder.answers[challenge.token] = session.key_authorization(challenge.token)
    session.answer(challenge.url)
    polls = 0
    while order.status != "ready" and polls < LOOKS:
        threading.Event().wait(0.05)
        order, polls = session.order(order.url), polls + 1
    csr = Keys().csr(Keys().certificate_key("ECDSA", 0, "PKCS8"), [name], "")
    finished = session.finalize(order.finalize, csr)
    polls -= 1
    while finished.status != "valid" and polls < LOOKS:
        threading.Event().wait(0.05)
        finished, polls = session.order(order.url), polls + 1
    chain = x509.load_pem_x509_certificates(session.certificate(finished.certificate))
    requests = pebble.requests(mark)
    assert len(chain) >= 2
    assert [request.method for request in requests if request.is_new_nonce] == []
    assert len(requests) - (polls - 1) == 7, requests


def test_the_certificate_holds_the_names_and_the_key(
    authority: Authority, server: Server, binding: Binding, responder: Responder, suffix: str
) -> None:
    """A chain for two names comes back, leaf first, with just these names.

    Mutation: leave the second name out of the CSR.
    """
    names = (f"a.{suffix}", f"b.{suffix}")
    leaf = issued(registered(authority, server, binding), responder, *names)[0]
    alternative = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(alternative.get_values_for_type(x509.DNSName)) == set(names)


@pytest.mark.parametrize("form", hmac_texts())
def test_every_usual_text_of_the_hmac_key_registers(authority: Authority, server: Server, lab: Lab, form: str) -> None:
    """An HMAC key registers an account whether its base64 is url-safe, standard, padded or followed by a line end.

    Mutation: hand the text to the decoder as it is.
    """
    binding = Binding("kid-2", hmac_text(lab.eab["kid-2"], form))
    key = Keys().account_key()
    assert authority.register(server, key, "admin@example.test", binding).uri.startswith("https://")


def test_a_wrong_hmac_key_is_told_in_words(authority: Authority, server: Server, lab: Lab) -> None:
    """The HMAC key of another binding ends as EABMACWrong, with the CA's words, the key id and where to look.

    Mutation: judge newAccount as if no binding had been sent.
    """
    binding = Binding("kid-1", lab.eab["kid-2"].encode())
    with pytest.raises(PermanentError) as caught:
        authority.register(server, Keys().account_key(), "", binding)
    assert caught.value.reason is Reason.EAB_MAC_WRONG
    assert "kid-1" in str(caught.value)
    assert "keySecretRef" in str(caught.value)
    assert lab.eab["kid-2"] not in str(caught.value)
    assert caught.value.problem
    assert caught.value.problem.words() in str(caught.value)


def test_an_account_without_binding_is_refused_with_what_to_do(authority: Authority, server: Server) -> None:
    """A CA that demands a binding says so, and the error names the field to fill.

    Mutation: drop the externalAccountRequired row.
    """
    with pytest.raises(PermanentError) as caught:
        authority.register(server, Keys().account_key(), "", None)
    assert caught.value.reason is Reason.EAB_REQUIRED
    assert "externalAccountBinding" in str(caught.value)


def test_an_account_is_found_again_by_its_key(authority: Authority, server: Server, binding: Binding) -> None:
    """The account of a key is found without a binding, registering it again gives the same URL, and a new key has none.

    Mutation: leave out onlyReturnExisting.
    """
    key = Keys().account_key()
    account = authority.register(server, key, "admin@example.test", binding)
    assert (account.contact, account.key_id) == ("admin@example.test", "kid-1")
    assert authority.find_account(server, key) == account
    assert authority.register(server, key, "", binding) == account
    assert authority.find_account(server, Keys().account_key()) is None


def test_the_directory_tells_profiles_and_that_a_binding_is_needed(authority: Authority, server: Server) -> None:
    """The directory's metadata arrives.

    Mutation: read externalAccountRequired from the top of the document.
    """
    directory = authority.directory(server)
    assert directory.external_account_required
    assert set(directory.profiles) == {"default", "shortlived"}


def test_many_nonces_refused(lab: Lab, responder: Responder, binding: Binding, suffix: str, tmp_path: Path) -> None:
    """Where the CA refuses three nonces of ten, eight certificates at once are issued on one account.

    Mutation: send again only once.
    """
    with pebble_of_our_own(lab, responder, tmp_path, nonce_reject=30) as pebble:
        server = Server(pebble.directory, Path(pebble.ca_bundle).read_bytes())
        session = registered(Authority(SystemClock()), server, binding)
        with ThreadPoolExecutor(8) as pool:
            chains = list(pool.map(lambda n: issued(session, responder, f"n{n}.{suffix}"), range(8)))
        assert len({chain[0].serial_number for chain in chains}) == 8


def test_retry_after_arrives_in_both_forms(
    lab: Lab, responder: Responder, binding: Binding, suffix: str, tmp_path: Path
) -> None:
    """Pebble asks for 30 s by turns in seconds and as a date: both come out as about 30 s, on orders in `processing`.

    Mutation: read the date in local time, or only the number.
    """
    seen = []
    with pebble_of_our_own(lab, responder, tmp_path, retry_after=30) as pebble:
        server = Server(pebble.directory, Path(pebble.ca_bundle).read_bytes())
        session = registered(Authority(SystemClock()), server, binding)
        for n in range(6):
            names = [f"r{n}.{suffix}"]
            order = authorized(session, responder, *names)
            csr = Keys().csr(Keys().certificate_key("ECDSA", 0, "PKCS8"), names, "")
            finished = session.finalize(order.finalize, csr)
            if finished.retry_after is not None:
                seen.append(finished.retry_after.total_seconds())
    assert len(seen) >= 2
    assert all(25 <= seconds <= 30 for seconds in seen), seen


def test_a_name_that_the_ca_refuses(authority: Authority, server: Server, binding: Binding) -> None:
    """A blocked name ends the attempt as RejectedIdentifier, with the CA's words and the name.

    Mutation: judge by the HTTP status alone.
    """
    session = registered(authority, server, binding)
    with pytest.raises(PermanentError) as caught:
        session.new_order([Identifier("dns", BLOCKED_NAME)], "default")
    assert caught.value.reason is Reason.REJECTED_IDENTIFIER
    assert BLOCKED_NAME in str(caught.value)


def test_an_unknown_profile_is_told(authority: Authority, server: Server, binding: Binding, suffix: str) -> None:
    """A profile that the CA does not offer ends as UnknownProfile.

    Mutation: leave the profile out of the order.
    """
    session = registered(authority, server, binding)
    with pytest.raises(PermanentError) as caught:
        session.new_order([Identifier("dns", f"p.{suffix}")], "no-such-profile")
    assert caught.value.reason is Reason.UNKNOWN_PROFILE


def test_an_order_that_the_ca_does_not_know(
    authority: Authority, server: Server, binding: Binding, suffix: str
) -> None:
    """An order that never was is OrderGone; that of another account is refused, and the error blames the account.

    Mutation: judge 404 as any other 4xx.
    """
    session, other = registered(authority, server, binding), registered(authority, server, binding)
    order = other.new_order([Identifier("dns", f"o.{suffix}")], "default")
    with pytest.raises(PermanentError) as caught:
        session.order(order.url + "x")
    assert caught.value.reason is Reason.ORDER_GONE
    with pytest.raises(PermanentError) as caught:
        session.order(order.url)
    assert caught.value.problem
    assert side(caught.value.problem) is Side.ACCOUNT


def test_finalize_before_the_names_are_validated(
    authority: Authority, server: Server, binding: Binding, suffix: str
) -> None:
    """A CSR sent too early changes nothing: the error is temporary, names orderNotReady, and the order stays pending.

    Mutation: make the orderNotReady row permanent.
    """
    session = registered(authority, server, binding)
    name = f"early.{suffix}"
    order = session.new_order([Identifier("dns", name)], "default")
    csr = Keys().csr(Keys().certificate_key("ECDSA", 0, "PKCS8"), [name], "")
    with pytest.raises(TemporaryError) as caught:
        session.finalize(order.finalize, csr)
    assert caught.value.problem
    assert caught.value.problem.type == "orderNotReady"
    assert session.order(order.url).status == "pending"


def test_a_csr_for_other_names_is_refused(
    authority: Authority, server: Server, binding: Binding, responder: Responder, suffix: str
) -> None:
    """A CSR that names something else ends the attempt; CAs call it `badCSR` or, as Pebble does, `unauthorized`.

    Mutation: call `unauthorized` temporary.
    """
    session = registered(authority, server, binding)
    order = authorized(session, responder, f"mine.{suffix}")
    csr = Keys().csr(Keys().certificate_key("ECDSA", 0, "PKCS8"), [f"other.{suffix}"], "")
    with pytest.raises(PermanentError) as caught:
        session.finalize(order.finalize, csr)
    assert caught.value.reason in (Reason.CSR_REFUSED, Reason.CA_REFUSED)


def test_a_wrong_answer_shows_in_the_authorization(
    authority: Authority, server: Server, binding: Binding, suffix: str
) -> None:
    """An unanswered challenge makes the order invalid, and the authorization tells the problem with status 0.

    Mutation: drop the error of challenges.
    """
    session = registered(authority, server, binding)
    order = session.new_order([Identifier("dns", f"nobody.{suffix}")], "default")
    challenge = next(one for one in session.authorization(order.authorizations[0]).challenges if one.type == "http-01")
    session.answer(challenge.url)
    assert until(session, order.url, "invalid").status == "invalid"
    failed = [one for one in session.authorization(order.authorizations[0]).challenges if one.error]
    assert failed[0].error
    assert failed[0].error.status == 0
    assert failed[0].error.type == "unauthorized"


def test_an_authorization_can_be_given_up(authority: Authority, server: Server, binding: Binding, suffix: str) -> None:
    """A deactivated authorization says so.

    Mutation: post an empty object.
    """
    session = registered(authority, server, binding)
    url = session.new_order([Identifier("dns", f"gone.{suffix}")], "default").authorizations[0]
    session.deactivate(url)
    assert session.authorization(url).status == "deactivated"


def test_only_the_given_roots_are_trusted(authority: Authority, pebble: AcmeServer) -> None:
    """Without the caBundle the CA of the lab is not trusted, and the sentence says what to do.

    Mutation: make the connections without verification.
    """
    with pytest.raises(TemporaryError, match="caBundle"):
        authority.directory(Server(pebble.directory))


def test_an_imported_rsa_account_key_works(authority: Authority, server: Server, binding: Binding) -> None:
    """An RSA account key, as other clients make them, registers and orders.

    Mutation: sign everything with ES256.
    """
    key = Keys().certificate_key("RSA", 2048, "PKCS1")
    assert load_pem_private_key(key, None)
    account = authority.register(server, key, "", binding)
    assert authority.find_account(server, key) == account


def test_a_key_in_jwk_is_the_same_key(authority: Authority, server: Server, binding: Binding) -> None:
    """An account made with a PEM key is found with the same key as JWK, of either kind: certbot keeps it so.

    Mutation: hand the text to the PEM parser only.
    """
    for pem in (Keys().account_key(), Keys().account_key("RSA")):
        account = authority.register(server, pem, "", binding)
        key = load_pem_private_key(pem, None)
        jwk = JWKRSA(key=key) if isinstance(key, RSAPrivateKey) else JWKEC(key=key)
        text = jwk.json_dumps().encode()
        assert authority.thumbprint(text) == authority.thumbprint(pem)
        assert authority.find_account(server, text) == account


def test_a_changed_contact_is_told(authority: Authority, server: Server, binding: Binding) -> None:
    """The address of an account can be changed and taken away; the CA has it then.

    Mutation: send it as it is, without mailto.
    """
    key = Keys().account_key()
    session = authority.session(server, key, authority.register(server, key, "old@example.test", binding).uri)
    session.update_contact("new@example.test")
    found = authority.find_account(server, key)
    assert found
    assert found.contact == "new@example.test"
    session.update_contact("")
    found = authority.find_account(server, key)
    assert found
    assert not found.contact


def test_an_account_gets_a_new_key(authority: Authority, server: Server, binding: Binding, suffix: str) -> None:
    """After a change of key the session orders with the new key, and the account is found by that alone.

    Mutations: keep the old key in the session; sign the inner message with the old key; another URL in its header;
    another account, or the new key as the old one, in its payload.
    """
    old, new = Keys().account_key(), Keys().account_key("RSA")
    uri = authority.register(server, old, "", binding).uri
    session = authority.session(server, old, uri)
    session.change_key(new)
    assert session.key_authorization("t") == f"t.{authority.thumbprint(new)}"
    assert session.new_order([Identifier("dns", f"k.{suffix}")], "default").status == "pending"
    found = authority.find_account(server, new)
    assert found
    assert found.uri == uri
    assert authority.find_account(server, old) is None


def test_what_is_wrong_with_a_binding(authority: Authority, server: Server, lab: Lab) -> None:
    """An unknown key id and a wrong HMAC key are told apart.

    Mutation: remove one of the two rows of BINDING_REFUSALS.
    """
    for key_id, reason in (("kid-9", Reason.EAB_KEY_ID_UNKNOWN), ("kid-2", Reason.EAB_MAC_WRONG)):
        with pytest.raises(PermanentError) as caught:
            authority.register(server, Keys().account_key(), "", Binding(key_id, lab.eab["kid-1"].encode()))
        assert caught.value.reason is reason
        assert key_id in str(caught.value)
