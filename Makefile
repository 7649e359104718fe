# `make demo` and `make test` set up .venv from a fresh clone and run; both can be called again at any time.
# Every path is relative, so that the folder may have a space in its name.
PYTHON ?= python3
PY := .venv/bin/python
DEMO := runs/demo

# The tests start many processes: none of them should compile every module again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check install clean

install: .venv/.installed

.venv/.installed: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

demo: .venv/.installed
	$(PY) -m condzoo sweep digits/resnet20_nobn_lastbn --grid model.name=cifar_resnet20_nobn_lastbn,cifar_resnet20_nobn --out $(DEMO)

test: .venv/.installed check
	$(PY) -m pytest -n auto --dist worksteal

check: .venv/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf .venv runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
