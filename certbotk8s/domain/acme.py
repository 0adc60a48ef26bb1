"""ACME resources (RFC 8555 section 7.1) as the CA sent them: hostile input.

Parsed leniently and capped in size by the adapter. Every status that a CA may send is a plain string: an unknown
one is an unknown one, not a crash.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import NamedTuple

import msgspec

from certbotk8s.domain.errors import Problem


class Identifier(NamedTuple):
    """Section 9.7.7: `type` is `dns` (an A-label name, a wildcard with its `*.`) or `ip`."""

    type: str
    value: str


class Directory(msgspec.Struct, frozen=True):
    """Section 7.1.1, with the profiles extension: `profiles` maps a name to its description."""

    new_nonce: str
    new_account: str
    new_order: str
    revoke_cert: str = ""
    key_change: str = ""
    renewal_info: str = ""
    terms_of_service: str = ""
    external_account_required: bool = False
    profiles: dict[str, str] = {}


class Account(msgspec.Struct, frozen=True):
    """Section 7.1.2. `contact` is its first e-mail address, None where the CA does not tell; `key_id` that of the
    external account binding that the CA repeats, "" for none.
    """

    uri: str
    contact: str | None = None
    key_id: str = ""


class Order(msgspec.Struct, frozen=True):
    """Section 7.1.3. `retry_after` is the answer's header; `url` is "" when the answer named no Location."""

    url: str
    status: str
    identifiers: tuple[Identifier, ...] = ()
    authorizations: tuple[str, ...] = ()
    finalize: str = ""
    certificate: str = ""
    expires: datetime | None = None
    error: Problem | None = None
    retry_after: timedelta | None = None


class Challenge(msgspec.Struct, frozen=True):
    """Section 8. `token` is "" where the CA sent none, or one outside the base64url alphabet."""

    type: str
    url: str
    status: str
    token: str = ""
    error: Problem | None = None


class Authorization(msgspec.Struct, frozen=True):
    """Section 7.1.4. `identifier` is without the `*.`; `wildcard` tells."""

    url: str
    status: str
    identifier: Identifier
    wildcard: bool = False
    challenges: tuple[Challenge, ...] = ()
    expires: datetime | None = None
    retry_after: timedelta | None = None
