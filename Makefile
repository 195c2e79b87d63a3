PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEV    := $(VENV)/installed-dev
DEMO   := $(VENV)/installed-demo

.PHONY: demo test check lint bench docs clean

demo: $(DEMO)        ## fine-tune a small CLIP on real digits, twice, and compare
	$(BIN)/python examples/finetune_digits.py

test: $(DEV)         ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: lint test     ## what a change must pass

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(DEV)        ## accuracy, speed and memory of the kernels, into docs/performance.md
	$(BIN)/python benchmarks/run.py

docs: $(DEV)         ## the API reference, into build/docs
	$(BIN)/pdoc --docformat google --math --output-directory build/docs calibclip

# A stamp per set of extras; a changed pyproject.toml installs again.
$(DEV): pyproject.toml | $(BIN)/python
	@echo "Installing calibclip and its development tools into $(VENV); PyTorch may take minutes."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $(DEV) $(DEMO)

$(DEMO): pyproject.toml | $(BIN)/python
	@echo "Installing calibclip and what its examples need into $(VENV); PyTorch may take minutes."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[examples]"
	@touch $(DEMO)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
