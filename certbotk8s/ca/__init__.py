"""ACME (RFC 8555): messages signed with `acme` and `josepy`, one HTTP request per call, nothing that waits."""
