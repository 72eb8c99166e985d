# make demo: the whole pipeline on the toy world, then where the report lies. make test: the tests. make quick: those of
# them that take under a minute together. make real: a real chat model on real pairs, or on yours (make real
# DATA=pairs.jsonl). make bench: every computation against TRL. make size: how large the code is.
# All but the last make .venv.
PYTHON ?= python3
BIN := .venv/bin
# Bytecode is made of what is imported, when it is: compiling all of torch takes longer than fetching it.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/pip install --disable-pip-version-check --no-compile

.PHONY: demo real test quick bench lint size clean

demo: .venv/installed
	$(BIN)/python train.py

SMOLLM2 := models/smollm2-135m-instruct
DATA ?= launch/real/pairs.jsonl

real: .venv/installed-real
	$(BIN)/python launch/smollm2.py $(SMOLLM2)
	$(BIN)/python train.py experiment=real model.path=$(SMOLLM2) dataset.path=$(DATA) dataset.name=$(notdir $(basename $(DATA)))

# One thread each: those of the workers would wait for each other.
test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 15

quick: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not slow"

bench: .venv/installed-bench
	$(BIN)/python launch/bench

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

size:
	$(PYTHON) launch/size.py

# torch first and by itself: what follows is then satisfied by it, whichever build (CPU or CUDA) it is.
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) $$(grep '^torch==' requirements.txt)
	$(INSTALL) -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed-bench requirements-dev.txt
	$(INSTALL) -r requirements-dev.txt
	touch $@

.venv/installed-bench: .venv/installed requirements-bench.txt
	$(INSTALL) -r requirements-bench.txt
	touch $@

.venv/installed-real: .venv/installed requirements-real.txt
	$(INSTALL) -r requirements-real.txt
	touch $@

clean:
	rm -rf .venv runs
