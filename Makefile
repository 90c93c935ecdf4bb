# `make demo` and `make test` need Python (3.11 or newer) and nothing else: everything is installed into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TOOLS := $(VENV)/.tools

.PHONY: demo test format clean

demo: $(READY)
	$(BIN)/python -m examples.nas_interleaving run

test: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

format: $(TOOLS)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# torch comes first and by its exact version, so that no other package chooses one: each torchvision goes with one.
$(READY): constraints.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable ".[example]"
	touch $@

# The other libraries that tests and benchmark compare with. Betty asks for an older Python and BOAT for an older NumPy
# than they need.
$(TOOLS): $(READY)
	$(PIP) --editable ".[dev,peers]"
	$(PIP) --no-deps --ignore-requires-python betty-ml boat-torch
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
