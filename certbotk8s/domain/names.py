"""The names of a certificate, in the one form in which they are compared, hashed and ordered.

A name is a lower-case A-label name without a trailing dot, a wildcard with its `*.` (RFC 8555 section 7.1.4, RFC 5890).
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING

import idna

from certbotk8s.domain.errors import PermanentError
from certbotk8s.domain.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Iterable

    from certbotk8s.domain.api import AcmeSpec, CertificateSpec

# RFC 5280 upper bound of a common name (ub-common-name), in bytes.
COMMON_NAME_MAX = 64
# RFC 1035 section 2.3.4, without the root's dot and length.
NAME_MAX = 253


def normalise(name: str) -> str:
    """`name` in the one form; raises PermanentError(InvalidSpec) when it is no DNS name."""
    try:
        return _encode(name.strip())
    except ValueError as error:
        raise PermanentError(Reason.INVALID_SPEC, f'"{name[:253]}" is no DNS name: {str(error)[:200]}.') from error


# Every look at a Certificate asks for its names, and IDNA is the dearest part of that.
@lru_cache(maxsize=16384)
def _encode(name: str) -> str:
    wildcard, rest = ("*.", name[2:]) if name.startswith("*.") else ("", name)
    # The dot at the end goes last: IDNA knows more than one character for it.
    encoded = wildcard + idna.encode(rest, uts46=True).decode("ascii").removesuffix(".")
    if len(encoded) > NAME_MAX:
        raise ValueError(f"it is longer than {NAME_MAX} characters")
    if encoded.rpartition(".")[2].isdigit():
        raise ValueError("its last label is a number, as in an address")
    return encoded


def wanted_names(spec: CertificateSpec) -> tuple[str, ...]:
    """The names to order, each once, in the spec's order; what a wildcard of the same spec covers is left out.

    Let's Encrypt refuses `a.example.test` beside `*.example.test` as redundant, other CAs charge for it.
    """
    return _wanted(spec.dns_names or (spec.common_name,))


@lru_cache(maxsize=4096)
def _wanted(asked: tuple[str, ...]) -> tuple[str, ...]:
    names = list(dict.fromkeys(normalise(name) for name in asked))
    wildcards = {name[2:] for name in names if name.startswith("*.")}
    return tuple(name for name in names if name.startswith("*.") or name.partition(".")[2] not in wildcards)


def common_name(spec: CertificateSpec, acme: AcmeSpec | None) -> str:
    """The subject's common name: the spec's, else what `commonName` of the issuer says; "" for none.

    Auto is First where accounts are bound: CAs that sell organisation-validated certificates refuse an empty subject
    (InCommon on CERTInext), and the others have no use for a common name. First is the first name of at most 64 bytes.
    Where the spec's was left out since a wildcard covers it, that wildcard stands for it: CAs refuse a CN that is not
    ordered. Raises PermanentError(InvalidSpec) when the spec's is too long, or is no name of the spec.
    """
    names = wanted_names(spec)
    if not spec.common_name:
        if acme is None or acme.common_name == "Never":
            return ""
        if acme.common_name == "Auto" and not (acme.external_account_binding or acme.bindings):
            return ""
        return next((name for name in names if len(name) <= COMMON_NAME_MAX), "")
    asked = normalise(spec.common_name)
    found = next((name for name in (asked, f"*.{asked.partition('.')[2]}") if name in names), "")
    if not found:
        raise PermanentError(Reason.INVALID_SPEC, f'commonName "{asked}" is not among dnsNames.')
    if len(found) > COMMON_NAME_MAX:
        text = f'commonName "{found}" is longer than {COMMON_NAME_MAX} bytes; name it in dnsNames alone.'
        raise PermanentError(Reason.INVALID_SPEC, text)
    return found


def names_hash(names: Iterable[str]) -> str:
    """SHA-256 (hex) of a set of names: equal for equal sets, whatever their order."""
    return hashlib.sha256("\n".join(sorted(set(names))).encode()).hexdigest()


def listing(names: Iterable[str], most: int = 3) -> str:
    """Names for a sentence: `a.example.test, b.example.test and 4 more`."""
    names = list(names)
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
