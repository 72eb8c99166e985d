# make demo: the whole pipeline on the toy world, then where the report lies. make test: the tests. make bench: every
# computation against TRL. All of them make .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench lint clean

demo: .venv/installed
	$(BIN)/python train.py

test: .venv/installed-dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --durations 15

bench: .venv/installed-bench
	$(BIN)/python launch/bench

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and by itself: what follows is then satisfied by it, whichever build (CPU or CUDA) it is.
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check $$(grep '^torch==' requirements.txt)
	$(BIN)/pip install --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed-bench requirements-dev.txt
	$(BIN)/pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

.venv/installed-bench: .venv/installed requirements-bench.txt
	$(BIN)/pip install --disable-pip-version-check -r requirements-bench.txt
	touch $@

clean:
	rm -rf .venv runs
