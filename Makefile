# Two commands do everything on a machine with Python >= 3.11: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := src tests benchmarks

.PHONY: demo test check fix starter instruction-table continual-table continual-cost diagnosis-table forecast-table faults fuzz waiting bench endurance \
	wheel docs clean

demo: $(VENV)/installed  ## train, evaluate and generate on text inside your own Python: about two minutes
	$(BIN)/seedbed demo

test: $(VENV)/installed-dev  ## the whole test suite, offline
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(VENV)/installed-dev  ## what must be clean before a commit: format, lint, types
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

fix: $(VENV)/installed-dev  ## format, and mend what the linter can
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

starter: $(VENV)/installed-dev  ## the tests that need a real pretrained model (downloads 93 MB once)
	$(PIP) gguf accelerate
	$(BIN)/python tests/starter.py .starter
	SEEDBED_STARTER=.starter $(BIN)/python -m pytest -m starter

instruction-table: $(VENV)/installed-dev  ## docs/instruction-results.md, measured anew: hours. DATA=rows.json
	$(PIP) gguf accelerate
	$(BIN)/python tests/starter.py .starter
	$(BIN)/python benchmarks/instruction_tuning.py --model .starter --data $(DATA)

continual-table: $(VENV)/installed-dev  ## docs/continual-results.md, measured anew: hours. DATA=folder of texts
	$(PIP) gguf accelerate
	$(BIN)/python tests/starter.py .starter
	$(BIN)/python benchmarks/continual.py --pretrained .starter --data $(DATA)

continual-cost: $(VENV)/installed-dev  ## what each way of keeping costs a token, side by side. DATA=new.txt OLD=old.txt
	$(PIP) gguf accelerate
	$(BIN)/python tests/starter.py .starter
	$(BIN)/python benchmarks/continual_cost.py --model .starter --data $(DATA) --general_data $(OLD)

diagnosis-table: $(VENV)/installed-dev  ## docs/diagnosis-results.md, measured anew: a run of every trouble, about 8 minutes
	$(BIN)/python benchmarks/diagnosis.py --output .troubles

forecast-table: $(VENV)/installed-dev  ## docs/forecast-results.md, measured anew: twelve runs, about 12 minutes
	$(PIP) gguf accelerate
	$(BIN)/python tests/starter.py .starter
	$(BIN)/python benchmarks/forecast.py --starter .starter

faults: $(VENV)/installed-dev  ## six times the suite's kills, crashes and damaged files: about 15 minutes
	SEEDBED_FAULTS=1 $(BIN)/python -m pytest -n 2 tests/faults tests/runs/test_recovery.py tests/runs/test_storage.py

fuzz: $(VENV)/installed-dev  ## damaged files guided by the lines they reach: two hours. [SECONDS=7200]
	$(PIP) atheris
	$(BIN)/python -m tests.faults.guided --seconds $(or $(SECONDS),7200)

waiting: $(VENV)/installed-dev  ## how long one waits for what looks into run folders
	$(BIN)/python benchmarks/waiting.py

bench: $(VENV)/installed-dev .peers/installed  ## docs/performance.md, measured anew: two hours. DATA=texts [NANOGPT=clone JOBS=a,b REPEATS=5]
	$(PIP) gguf accelerate
	$(BIN)/python tests/starter.py .starter
	$(BIN)/python benchmarks/speed.py --peers .peers/bin/python --starter .starter --data $(DATA) \
		$(if $(NANOGPT),--nanogpt $(NANOGPT)) $(if $(JOBS),--jobs $(JOBS)) $(if $(REPEATS),--repeats $(REPEATS))

endurance: $(VENV)/installed-dev  ## the last tables of docs/performance.md: an hour's run, 2 GB of text, memory; 90 minutes. [PARTS=text]
	$(BIN)/python benchmarks/endurance.py $(if $(PARTS),--parts $(PARTS))

docs: $(VENV)/installed-dev  ## the page of all options, made from the code
	$(BIN)/python -m seedbed.cli.reference > docs/options.md

wheel: $(VENV)/installed-dev  ## a wheel in dist/
	$(BIN)/python -m build --wheel

clean:  ## everything that was made here, but not your runs
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .starter .troubles .peers

.peers/installed: benchmarks/peers/requirements.txt
	test -x .peers/bin/python || $(PYTHON) -m venv .peers
	.peers/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) -e ".[dev]"
	touch $@
