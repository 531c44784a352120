PYTHON ?= python3
VENV := .venv
# Files of tests at a time, of one thread each: PyTorch's threads of several processes wait for each other.
JOBS ?= 2

.PHONY: quickstart test lint docs bench gpu-check evidence release-check diffusers-tests

quickstart: $(VENV)/quickstart
	$(VENV)/bin/python examples/quickstart.py --output_dir outputs/quickstart

test: $(VENV)/installed lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The documentation as a site, in outputs/site; a broken link or reference fails.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

# Takes some minutes on an idle machine.
bench: $(VENV)/installed
	$(VENV)/bin/python benchmarks/bench.py

# On a machine with a GPU: its tests and figures, eight minutes at a time; the same command resumes.
gpu-check: $(VENV)/installed
	$(VENV)/bin/python benchmarks/gpu_check.py

# The study on digits with seed 0, and its distances beside the committed ones; about 25 minutes on two cores.
evidence: $(VENV)/installed
	$(VENV)/bin/python study/run_study.py digits --seeds 0 --output_dir outputs/study
	$(VENV)/bin/python study/report.py digits --output_dir outputs/study --compare

# Wheel and sdist, and the commands from the wheel in an empty environment.
release-check: $(VENV)/installed
	bash tests/release_check.sh $(VENV)/bin/python

# diffusers' own model and pipeline tests on this package; DIFFUSERS_CHECKOUT names a checkout of diffusers.
diffusers-tests: $(VENV)/installed
	DIFFUSERS_CHECKOUT=$(DIFFUSERS_CHECKOUT) $(VENV)/bin/python -m pytest tests/diffusers_common

# Byte-compiling every installed file would take a fifth of the whole set-up; Python compiles what it imports, once, unless
# it is told to keep nothing.
unexport PYTHONDONTWRITEBYTECODE
INSTALL = $(VENV)/bin/python -m pip install --quiet --no-compile --constraint constraints.txt --editable

# What the quickstart needs, a small part of the rest.
$(VENV)/quickstart: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) ".[quickstart]"
	touch $@

$(VENV)/installed: $(VENV)/quickstart
	$(INSTALL) ".[examples,demo,docs,test]"
	touch $@
