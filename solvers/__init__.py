"""Challenge solvers, each a file of its own, found by the entry points `certbotk8s.solvers`."""
