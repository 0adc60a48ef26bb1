"""The names of a certificate, in the one form in which they are compared, hashed and ordered.

A name is a lower-case A-label name without a trailing dot, a wildcard with its `*.` (RFC 8555 section 7.1.4, RFC 5890).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import idna

from certbotk8s.domain.errors import PermanentError
from certbotk8s.domain.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Iterable

    from certbotk8s.domain.api import CertificateSpec

# RFC 5280 upper bound of a common name (ub-common-name), in bytes.
COMMON_NAME_MAX = 64


def normalise(name: str) -> str:
    """`name` in the one form; raises PermanentError(InvalidSpec) when it is no DNS name."""
    stripped = name.strip().removesuffix(".")
    wildcard, rest = ("*.", stripped[2:]) if stripped.startswith("*.") else ("", stripped)
    try:
        encoded = idna.encode(rest, uts46=True, std3_rules=True).decode("ascii").lower()
    except (idna.IDNAError, UnicodeError, ValueError) as error:
        raise PermanentError(Reason.INVALID_SPEC, f'"{name[:253]}" is no DNS name: {str(error)[:200]}.') from error
    return wildcard + encoded


def wanted_names(spec: CertificateSpec) -> tuple[str, ...]:
    """The names to order, each once, in the spec's order; what a wildcard of the same spec covers is left out.

    Let's Encrypt refuses `a.example.test` beside `*.example.test` as redundant, other CAs charge for it.
    """
    names = list(dict.fromkeys(normalise(name) for name in spec.dns_names or (spec.common_name,)))
    wildcards = {name[2:] for name in names if name.startswith("*.")}
    return tuple(name for name in names if name.startswith("*.") or name.partition(".")[2] not in wildcards)


def common_name(spec: CertificateSpec) -> str:
    """The subject's common name: the spec's, else the first name that fits.

    An empty subject is refused by some CAs that sell organisation-validated certificates, and no CA minds a CN that is
    among the names; "" when every name is longer than 64 bytes.
    """
    if spec.common_name:
        return normalise(spec.common_name)
    return next((name for name in wanted_names(spec) if len(name) <= COMMON_NAME_MAX), "")


def names_hash(names: Iterable[str]) -> str:
    """SHA-256 (hex) of a set of names: equal for equal sets, whatever their order."""
    return hashlib.sha256("\n".join(sorted(set(names))).encode()).hexdigest()


def listing(names: Iterable[str], most: int = 3) -> str:
    """Names for a sentence: `a.example.test, b.example.test and 4 more`."""
    names = list(names)
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
