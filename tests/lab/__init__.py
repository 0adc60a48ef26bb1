"""A real control plane on one machine, without a container engine: plain processes on loopback.

`python -m tests.lab up` starts it; design and flags are in `lab.py` and in one file per part.
"""
