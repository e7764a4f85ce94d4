# `make demo` and `make test` set up all that they need; nothing else has to be run before them.
PYTHON ?= $(shell tools/interpreters | head -n 1)
VENV := .venv
BIN := $(VENV)/bin
# One worker a core: the tests share nothing but the machine.
WORKERS ?= auto
PYTEST_ARGS ?=
CONVERT_ARGS ?=
QCOW2_ARGS ?=
CONVERSIONS := raw:raw,raw:qcow2,qcow2:raw,qcow2:qcow2,raw:vhdx,vhdx:raw,raw:vmdk,vmdk:raw,raw:stream
# The types are held on each of them.
TYPES := types-linux types-win32 types-darwin

.PHONY: demo test test-long fuzz docs bench lint types $(TYPES) wheel peers clean
.DEFAULT_GOAL := test

# The core needs no library. Those for encryption and Zstandard are in .venv; where they cannot be
# installed, the demo says what it leaves out.
demo: peers
	@if $(MAKE) --no-print-directory $(BIN)/.ready; then $(BIN)/python demo/demo.py; \
	else echo "demo: without the optional libraries" >&2; $(PYTHON) demo/demo.py; fi

peers:
	@PYTHON=$(PYTHON) tools/install-peers
	@tools/unpack-guest

$(BIN)/.ready: pyproject.toml | peers
	@test -n "$(PYTHON)" || { echo "no Python 3.11 to 3.14 was found" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

lint: $(BIN)/.ready
	$(BIN)/ruff check .

# Each platform keeps what it found, so that they can run side by side.
types: $(TYPES)
$(TYPES): types-%: $(BIN)/.ready
	$(BIN)/mypy --platform $* --cache-dir .mypy_cache/$*

wheel: $(BIN)/.ready
	tools/check-wheel

# Pytest comes last, so that its closing lines close the run.
test: peers $(BIN)/.ready
	$(MAKE) --no-print-directory -j 2 --output-sync lint types wheel
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=15 $(PYTEST_ARGS)

test-long: $(BIN)/.ready peers
	$(BIN)/python -m pip install -q -e '.[docs]'
	$(BIN)/python -m pytest -n $(WORKERS) --long --timeout=3600 $(PYTEST_ARGS)

# The site; warnings (links that lead nowhere, names that do not exist) are errors.
docs: $(VENV)-docs/.ready
	$(VENV)-docs/bin/python -m sphinx -E -W --keep-going -q -b html docs docs/_build
	@echo docs/_build/index.html

$(VENV)-docs/.ready: pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q -e '.[docs]'
	touch $@

# A million executions of each target, hours: FUZZ_RUNS, FUZZ_TARGETS, FUZZ_JOBS (tests/fuzz/__main__.py).
# Python 3.12 and later tells the fuzzer at no cost what is new, and the coverage with it.
FUZZ_PYTHON ?= $(shell tools/interpreters | tail -n 1)

.fuzz/venv/.ready: pyproject.toml
	$(FUZZ_PYTHON) -m venv .fuzz/venv
	.fuzz/venv/bin/python -m pip install -q -e '.[fuzz]'
	touch $@

fuzz: .fuzz/venv/.ready
	PYTHONPATH=src:tests .fuzz/venv/bin/python -m fuzz

bench: $(BIN)/.ready peers
	$(BIN)/python bench/nbd.py
	$(BIN)/python bench/serve.py $(SERVE_ARGS)
	$(BIN)/python bench/convert.py --pairs $(CONVERSIONS) $(CONVERT_ARGS)
	$(BIN)/python -m pip install -q numpy
	$(BIN)/python bench/qcow2.py $(QCOW2_ARGS)
	$(BIN)/python bench/chain.py
	$(BIN)/python bench/start.py

clean:
	rm -rf $(VENV) $(VENV)-docs docs/_build build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
