"""The controller's composition root."""

from __future__ import annotations


def main() -> None:
    """Run the controller until it is told to stop."""
