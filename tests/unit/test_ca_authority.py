"""The ACME client against a server that follows a script: nonces, refusals, hostile URLs and answers."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from josepy.b64 import b64decode
from josepy.jwk import JWKEC

from certbotk8s.ca.authority import Authority, Session
from certbotk8s.ca.jws import account_key
from certbotk8s.ca.keys import Keys
from certbotk8s.domain.acme import Account, Identifier
from certbotk8s.domain.errors import PermanentError, TemporaryError
from certbotk8s.domain.reasons import Reason
from certbotk8s.ports import Binding, Server
from tests.fakes.acme_server import DIRECTORY, NEW_ACCOUNT, NEW_NONCE, NEW_ORDER, AcmeServer, Received, Reply
from tests.fakes.clock import FakeClock
from tests.lab.pki import Authority as PrivateCA

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

KEY = Keys().account_key()
ACCOUNT = "https://ca.test/acct/1"
ORDER = "/order/1"
NAMES = [Identifier("dns", "shop.example.test")]


@pytest.fixture
def ca(tmp_path: Path) -> Iterator[AcmeServer]:
    with AcmeServer(PrivateCA(tmp_path)) as running:
        yield running


@pytest.fixture
def authority() -> Authority:
    return Authority(FakeClock())


@pytest.fixture
def server(ca: AcmeServer) -> Server:
    return Server(ca.origin + DIRECTORY, ca.ca_bundle)


@pytest.fixture
def session(authority: Authority, server: Server) -> Session:
    return authority.session(server, KEY, ACCOUNT)


def problem(kind: str, status: int, detail: str = "words of the CA", **headers: str) -> Reply:
    return Reply(
        status,
        {"type": f"urn:ietf:params:acme:error:{kind}", "detail": detail},
        {"Content-Type": "application/problem+json", **headers},
    )


def order_reply(ca: AcmeServer, status: int = 201, **members: Any) -> Reply:
    return Reply(status, {"status": "pending", **members}, {"Location": ca.origin + ORDER})


def permanent(call: Callable[[], object]) -> PermanentError:
    with pytest.raises(PermanentError) as caught:
        call()
    return caught.value


def temporary(call: Callable[[], object]) -> TemporaryError:
    with pytest.raises(TemporaryError) as caught:
        call()
    return caught.value


def test_a_session_asks_nothing_by_itself(ca: AcmeServer, session: Session) -> None:
    """Making a session, and a key authorization, sends no request.

    Mutation: read the directory in `session`.
    """
    assert session.key_authorization("abc").startswith("abc.")
    assert session.account_uri == ACCOUNT
    assert ca.requests == []


def test_a_new_order_says_what_is_wanted(ca: AcmeServer, session: Session) -> None:
    """The order names identifiers, and a profile only where one is asked for; its URL is the Location.

    Mutation: always send the profile.
    """
    ca.script[NEW_ORDER] = [order_reply(ca)]
    order = session.new_order(NAMES)
    assert order.url == ca.origin + ORDER
    assert ca.paths() == [DIRECTORY, NEW_NONCE, NEW_ORDER]
    sent = ca.requests[-1]
    assert json.loads(sent.payload) == {"identifiers": [{"type": "dns", "value": "shop.example.test"}]}
    assert sent.protected["kid"] == ACCOUNT
    assert sent.protected["url"] == ca.origin + NEW_ORDER
    session.new_order(NAMES, "shortlived")
    assert json.loads(ca.requests[-1].payload)["profile"] == "shortlived"


def test_each_answers_nonce_serves_the_next_request(ca: AcmeServer, session: Session) -> None:
    """A nonce is asked for once; afterwards those of answers are used, of errors as well, and none twice.

    Mutation: throw away the nonces of errors, or keep a nonce that was used.
    """
    ca.script[ORDER] = [
        order_reply(ca, 200),
        problem("serverInternal", 500),
        Reply(502, b"<html>"),
        order_reply(ca, 200),
    ]
    session.order(ca.origin + ORDER)
    temporary(lambda: session.order(ca.origin + ORDER))
    temporary(lambda: session.order(ca.origin + ORDER))
    session.order(ca.origin + ORDER)
    nonces = [request.protected["nonce"] for request in ca.requests if request.method == "POST"]
    assert ca.paths().count(NEW_NONCE) == 1
    assert len(set(nonces)) == 4


def test_a_refused_nonce_is_sent_again_with_the_one_that_came(ca: AcmeServer, session: Session) -> None:
    """badNonce is answered at once, and up to ten times, with the nonce that came with it.

    Mutation: take the nonce from the stock, or stop after one more try.
    """
    ca.script[NEW_ORDER] = [*[problem("badNonce", 400) for _ in range(10)], order_reply(ca)]
    session.new_order(NAMES)
    posts = [request for request in ca.requests if request.method == "POST"]
    assert len(posts) == 11
    assert len({request.protected["nonce"] for request in posts}) == 11
    assert ca.paths().count(NEW_NONCE) == 1


def test_a_ca_that_refuses_every_nonce_is_given_up_for_now(ca: AcmeServer, session: Session) -> None:
    """After eleven refused nonces the error is temporary.

    Mutation: try for ever.
    """
    ca.script[NEW_ORDER] = [problem("badNonce", 400)]
    error = temporary(lambda: session.new_order(NAMES))
    assert ca.paths().count(NEW_ORDER) == 11
    assert error.problem
    assert error.problem.type == "badNonce"


def test_a_refused_nonce_without_a_new_one(ca: AcmeServer, session: Session) -> None:
    """Where the error brings no nonce, or one that is none, a new one is asked for.

    Mutation: send the refused one again.
    """
    bare = {"type": "urn:ietf:params:acme:error:badNonce"}
    ca.script[NEW_ORDER] = [Reply(400, bare, nonce=""), Reply(400, bare, nonce="not base64!"), order_reply(ca)]
    session.new_order(NAMES)
    assert ca.paths().count(NEW_NONCE) == 3


def test_threads_never_share_a_nonce(ca: AcmeServer, session: Session) -> None:
    """Sixteen threads on one session use each nonce once.

    Mutation: look at the last nonce without taking it.
    """
    ca.script[ORDER] = [order_reply(ca, 200)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: session.order(ca.origin + ORDER), range(100)))
    nonces = [request.protected["nonce"] for request in ca.requests if request.method == "POST"]
    assert len(set(nonces)) == 100


def test_a_ca_without_nonces_is_told(ca: AcmeServer, session: Session) -> None:
    """A newNonce answer without a nonce is the CA's trouble, for now.

    Mutation: sign with an empty nonce.
    """
    ca.script[NEW_NONCE] = [Reply(nonce="")]
    assert "gave no nonce" in str(temporary(lambda: session.new_order(NAMES)))
    assert NEW_ORDER not in ca.paths()


def test_an_overloaded_ca_names_its_time(ca: AcmeServer, session: Session) -> None:
    """429 and 503, on newNonce as well, carry Retry-After in either form.

    Mutation: read Retry-After on success only.
    """
    ca.script[NEW_NONCE] = [Reply(503, headers={"Retry-After": "Fri, 20 Nov 2026 09:02:00 GMT"}, nonce=""), Reply()]
    ca.script[NEW_ORDER] = [problem("rateLimited", 429, **{"Retry-After": "3600"})]
    assert temporary(lambda: session.new_order(NAMES)).retry_after == timedelta(minutes=2)
    error = temporary(lambda: session.new_order(NAMES))
    assert error.retry_after == timedelta(hours=1)
    assert '"words of the CA"' in str(error)
    assert "shop.example.test" in str(error)


def test_retry_after_of_a_resource_arrives(ca: AcmeServer, session: Session) -> None:
    """Orders and authorizations carry the Retry-After of their answer.

    Mutation: drop it from either.
    """
    ca.script[ORDER] = [Reply(200, {"status": "processing"}, {"Retry-After": "7"})]
    assert session.order(ca.origin + ORDER).retry_after == timedelta(seconds=7)
    assert session.authorization(ca.origin + ORDER).retry_after == timedelta(seconds=7)
    assert session.finalize(ca.origin + ORDER, b"csr").retry_after == timedelta(seconds=7)


@pytest.mark.parametrize(
    "url",
    [
        "http://{host}/order/1",
        "https://evil.test/order/1",
        "https://{host}@evil.test/order/1",
        "https://127.0.0.1/order/1",
        "file:///etc/passwd",
        "",
    ],
)
def test_only_hosts_of_the_directory_are_asked(ca: AcmeServer, session: Session, url: str) -> None:
    """A URL that is not https, or on a host and port that the directory does not name, is refused when it is used.

    Mutation: compare the host without its port, or ask whatever comes.
    """
    url = url.format(host=ca.origin.removeprefix("https://"))
    uses: list[Callable[[], object]] = [
        lambda: session.order(url),
        lambda: session.authorization(url),
        lambda: session.answer(url),
        lambda: session.finalize(url, b"csr"),
        lambda: session.certificate(url),
        lambda: session.deactivate(url),
    ]
    for use in uses:
        error = permanent(use)
        assert error.reason is Reason.CA_REFUSED
        assert url in str(error)
    assert set(ca.paths()) <= {DIRECTORY}


def test_a_ca_may_use_several_hosts(ca: AcmeServer, session: Session) -> None:
    """Hosts that the directory names beside its own are asked.

    Mutation: allow the directory's own host alone.
    """
    ca.script[DIRECTORY] = [Reply(body={**ca.directory, "revokeCert": "https://127.0.0.1:1/revoke"})]
    assert "No answer" in str(temporary(lambda: session.order("https://127.0.0.1:1/order")))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html>", "no JSON object"),
        ([], "no JSON object"),
        ({}, "newNonce, newAccount and newOrder"),
        ({"newOrder": None}, "does not name newOrder"),
        ({"newOrder": "http://ca.test/order"}, r"newOrder is not a plain https URL: http://ca\.test"),
        ({"keyChange": "http://ca.test/key"}, "keyChange is not a plain https URL"),
    ],
)
def test_what_is_no_directory(ca: AcmeServer, authority: Authority, server: Server, body: Any, words: str) -> None:
    """A page, or a directory without its URLs or with one that is not https, ends as DirectoryInvalid and says why.

    Mutation: check newOrder alone.
    """
    ca.script[DIRECTORY] = [Reply(body={**ca.directory, **body} if isinstance(body, dict) and body else body)]
    with pytest.raises(PermanentError, match=words) as caught:
        authority.directory(server)
    assert caught.value.reason is Reason.DIRECTORY_INVALID


def test_a_server_that_is_not_https_is_not_asked(authority: Authority, ca: AcmeServer) -> None:
    """An issuer's server with http is refused before anything is sent.

    Mutation: check only the URLs in the directory.
    """
    error = permanent(lambda: authority.directory(Server(ca.origin.replace("https", "http") + DIRECTORY, ca.ca_bundle)))
    assert error.reason is Reason.DIRECTORY_INVALID
    assert ca.requests == []


def test_a_directory_that_is_not_there(ca: AcmeServer, authority: Authority, server: Server) -> None:
    """404 at the directory is a fault of the issuer's spec; a redirect is not followed and says so.

    Mutation: follow redirects, or call 404 temporary there.
    """
    ca.script[DIRECTORY] = [Reply(404), Reply(301, headers={"Location": ca.origin + ORDER})]
    assert permanent(lambda: authority.directory(server)).reason is Reason.DIRECTORY_INVALID
    assert "Redirects are not followed" in str(temporary(lambda: authority.directory(server)))
    assert ca.paths() == [DIRECTORY, DIRECTORY]


def test_no_order_is_given_up_for_a_broken_directory(ca: AcmeServer, session: Session) -> None:
    """Where a session finds a maintenance page in place of the directory, its step is tried again later, and succeeds.

    Mutation: let DirectoryInvalid end the attempt.
    """
    ca.script[DIRECTORY] = [Reply(body=b"<html>We are back soon"), Reply(body=ca.directory)]
    ca.script[ORDER] = [order_reply(ca, 200)]
    assert "no ACME directory" in str(temporary(lambda: session.order(ca.origin + ORDER)))
    assert session.order(ca.origin + ORDER).status == "pending"


def test_directory_is_read_each_time_it_is_asked_for(ca: AcmeServer, authority: Authority, server: Server) -> None:
    """`directory` is a request each time, and what it found serves accounts and sessions without another.

    Mutation: answer from the copy, or read it again for find_account.
    """
    ca.script[NEW_ACCOUNT] = [Reply(200, {}, {"Location": ca.origin + "/acct/1"})]
    authority.directory(server)
    authority.directory(server)
    authority.find_account(server, KEY)
    assert ca.paths() == [DIRECTORY, DIRECTORY, NEW_NONCE, NEW_ACCOUNT]


def test_an_account_is_looked_up_by_its_key(ca: AcmeServer, authority: Authority, server: Server) -> None:
    """The look-up creates nothing, and tells an account, none, and a closed one apart, however the CA says so.

    Mutation: leave out onlyReturnExisting, or the look at the account's status.
    """
    url = ca.origin + "/acct/1"
    ca.script[NEW_ACCOUNT] = [
        Reply(200, {"status": "valid"}, {"Location": url}),
        problem("accountDoesNotExist", 400),
        problem("externalAccountRequired", 400),
        problem("unauthorized", 403),
        Reply(200, {"status": "deactivated"}, {"Location": url}),
        Reply(200, {"status": "valid"}),
        problem("serverInternal", 500),
    ]
    assert authority.find_account(server, KEY) == Account(url)
    assert json.loads(ca.requests[-1].payload) == {"onlyReturnExisting": True}
    assert "jwk" in ca.requests[-1].protected
    assert authority.find_account(server, KEY) is None
    assert authority.find_account(server, KEY) is None
    assert permanent(lambda: authority.find_account(server, KEY)).reason is Reason.ACCOUNT_DEACTIVATED
    assert permanent(lambda: authority.find_account(server, KEY)).reason is Reason.ACCOUNT_DEACTIVATED
    assert permanent(lambda: authority.find_account(server, KEY)).reason is Reason.CA_REFUSED
    temporary(lambda: authority.find_account(server, KEY))


def test_what_registration_sends(ca: AcmeServer, authority: Authority, server: Server) -> None:
    """Terms are agreed to, a contact is sent only where there is one, and a binding is signed for the newAccount URL.

    Mutation: send an empty contact, or sign the binding for the directory's URL.
    """
    ca.script[NEW_ACCOUNT] = [Reply(201, {"status": "valid"}, {"Location": ca.origin + "/acct/1"})]
    assert authority.register(server, KEY, "", None) == Account(ca.origin + "/acct/1")
    assert json.loads(ca.requests[-1].payload) == {"termsOfServiceAgreed": True}
    authority.register(server, KEY, "admin@example.test", Binding("kid-1", b"c2VjcmV0LXNlY3JldC1zZWNyZXQ"))
    payload = json.loads(ca.requests[-1].payload)
    assert payload["contact"] == ["mailto:admin@example.test"]
    header = Received("", "", {}, json.dumps(payload["externalAccountBinding"]).encode()).protected
    assert header == {"alg": "HS256", "kid": "kid-1", "url": ca.origin + NEW_ACCOUNT}
    assert ca.requests[-1].protected["url"] == ca.origin + NEW_ACCOUNT


def test_a_used_up_binding_is_told(ca: AcmeServer, authority: Authority, server: Server) -> None:
    """`malformed` in answer to a binding ends as EABAlreadyBound with key id and the CA's words, and without the key.

    Mutation: judge newAccount as if no binding had been sent.
    """
    ca.script[NEW_ACCOUNT] = [problem("malformed", 400, "The account is not awaiting external account binding.")]
    binding = Binding("kid-1", b"c2VjcmV0LXNlY3JldC1zZWNyZXQ")
    error = permanent(lambda: authority.register(server, KEY, "", binding))
    assert error.reason is Reason.EAB_ALREADY_BOUND
    assert str(error).startswith(
        "Registering an account with external account binding kid-1 failed. "
        'The CA says: "The account is not awaiting external account binding". The CA has bound this key id'
    )
    assert "c2VjcmV0" not in str(error) + repr(binding)


@pytest.mark.parametrize("instance", [True, False])
def test_new_terms_are_told_with_their_address(ca: AcmeServer, session: Session, instance: bool) -> None:
    """The page where somebody has to agree is the problem's `instance`, else the link to the terms.

    Mutation: do not look for the link, or take the first one.
    """
    link = '<https://ca.test/up>;rel="up", <https://ca.test/terms/2>;rel="terms-of-service"'
    refused = problem("userActionRequired", 403, "Terms of service have changed", Link=link)
    if instance:
        refused.body["instance"] = "https://ca.test/agree?token=1"
    ca.script[NEW_ORDER] = [refused]
    error = permanent(lambda: session.new_order(NAMES))
    assert error.reason is Reason.TERMS_CHANGED
    assert ("https://ca.test/agree?token=1" if instance else "https://ca.test/terms/2.") in str(error)


def public(pem: bytes) -> dict[str, Any]:
    """The public half of an EC key, as JWK."""
    key = load_pem_private_key(pem, None)
    return dict(JWKEC(key=key).public_key().to_partial_json()) | {"kty": "EC"}


def key_change(ca: AcmeServer, *replies: Reply) -> None:
    """A CA that answers keyChange so."""
    ca.script[DIRECTORY] = [Reply(body={**ca.directory, "keyChange": ca.origin + "/key-change"})]
    ca.script["/key-change"] = list(replies)
    ca.script[ORDER] = [order_reply(ca, 200)]


def test_a_change_of_key_is_signed_by_both(ca: AcmeServer, session: Session) -> None:
    """The request is the old key's, what it carries the new one's, with the account, the old key and no nonce; later
    requests are the new key's.

    Mutation: put a nonce or a kid into the inner header.
    """
    key_change(ca, Reply())
    new = Keys().account_key()
    session.change_key(new)
    outer = ca.requests[-1]
    assert outer.protected["kid"] == ACCOUNT
    inner = json.loads(outer.payload)
    header = json.loads(b64decode(inner["protected"]))
    assert sorted(header) == ["alg", "jwk", "url"]
    assert header["url"] == outer.protected["url"] == ca.origin + "/key-change"
    old_key = public(KEY)
    assert json.loads(b64decode(inner["payload"])) == {"account": ACCOUNT, "oldKey": old_key}
    assert header["jwk"] == public(new)
    assert session.key_authorization("t") == f"t.{account_key(new).thumbprint}"


def test_a_session_asks_nothing_while_its_key_is_in_doubt(ca: AcmeServer, session: Session) -> None:
    """After a change of key without an answer nothing is asked; after a refusal the old key goes on; a later change
    that is confirmed ends the doubt.

    Mutation: go on with the old key after a lost answer.
    """
    new = Keys().account_key()
    key_change(ca, Reply(raw=b"junk"), problem("conflict", 409), Reply(raw=b"junk"), Reply())
    temporary(lambda: session.change_key(new))
    asked = len(ca.requests)
    assert "has not confirmed" in str(temporary(lambda: session.order(ca.origin + ORDER)))
    assert len(ca.requests) == asked
    permanent(lambda: session.change_key(new))
    session.order(ca.origin + ORDER)
    assert session.key_authorization("t") == f"t.{account_key(KEY).thumbprint}"
    temporary(lambda: session.change_key(new))
    session.change_key(new)
    session.order(ca.origin + ORDER)
    assert session.key_authorization("t") == f"t.{account_key(new).thumbprint}"


def test_a_request_that_came_after_the_change_of_key_is_sent_again(ca: AcmeServer, session: Session) -> None:
    """What was signed with the old key, and refused because the key was changed meanwhile, is sent with the new one.

    Mutation: let the refusal pass.
    """
    new = Keys().account_key()
    key_change(ca, Reply())

    def refused() -> Iterator[bytes]:
        session.change_key(new)
        yield json.dumps({"type": "urn:ietf:params:acme:error:malformed", "detail": "JWS verification error"}).encode()

    ca.script[ORDER] = [Reply(400, chunks=refused), order_reply(ca, 200)]
    assert session.order(ca.origin + ORDER).status == "pending"
    assert ca.paths().count(ORDER) == 2


def test_a_ca_without_key_change(ca: AcmeServer, session: Session) -> None:
    """A directory without keyChange is told, and nothing is sent.

    Mutation: post to an empty URL.
    """
    error = permanent(lambda: session.change_key(Keys().account_key()))
    assert "keyChange" in str(error)
    assert ca.paths() == [DIRECTORY]


@pytest.mark.parametrize("location", ["", "http://ca.test/order/1", "/order/1", "https://ca.test/" + "x" * 5000])
def test_an_order_without_a_url_is_refused(ca: AcmeServer, session: Session, location: str) -> None:
    """An order that could not be found again ends the attempt.

    Mutation: return it with whatever the Location says.
    """
    ca.script[NEW_ORDER] = [Reply(201, {"status": "ready"}, {"Location": location})]
    assert permanent(lambda: session.new_order(NAMES)).reason is Reason.CA_REFUSED


def test_what_the_other_requests_send(ca: AcmeServer, session: Session) -> None:
    """Reading posts an empty payload, an answer an empty object, finalize the CSR, giving up a status.

    Mutation: post {} to read, or the key authorization to answer.
    """
    url = ca.origin + ORDER
    ca.script[ORDER] = [Reply(200, {"status": "valid"})]
    session.order(url)
    session.authorization(url)
    session.answer(url)
    session.finalize(url, b"\xff\xfe\xfd")
    session.deactivate(url)
    sent = [request.payload for request in ca.requests if request.method == "POST"]
    assert sent == [b"", b"", b"{}", b'{"csr":"__79"}', b'{"status":"deactivated"}']


def test_the_certificate_comes_as_served(ca: AcmeServer, session: Session) -> None:
    """The chain is handed on byte for byte, asked for as PEM.

    Mutation: strip or decode it.
    """
    chain = b"-----BEGIN CERTIFICATE-----\r\nAAAA\r\n-----END CERTIFICATE-----\r\n\n"
    ca.script["/cert/1"] = [Reply(200, chain, {"Content-Type": "application/pem-certificate-chain"})]
    assert session.certificate(ca.origin + "/cert/1") == chain
    assert ca.requests[-1].headers["Accept"] == "application/pem-certificate-chain"
    assert ca.requests[-1].payload == b""


@pytest.mark.parametrize("body", [b"", b"<html>back soon</html>", b'{"status": "valid"}'])
def test_what_is_no_certificate_is_asked_for_again(ca: AcmeServer, session: Session, body: bytes) -> None:
    """A page with status 200 in place of the certificate does not cost the certificate, and no word of it is repeated.

    Mutation: hand it on.
    """
    ca.script["/cert/1"] = [Reply(200, body)]
    error = temporary(lambda: session.certificate(ca.origin + "/cert/1"))
    assert str(error) == f"What the CA sent from {ca.origin}/cert/1 is no PEM certificate. It is asked for again."


def test_a_page_in_place_of_an_order_is_temporary(ca: AcmeServer, session: Session) -> None:
    """HTML with status 200, or an error page of a firewall, changes nothing, and no word of it is repeated.

    Mutation: take it for an order without members, or call 403 permanent.
    """
    url = ca.origin + ORDER
    html = {"Content-Type": "text/html"}
    ca.script[ORDER] = [Reply(200, b"<html>secret", html), Reply(200, b"[]"), Reply(403, b"<html>secret", html)]
    for words in ("no JSON object", "no JSON object", "HTTP 403 with an HTML page"):
        error = temporary(lambda: session.order(url))
        assert words in str(error)
        assert "secret" not in str(error)


def test_finalize_tells_its_order(ca: AcmeServer, session: Session) -> None:
    """The answer to finalize is the order; its URL is the Location where there is one.

    Mutation: give it the finalize URL.
    """
    url = ca.origin + ORDER + "/finalize"
    ca.script[ORDER + "/finalize"] = [Reply(200, {"status": "processing"}), order_reply(ca, 200)]
    assert session.finalize(url, b"csr").url == ""
    assert session.finalize(url, b"csr").url == ca.origin + ORDER


def test_accounts_of_one_ca_share_its_nonces_not_their_keys(
    ca: AcmeServer, authority: Authority, server: Server
) -> None:
    """Two sessions at one CA use one stock of nonces and sign each with its own account; the directory is read once.

    Mutation: keep nonces and directory in the session.
    """
    ca.script[ORDER] = [order_reply(ca, 200)]
    for number in (1, 2):
        authority.session(server, Keys().account_key(), f"{ca.origin}/acct/{number}").order(ca.origin + ORDER)
    assert ca.paths() == [DIRECTORY, NEW_NONCE, ORDER, ORDER]
    assert [request.protected["kid"][-1] for request in ca.requests[2:]] == ["1", "2"]
