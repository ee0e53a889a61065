# The first two need nothing but Python 3.11 or later and a package index:
#   make audit   install besiege into .venv and lay siege to the embedded default; the report is under runs/
#   make test    install what the tests need and run them
#   make check   format, lint, types, tests
#   make test-browser   install Debian's chromium where there is none and look at the report in it
#   make bench   install the peer libraries into .venv-bench and write docs/benchmarks.md (ONLY=pgd: print one)
#   make format  let ruff rewrite what it can

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
BENCH := .venv-bench/bin

.PHONY: audit test test-browser check format bench clean

audit: .venv/.installed
	$(BIN)/besiege audit

test: .venv/.dev
	$(BIN)/pytest -n $(JOBS)

test-browser: .venv/.browser
	$(BIN)/pytest tests/browser

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n $(JOBS)

format: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv-bench/.peers
	$(BENCH)/python -m benchmarks $(ONLY)

clean:
	rm -rf .venv .venv-bench

%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "besiege needs Python 3.11; set PYTHON=")'
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

%/.dev: %/.installed
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

%/.browser: %/.dev
	command -v chromium >/dev/null || { SUDO=$$(command -v sudo || true); $$SUDO apt-get update -qq && $$SUDO apt-get install -qq -y chromium; }
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,browser]'
	touch $@

%/.peers: %/.installed benchmarks/peers/requirements.txt
	$(@D)/bin/python -m pip install --quiet --no-deps --requirement benchmarks/peers/requirements.txt
	touch $@

.PRECIOUS: %/.installed %/.dev
