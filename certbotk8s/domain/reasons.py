"""Every reason that a condition or an event can carry, declared once.

Conditions, events, logs, metrics and `certctl` use the same words. The value is the machine-readable `reason`.
"""

from enum import StrEnum


class Reason(StrEnum):
    """Machine-readable reasons of conditions and events."""

    # Ready=True
    READY = "Ready"  # the Secret holds a certificate that fits the spec
    RENEWING = "Renewing"  # it does, and its successor is due or being ordered

    # why a certificate is wanted (Ready=False, or Issuing=True)
    SECRET_MISSING = "SecretMissing"  # noqa: S105 - a reason, not a secret
    SECRET_INVALID = "SecretInvalid"  # noqa: S105
    NAMES_CHANGED = "NamesChanged"
    KEY_CHANGED = "KeyChanged"
    EXPIRED = "Expired"
    RENEW_NOW = "RenewNow"

    # what is being done or waited for (Issuing=True)
    ORDER_PENDING = "OrderPending"
    SAME_NAMES = "SameNames"  # another Certificate is ordering the same names
    ORDERS_LIMITED = "OrdersLimited"  # as many orders of the issuer are under way as it allows
    BACKING_OFF = "BackingOff"
    CA_UNAVAILABLE = "CAUnavailable"
    RATE_LIMITED = "RateLimited"

    # outcomes
    ISSUED = "Issued"
    ADOPTED = "Adopted"
    ORDER_ABANDONED = "OrderAbandoned"  # before finalize: nobody wants it any more, or it was not remembered
    CERTIFICATE_DISCARDED = "CertificateDiscarded"  # after finalize: the spec asks for something else by now

    # refusals and failures (Issuing=False or Ready=False)
    INVALID_SPEC = "InvalidSpec"
    ISSUER_NOT_FOUND = "IssuerNotFound"
    ISSUER_NOT_READY = "IssuerNotReady"
    NOT_ALLOWED = "NotAllowed"  # by the policy of the ClusterIssuer
    NAME_CLAIMED = "NameClaimed"  # by a Certificate of another namespace
    SECRET_CONFLICT = "SecretConflict"  # noqa: S105
    SECRET_NOT_OWNED = "SecretNotOwned"  # noqa: S105
    SECRET_IMMUTABLE = "SecretImmutable"  # noqa: S105
    NO_BINDING_FITS = "NoBindingFits"
    NO_INGRESS_CLASS = "NoIngressClass"
    NOT_PREAUTHORIZED = "NotPreauthorized"
    REJECTED_IDENTIFIER = "RejectedIdentifier"
    CHALLENGE_FAILED = "ChallengeFailed"
    ORDER_INVALID = "OrderInvalid"
    ORDER_GONE = "OrderGone"
    ORDER_UNFINISHED = "OrderUnfinished"  # after finalize, when its time was over
    CERTIFICATE_REJECTED = "CertificateRejected"  # what the CA sent did not pass our checks
    CSR_REFUSED = "CSRRefused"
    KEY_LOST = "KeyLost"
    CA_REFUSED = "CARefused"

    # Issuer
    ACCOUNT_REGISTERED = "AccountRegistered"
    ACCOUNT_UNKNOWN = "AccountUnknown"
    ACCOUNT_DEACTIVATED = "AccountDeactivated"
    ACCOUNT_KEY_INVALID = "AccountKeyInvalid"
    ACCOUNT_KEY_MISSING = "AccountKeyMissing"
    ACCOUNT_KEY_UNSUPPORTED = "AccountKeyUnsupported"
    ACCOUNT_KEY_BOUND = "AccountKeyBound"  # with another binding, and it is not ours to replace
    ACCOUNT_KEY_CHANGED = "AccountKeyChanged"
    ACCOUNT_KEY_KEPT = "AccountKeyKept"  # the CA, or a setting, refused to change it
    CONTACT_REFUSED = "ContactRefused"
    EAB_REQUIRED = "EABRequired"
    EAB_REFUSED = "EABRefused"
    EAB_ALREADY_BOUND = "EABAlreadyBound"
    EAB_USED = "EABUsed"
    EAB_EXPIRED = "EABExpired"
    EAB_KEY_ID_UNKNOWN = "EABKeyIDUnknown"
    EAB_MAC_WRONG = "EABMACWrong"
    EAB_NOT_NEEDED = "EABNotNeeded"
    EAB_SECRET_MISSING = "EABSecretMissing"  # noqa: S105
    EAB_KEY_INVALID = "EABKeyInvalid"
    DIRECTORY_INVALID = "DirectoryInvalid"
    CA_BUNDLE_INVALID = "CABundleInvalid"
    TERMS_CHANGED = "TermsChanged"
    UNKNOWN_PROFILE = "UnknownProfile"
    SERVER_NOT_ALLOWED = "ServerNotAllowed"  # not one of --issuer-servers

    # Ingress
    CERTIFICATE_CREATED = "CertificateCreated"
    CERTIFICATE_UPDATED = "CertificateUpdated"
    CERTIFICATE_DELETED = "CertificateDeleted"
    INGRESS_INVALID = "IngressInvalid"
