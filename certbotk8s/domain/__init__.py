"""Pure decisions: what a Certificate needs, and what may happen next. No I/O, no clock, no randomness, no logging."""
