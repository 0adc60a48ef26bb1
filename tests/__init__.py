"""Tests: unit, contract, adapters, e2e on the lab, bench."""
