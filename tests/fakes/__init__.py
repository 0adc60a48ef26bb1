"""Fakes for what the real parts cannot show; each passes the contract suite of the real one."""
