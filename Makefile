# The whole interface: make demo, make test, make check. Everything is installed into .venv on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check faults format clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[lab,tensorboard,test,dev]'
	touch $@

demo: .venv/installed  ## train the same network with constant and with stochastic depth, and compare
	$(BIN)/stochastic-depth reproduce digits --out runs/digits

# Two workers of one thread each: threads that wait for each other would take the time of both.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

faults: .venv/installed  ## the long form of tests/faults: hundreds of kills and damaged files
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/hostile.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/faults.py

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build dist *.egg-info
