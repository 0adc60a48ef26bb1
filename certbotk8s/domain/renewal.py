"""When a certificate is renewed, and when a failed attempt is made again."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime

    from certbotk8s.domain.api import CertificateFacts, CertificateSpec

SHORT_LIFE = timedelta(days=10)

# Bounded as in the CRD, so that no number is too large for a timedelta.
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|h|m|s)")
_DURATION_MAX_LENGTH = 32
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


def parse_duration(text: str) -> timedelta:
    """A Go duration such as `360h` or `1h30m`; ValueError for anything else."""
    if not text or len(text) > _DURATION_MAX_LENGTH or _DURATION.sub("", text):
        raise ValueError(f"{text[:40]!r} is no duration such as 360h or 1h30m")
    return timedelta(seconds=sum(float(number) * _UNITS[unit] for number, unit in _DURATION.findall(text)))


def renewal_time(spec: CertificateSpec, certificate: CertificateFacts) -> datetime:
    """When to renew, reckoned on the real life of the certificate, to the second.

    Without a setting when a third of the life is left, half of it when the life is under ten days. A renewBefore that
    is not shorter than the life would renew for ever: the default holds instead.
    """
    life = certificate.not_after - certificate.not_before
    before = life / 2 if life < SHORT_LIFE else life / 3
    if spec.renew_before_percentage:
        before = life * spec.renew_before_percentage / 100
    elif spec.renew_before:
        try:
            wanted = parse_duration(spec.renew_before)
        except ValueError:
            wanted = life
        before = wanted if wanted < life else before
    return (certificate.not_after - before).replace(microsecond=0)


def shortest_interval(life: timedelta) -> timedelta:
    """Between two issuances of one Certificate lies at least this: an hour, or a quarter of a short life."""
    return min(timedelta(hours=1), life / 4)


# A refusal of a name does not mend itself in minutes, and failed validations are rationed (Let's Encrypt: 5 per name
# and hour). 1 + 10 + 100 minutes spend three of them in the first two hours, then one a day.
NAME_LADDER = (timedelta(minutes=1), timedelta(minutes=10), timedelta(minutes=100), timedelta(days=1))
# A CA that is away or overloaded comes back by itself; one request in ten minutes harms nobody.
CA_LADDER = (timedelta(minutes=1), timedelta(minutes=2), timedelta(minutes=5), timedelta(minutes=10))
# Longer is nothing put off: not by the ladders, nor by a CA's Retry-After, which is read as a day at most.
LONGEST_PAUSE = timedelta(days=1)
# Before the first minute two quick tries: most network faults last seconds.
STEP_LADDER = (timedelta(seconds=2), timedelta(seconds=10), *CA_LADDER)


def rung(ladder: tuple[timedelta, ...], failures: int) -> timedelta:
    """The pause after that many failures (1 or more) in a row."""
    return ladder[min(max(failures, 1), len(ladder)) - 1]


def pause_after_failure(
    failures: int, *, ca_side: bool, certificate: CertificateFacts | None, now: datetime
) -> timedelta:
    """How long to wait after the `failures`-th failed attempt in a row.

    While a certificate is still valid, at most a tenth of what is left of its life, so that ten attempts remain even
    for one that lives a day; but not under a sixtieth of its whole life, nor under a minute for one of an hour or more.
    """
    pause = rung(CA_LADDER if ca_side else NAME_LADDER, failures)
    if certificate is None or certificate.not_after <= now:
        return pause
    floor = min(timedelta(minutes=1), (certificate.not_after - certificate.not_before) / 60)
    return max(min(pause, (certificate.not_after - now) / 10), floor)


# Pauses between looks at an order after our own act, where the CA names none with Retry-After; the last one repeats.
LOOKS = tuple(timedelta(seconds=s) for s in (0.1, 0.1, 0.2, 0.5, 1, 2, 4, 8, 15, 30))
# An order whose end the CA does not name (`expires`, RFC 8555 section 7.1.3) is waited for so long, from its begin and
# again from finalize: some CAs take hours for checks by people.
ORDER_LIMIT = timedelta(days=1)
# A CA's Retry-After that is shorter is kept over a restart only when it is the first of a state: that takes as long.
SHORT_PAUSE = timedelta(seconds=10)
# Pauses between looks at whether a challenge is served: an ingress controller takes 0.1 s to some seconds to load it.
SELF_CHECKS = tuple(timedelta(seconds=s) for s in (0.1, 0.1, 0.2, 0.2, 0.5, 1, 2, 5))
# After this the CA is asked all the same: a look from inside may be blocked where the CA's is not (split DNS, hairpin).
# An ingress controller that had lost the API server loads nothing for up to a minute: client-go lists again after 30 s,
# doubled by jitter. With a limit of 60 s every challenge presented after an outage could fail its validation.
SELF_CHECK_LIMIT = timedelta(minutes=2)
