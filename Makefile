# Two commands do everything on a machine with Python 3.10+ and a package index:
#   make demo   find emotion directions in a real model, steer it, score it; open runs/demo/report.html
#   make test   run the tests
# Beside them: make docs builds the documentation into site/ (open site/index.html).
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
INSTALL = $(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint docs bench llama-check

demo: $(VENV)/demo.done
	$(RUN)/emocircuits demo --out runs/demo

# Notebooks, the explorer and the tests that wait for UMAP to compile (once for all of them) take about as long as all
# others, so they run beside them, each on half of the cores.
SLOW := tests/test_notebooks.py tests/test_projection.py tests/test_saes_command.py $(wildcard tests/test_explorer*.py)
test: $(VENV)/dev.done
	export OMP_NUM_THREADS=$$($(RUN)/python -c "import os; print(max(1, (os.cpu_count() or 2) // 2))"); \
	$(RUN)/python -m pytest $(SLOW) & slow=$$!; \
	$(RUN)/python -m pytest $(addprefix --ignore=,$(SLOW)); others=$$?; \
	wait $$slow && exit $$others

lint: $(VENV)/dev.done
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/pyright --pythonpath $(RUN)/python

docs: $(VENV)/docs.done
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict

bench: $(VENV)/dev.done
	$(RUN)/python experiments/benchmarks/run.py

llama-check: $(VENV)/dev.done
	$(RUN)/python experiments/benchmarks/llama_cpp_check.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.done: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e ".[demo]"
	touch $@

$(VENV)/docs.done: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e ".[docs]"
	touch $@

$(VENV)/dev.done: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e ".[demo,dashboard,lens,multimodal,sae,serve,dev]"
	touch $@
