"""Secrets do not print."""

from __future__ import annotations

import base64
import logging

import pytest

from certbotk8s.ca.jws import account_key
from certbotk8s.ca.keys import Keys
from certbotk8s.domain import api, pem
from certbotk8s.domain.sensitive import Sensitive
from certbotk8s.ports import Binding, Server

TEXT = b"correct-horse-battery-staple"
ENCODED = base64.b64encode(TEXT).decode()


def test_no_text_form_shows_it() -> None:
    """Neither str, repr, format, % nor a container shows the bytes; comparing and using them works as ever.

    Mutation: leave __format__ or __str__ to bytes.
    """
    secret = Sensitive(TEXT)
    shown = [
        str(secret),
        repr(secret),
        f"{secret}",
        f"{secret!s:>40}",
        str([secret]),
        str({"k": secret}),
    ]
    assert [text for text in shown if "horse" in text] == []
    assert secret == TEXT
    assert base64.b64encode(secret).decode() == ENCODED


@pytest.mark.parametrize(
    "holder",
    [
        pem.secret_value({"secret": ENCODED}, "secret"),
        api.Secret(metadata=api.ObjectMeta(name="s", namespace="n"), data={"secret": ENCODED}),
        Binding("kid-1", Sensitive(TEXT)),
        Keys().account_key(),
        Keys().certificate_key("ECDSA", 256, "PKCS8"),
        account_key(bytes(Keys().account_key())),
        Server("https://ca.example.test/dir"),
    ],
    ids=lambda holder: type(holder).__name__,
)
def test_what_holds_secrets_does_not_show_them(holder: object, caplog: pytest.LogCaptureFixture) -> None:
    """Everything that carries a key through the program can be logged without harm.

    Mutation: give one of these its plain repr.
    """
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("certbotk8s").debug("%s %r", holder, holder)
    for leak in (TEXT.decode(), ENCODED, "PRIVATE KEY"):
        assert leak not in caplog.text
