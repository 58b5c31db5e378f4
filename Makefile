# Needs python3 (3.11 or later) with pip, and make; everything else goes into $(VENV).
#
#   make demo    four emulated instances, the gateway and 90 s of a real trace; prints how every tier fared
#   make up      the same fleet, left running in the background; `make down` ends it
#   make test    everything that CI runs
#   make bench   the simulator beside DynoSim, and the time that a decision takes
#   make bench-gateway   the gateway beside a bare relay, HAProxy, nginx, LiteLLM and vLLM's router
#   make study   how much load each policy holds, in every setting: hours; goes on where it was interrupted
#   make chaos   breaks an emulated fleet under load for MINUTES=30 and accounts for every request; SEED=n repeats one
#   make soak    half the load for MINUTES=60 without faults: what the gateway holds must not grow

VENV ?= .venv
PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,$(shell \
	$(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
BIN := $(VENV)/bin
READY := $(VENV)/.polyserve-ready

.DEFAULT_GOAL := help
.PHONY: help setup check unit live test demo up down study study-full lock bench bench-gateway chaos soak clean
.DELETE_ON_ERROR:

help:
	@sed -n '/^#   make/s/^#   //p' Makefile

setup: $(READY)

# The simulation compiles the loops once, so that engines and gateway need not, each for itself, when they start.
# `ensurepip` is missing on some systems (Debian without python3-venv): then the system's pip fills the environment.
$(READY): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: PolyServe needs Python 3.11 or later as python3; or say make PYTHON=..." >&2; exit 2; }
	@echo "setting up $(VENV) (once; a minute or two)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check pip; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@$(BIN)/polyserve simulate --trace uniform:64/8 --instances 1 --rate 5 --duration 1 >/dev/null 2>&1
	@touch $@

check: $(READY)
	@echo "check: ruff"
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@echo "check: mypy"
	@$(BIN)/mypy --no-error-summary

unit: $(READY)
	@echo "test: unit"
	@$(BIN)/python -m pytest -q -m "not live"

# Real processes that keep real time: alone, so that nothing else takes the cores from them.
live: $(READY)
	@echo "test: live"
	@$(BIN)/python -m pytest -q -m live

test:
	@$(MAKE) --no-print-directory check
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory live

demo: $(READY)
	@$(BIN)/python -m polyserve.demo run

up: $(READY)
	@$(BIN)/python -m polyserve.demo up

down: $(READY)
	@$(BIN)/python -m polyserve.demo down

# Every question of the study, in turn; `polyserve study` lists them. What was interrupted goes on where it was.
STUDY ?= $(shell $(BIN)/polyserve study | cut -d' ' -f1)
JOBS ?= 0

study: $(READY)
	@for s in $(STUDY); do $(BIN)/polyserve study --setting $$s --quick --jobs $(JOBS) --out build/study/$$s || exit; done

study-full: $(READY)
	@for s in $(STUDY); do $(BIN)/polyserve study --setting $$s --jobs $(JOBS) --out build/study-full/$$s || exit; done

# DynoSim goes into an environment of its own, build/dynosim, and is left out where it cannot be had.
bench: $(READY)
	@$(BIN)/python benchmarks/bench.py

# Wants two cores, a C compiler and wrk; HAProxy and nginx are the system's. LiteLLM and vLLM's router go into
# environments of their own, build/peers. What cannot be had is left out. About seven minutes; ARGS="--only bare,gateway".
bench-gateway: $(READY)
	@$(BIN)/python benchmarks/gateway.py $(ARGS)

# Exit 1 when a request was lost, doubled or cut short in silence, or when the gateway holds anything afterwards.
MINUTES ?= 30
SEED ?=

chaos: $(READY)
	@PYTHONPATH=benchmarks $(BIN)/python -m chaos --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

# The same without faults, at half the load: exit 1 when what the gateway holds grows.
soak: $(READY)
	@PYTHONPATH=benchmarks $(BIN)/python -m chaos.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

# After a change of the dependencies in pyproject.toml: new pins from a clean environment.
lock:
	@rm -rf build/lock && $(PYTHON) -m venv build/lock
	@build/lock/bin/pip install --quiet --disable-pip-version-check '.[dev]'
	@{ head -n 1 requirements.lock; build/lock/bin/pip freeze --exclude polyserve-slo; } > build/requirements.lock
	@mv build/requirements.lock requirements.lock && rm -rf build/lock

clean:
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m polyserve.demo down --quiet; fi
	@rm -rf $(VENV) build dist run src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@$(PYTHON) -c 'import pathlib, shutil; [shutil.rmtree(p) for r in ("src", "tests") for p in pathlib.Path(r).rglob("__pycache__")]'
