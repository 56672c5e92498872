# The whole interface: make demo, make test, make check, make docs. Everything is installed into .venv on first use.
PYTHON ?= python3
BIN := .venv/bin
PIP := pip install --quiet --disable-pip-version-check
# The oldest versions that are supported; the newest are in constraints.txt.
OLDEST := torch==2.8.0 torchvision==0.23.0

.PHONY: demo test test-oldest check docs faults format clean

# What the demo needs, installed in a minute.
.venv/lab: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/$(PIP) --constraint constraints.txt --editable '.[lab]'
	touch $@

.venv/installed: .venv/lab
	$(BIN)/$(PIP) --constraint constraints.txt --editable '.[lab,tensorboard,test,dev,docs]'
	touch $@

demo: .venv/lab  ## train the same network with constant and with stochastic depth, and compare
	$(BIN)/stochastic-depth reproduce digits --out runs/digits

# Two workers of one thread each: threads that wait for each other would take the time of both.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

.venv-oldest/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-oldest
	grep --invert-match --extended-regexp '^(torch|torchvision)==' constraints.txt > .venv-oldest/constraints.txt
	printf '%s\n' $(OLDEST) >> .venv-oldest/constraints.txt
	.venv-oldest/bin/$(PIP) --constraint .venv-oldest/constraints.txt --editable '.[lab,tensorboard,test,dev]'
	touch $@

test-oldest: .venv-oldest/installed  ## the tests with the oldest PyTorch; it downloads 3 to 4 GB
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest --numprocesses 2

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

docs: .venv/installed  ## the documentation, in build/docs; a broken link or an unknown name is an error
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --builder html --conf-dir docs . build/docs
	@echo "open build/docs/index.html"

faults: .venv/installed  ## the long form of tests/faults: hundreds of kills and damaged files
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/hostile.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/faults.py

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info
