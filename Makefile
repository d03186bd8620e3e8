# `make` alone lists the verbs. Works from a fresh clone on Debian 12 as root, and anywhere
# that python3 (3.11 or later) with venv is on the PATH.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PYTEST := $(RUN) -m pytest
JOBS ?= auto
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup peers demo lint format test test-all bench fuzz docs build clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.complete ## make .venv with Diskwright and what its tests need

$(VENV)/.complete: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make setup: needs Python 3.11 or later; name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null || \
	    { echo "make setup: install Python's venv module (Debian: python3-venv)" >&2; exit 1; }; \
	  apt-get -q update >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get -q -y install python3-venv >/dev/null; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25'
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[all,test,lint]'
	@touch $@

# Where there is no Debian or no root, tests that need other programs skip and say so.
peers:
	@if [ -n "$$CI" ] || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; }; \
	  then tests/peers/install_peers.sh --quiet; fi

demo: setup peers ## one disk through the whole tool set, each step timed
	$(RUN) demo/run.py $(ARGS)

lint: setup ## ruff and mypy
	$(RUN) -m ruff check src tests demo docs
	$(RUN) -m ruff format --check src tests demo docs
	$(RUN) -m mypy

format: setup ## let ruff format everything
	$(RUN) -m ruff check --fix src tests demo docs
	$(RUN) -m ruff format src tests demo docs

test: setup peers ## the suites that every change runs, within minutes
	$(PYTEST) -n $(JOBS) -m "not slow and not speed" $(ARGS)

test-all: setup peers ## everything: long enumerations too
	$(PYTEST) -n $(JOBS) -m "not speed" $(ARGS)

bench: setup peers ## measure against the peers on this machine, as ratios
	$(PYTEST) -p no:cacheprovider --timeout 1800 -s -m speed tests/speed $(ARGS)

fuzz: setup ## hostile images until interrupted; ARGS='--seed N' repeats
	$(RUN) tests/fuzz/run.py $(ARGS)

docs: setup ## write the generated pages of docs/ anew
	$(RUN) docs/generate.py $(ARGS)

build: setup ## the wheel and the source archive, into dist/
	$(RUN) -m pip install --quiet --disable-pip-version-check build
	$(RUN) -m build

clean: ## remove what the verbs above made
	rm -rf $(VENV) build dist demo/out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests docs demo -name __pycache__ -type d -prune -exec rm -rf {} +
