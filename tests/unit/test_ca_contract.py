"""The contract of `ports.Authority` and `ports.Session`, for the CA in memory: the tests that Pebble passes.

Left to Pebble alone are those of HTTP itself: nonces, Retry-After, TLS, and the count of requests on the wire.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from certbotk8s.domain.errors import Problem
from certbotk8s.ports import Binding, Server
from tests.contract import test_ca_pebble as pebble
from tests.fakes.ca import FakeAuthority, FakeCA
from tests.fakes.clock import FakeClock
from tests.lab.acme import BLOCKED_NAME

EAB = {"kid-1": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LW5vLjE_", "kid-2": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LW5vLjI_"}


@pytest.fixture
def lab() -> SimpleNamespace:
    return SimpleNamespace(eab=EAB)


@pytest.fixture
def responder() -> SimpleNamespace:
    return SimpleNamespace(answers={})


@pytest.fixture
def ca(responder: SimpleNamespace) -> FakeCA:
    made = FakeCA(FakeClock())
    made.external_accounts = EAB
    made.profiles = {"default": "90 days", "shortlived": "60 seconds"}
    made.refused = {BLOCKED_NAME}
    wrong = Problem("unauthorized", "The answer was wrong.", 403)
    made.validate = lambda _name, token: None if token in responder.answers else wrong
    return made


@pytest.fixture
def authority(ca: FakeCA) -> FakeAuthority:
    return FakeAuthority.of(ca)


@pytest.fixture
def server(ca: FakeCA) -> Server:
    return Server(ca.url)


@pytest.fixture
def binding() -> Binding:
    return Binding("kid-1", EAB["kid-1"].encode())


@pytest.fixture
def suffix() -> str:
    return "example.test"


test_the_certificate_holds_the_names_and_the_key = pebble.test_the_certificate_holds_the_names_and_the_key
test_every_usual_text_of_the_hmac_key_registers = pebble.test_every_usual_text_of_the_hmac_key_registers
test_a_wrong_hmac_key_is_told_in_words = pebble.test_a_wrong_hmac_key_is_told_in_words
test_an_account_without_binding_is_refused = pebble.test_an_account_without_binding_is_refused_with_what_to_do
test_an_account_is_found_again_by_its_key = pebble.test_an_account_is_found_again_by_its_key
test_the_directory_tells_profiles_and_binding = pebble.test_the_directory_tells_profiles_and_that_a_binding_is_needed
test_a_name_that_the_ca_refuses = pebble.test_a_name_that_the_ca_refuses
test_an_unknown_profile_is_told = pebble.test_an_unknown_profile_is_told
test_an_order_that_the_ca_does_not_know = pebble.test_an_order_that_the_ca_does_not_know
test_finalize_before_the_names_are_validated = pebble.test_finalize_before_the_names_are_validated
test_a_csr_for_other_names_is_refused = pebble.test_a_csr_for_other_names_is_refused
test_a_wrong_answer_shows_in_the_authorization = pebble.test_a_wrong_answer_shows_in_the_authorization
test_an_authorization_can_be_given_up = pebble.test_an_authorization_can_be_given_up
test_an_imported_rsa_account_key_works = pebble.test_an_imported_rsa_account_key_works
test_a_key_in_jwk_is_the_same_key = pebble.test_a_key_in_jwk_is_the_same_key
test_a_changed_contact_is_told = pebble.test_a_changed_contact_is_told
test_an_account_gets_a_new_key = pebble.test_an_account_gets_a_new_key
test_what_is_wrong_with_a_binding = pebble.test_what_is_wrong_with_a_binding
