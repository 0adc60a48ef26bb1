# Everything a newcomer needs; each target sets up what it uses.
PYTHON ?= python3
UV = .venv/bin/uv
RUN = .venv/bin
STAMP = .venv/.synced
# Two at a time, each in a lab of its own: tests wait more than they work.
TESTS = $(RUN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test check soak bench lab lint types unit clean

demo: $(STAMP)
	@$(RUN)/python -m tests.demo $(if $(ONCE),--once) $(if $(CA),--ca $(CA))

test: check lab
	@$(TESTS) -m "not soak" tests/model tests/contract tests/adapters tests/e2e tests/test_journey.py

check: $(STAMP)
	@$(RUN)/ruff check .
	@$(RUN)/ruff format --check .
	@$(RUN)/mypy
	@$(RUN)/lint-imports --no-cache
	@$(RUN)/python -m pytest -q tests/unit tests/test_architecture.py

soak: $(STAMP) lab
	@$(TESTS) -rP -m soak tests/model tests/e2e

# ROUNDS=n measures n times; AGAINST=folder measures the controller of another checkout in turns with this one's.
bench: $(STAMP) lab
	@$(RUN)/python -m tests.lab run -- $(RUN)/python -m tests.bench --count $(or $(N),200) --key $(or $(KEY),both) \
		$(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(AGAINST),--against $(AGAINST))

lab: $(STAMP)
	@$(RUN)/python -m tests.lab build

# uv comes from PyPI into the environment that it then fills from the lock file.
$(STAMP): pyproject.toml uv.lock
	@test -x $(UV) || { $(PYTHON) -m venv .venv && $(RUN)/python -m pip install --quiet "uv>=0.13,<0.14"; }
	@VIRTUAL_ENV=$(CURDIR)/.venv $(UV) sync --frozen --inexact --quiet
	@touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
