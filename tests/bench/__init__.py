"""The figures: counted from the servers' side, never asserted by a test."""
