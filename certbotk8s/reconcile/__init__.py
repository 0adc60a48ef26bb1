"""Brings objects to where they should be: observe, decide (domain), perform one step, persist, go on."""
