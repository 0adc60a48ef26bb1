"""What certctl says when it cannot do what was asked."""

from __future__ import annotations

import sys

from certbotk8s.certctl.table import printable

# What to do about the API layer's sentences, by a part of them: none of these is a matter of the object asked for.
_HINTS = {
    "its resource type is not installed": (
        "install the resource types of certbotk8s: kubectl apply --server-side -f crds/ (in its source folder)"
    ),
    "cannot be reached": "see that it runs, and that the right one is meant: --context, --kubeconfig or $KUBECONFIG",
    "no way to the API server": "name a cluster with --context, --kubeconfig or $KUBECONFIG",
    "does not accept the credentials": "log in again, or choose other credentials with --context",
    "does not allow to": "ask the administrator of the cluster for this right, or name another namespace with -n",
}


class CertctlError(Exception):
    """A sentence for the user, lower case and without a full stop, and what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def tell(error: CertctlError) -> None:
    """Say it on standard error, in the style of `certctl: what is wrong`, `hint: what to do`."""
    print(f"certctl: {printable(error)}", file=sys.stderr)
    if error.hint:
        print(f"hint: {printable(error.hint)}", file=sys.stderr, flush=True)


def from_cluster(error: Exception) -> CertctlError:
    """An error of the API layer as a sentence for the user."""
    message = str(error)
    return CertctlError(message, next((hint for part, hint in _HINTS.items() if part in message), ""))
