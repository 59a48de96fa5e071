# The habits of the house. Each target is a script in scripts/ so that it can be read, run and tested alone.
# Works with GNU make 3.81 (macOS). PYTHON=… chooses the interpreter when .venv is
# created (an existing .venv stays: make clean), ARGS=… is passed on.
SHELL = /bin/sh
ARGS =

.PHONY: help setup run test check fmt rows smoke chaos clients bench perf-gate soak lock clean

help: ## what there is (the default)
	@sed -n 's/^\([a-z-]*\):.*## */  make \1	/p' Makefile

setup: ## create .venv and install the locked dependencies; does nothing when up to date
	@PYTHON="$(PYTHON)" scripts/setup

run: setup ## fetch the default model once, then serve until Ctrl-C
	@scripts/run $(ARGS)

test: setup ## the whole test suite; ARGS="-k name" for a part of it
	@scripts/test $(ARGS)

check: setup ## ruff, format and mypy --strict, changing nothing
	@scripts/check

fmt: setup ## format and fix what can be fixed safely
	@scripts/fmt

rows: setup ## one test per row of the failure matrix
	@scripts/test tests/chaos $(ARGS)

smoke: setup ## the production smoke list against an LMX of its own; ARGS="--url URL --admin-key KEY" for a running one
	@scripts/smoke $(ARGS)

chaos: setup ## the long runs with faults, about 40 minutes
	@scripts/chaos

clients: setup ## real clients (openai, langchain, litellm, …) against a real LMX; needs the package registries
	@scripts/clients $(ARGS)

bench: setup ## LMX beside its engine in-process and other servers, about 10 minutes; ARGS for `python -m bench`
	@scripts/bench $(ARGS)

perf-gate: setup ## whether a change made it slower: ratios of a short run beside bench/baseline.json; docs/slo.md
	@.venv/bin/python -m bench.gate $(ARGS)

soak: setup ## 100,000 requests without growth, before a worker without a model
	@.venv/bin/python -m bench.soak $(ARGS)

lock: ## resolve the dependencies anew (maintainers; needs uv); ARGS=--upgrade for new versions
	@scripts/lock $(ARGS)

clean: ## remove .venv, caches and build outputs; never LMX_HOME
	@scripts/clean
