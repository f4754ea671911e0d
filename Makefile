# make demo: train a small GPT-2 on any CPU, from an empty machine to a figure. make test: the tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint
demo: .venv/installed
	$(BIN)/python pre_tokens/handle_tokens.py --source builtin --out-dir data/builtin
	$(BIN)/python train_gpt2.py --preset demo --overwrite

test: .venv/installed-dev
	$(BIN)/python -m pytest

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
