# `make demo` and `make test` each work as the only command on a machine that has Python >= 3.11 and make.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test check notebooks bench chaos clean

demo: .venv/demo
	$(BIN)/escala run quickstart
	$(BIN)/escala fit quickstart
	$(BIN)/escala report quickstart

# With SLOW=1 also most of those that take more than five seconds each, as in .ci/run. JOBS files of tests at once:
# those of the cluster mostly wait. TESTS names some.
JOBS ?= 2
test: check
	$(BIN)/pytest -n $(JOBS) --dist loadfile $(if $(SLOW),,-m "not slow") $(TESTS)

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: .venv/dev
	$(BIN)/jupyter-execute --inplace notebooks/*.ipynb

bench: .venv/dev
	$(BIN)/python tests/benchmarks/run.py

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Escala needs Python 3.11 or newer; name one with make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

# Schedules of kills and freezes over a small study; prints what was done, and a table of what was survived.
N ?= 200
chaos: .venv/dev
	PYTHONPATH=.:tests $(BIN)/python -m chaos.run $(N)

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
