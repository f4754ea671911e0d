# make demo: train a small GPT-2 on any CPU, from an empty machine to a figure. make test: the tests.
# make test-slow: those left out of it, which take tens of seconds each.
# make test-faults: all the ways in which a run may be broken, and a table of what it survived.
# make soak: 20 minutes of training (MINUTES=20) with one of them every half minute.
PYTHON ?= python3
BIN := .venv/bin
MINUTES ?= 20
# Of these a single test may take two hours, and the soak test three times its minutes.
FAULTS = -m faults -n 0 --timeout=$(LIMIT) -o faulthandler_timeout=$(LIMIT)
LIMIT = $$((7200 + 180 * $(MINUTES)))

.PHONY: demo test test-slow test-faults soak lint
demo: .venv/installed
	$(BIN)/python pre_tokens/handle_tokens.py --source builtin --out-dir data/builtin
	$(BIN)/python train_gpt2.py --preset demo --overwrite

test: .venv/installed-dev
	$(BIN)/python -m pytest

test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -m slow

test-faults: .venv/installed-dev
	$(BIN)/python -m pytest $(FAULTS) tests/faults

soak: .venv/installed-dev
	SOAK_MINUTES=$(MINUTES) $(BIN)/python -m pytest $(FAULTS) tests/faults/test_soak.py

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A stamp file each, so that a changed list of packages is installed anew and an interrupted install repeated.
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@
