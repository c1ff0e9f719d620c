# `make` is what CI runs, in the same order. `make demo` is the first thing to try.
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
DEMO_PROMPT := class Stack:\n    def push(self, item):

.DEFAULT_GOAL := test
.PHONY: demo test test-all fix size clean

# The marker is newer than what it was made from, so a second run installs nothing.
$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(if $(TORCH_INDEX),$(BIN)/pip install --quiet --no-deps --constraint constraints.txt --index-url $(TORCH_INDEX) torch)
	$(BIN)/pip install --quiet --quiet --constraint constraints.txt --editable '.[cpu,optimize,serve,dev]'
	touch $@

demo: $(BIN)/.installed
	$(BIN)/optimize recipes/quickstart.yaml
	@printf '\n$(DEMO_PROMPT)'
	@printf '$(DEMO_PROMPT)' | $(BIN)/optimize generate artifacts/stdlib-llama-int4 --prompt - --max-tokens 60 \
		--temperature 0.7 --top-p 0.9 --repetition-penalty 1.1 --seed 2

test: $(BIN)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'not slow and not gpu' -n auto --dist loadfile

test-all: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'not gpu' -n auto --dist loadfile

fix: $(BIN)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m optimizer.generated

size: $(BIN)/.installed
	@wc -l optimizer/*.py optimizer/*/*.py | tail -1 | sed 's/total/lines in optimizer/'
	@wc -l passes/*.py | tail -1 | sed 's/total/lines in passes/'
	@wc -l runtime/*.py | tail -1 | sed 's/total/lines in runtime/'
	@find tests -name '*.py' | xargs cat | wc -l | sed 's/$$/ lines in tests/'

clean:
	rm -rf $(VENV) build dist *.egg-info artifacts/*/
