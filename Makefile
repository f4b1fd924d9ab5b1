# make demo    the main job on the embedded corpus, on two CPU processes; ARGS="key=value ..." overrides settings
# make test    the tests, in two processes; ARGS is passed to pytest
# make test-all   all tests, including the slow ones, which take hours
# make check   lint, format and types (ruff, mypy), and the documentation site
# make docs    the documentation site, in build/site; a warning or a broken link is an error
# make mutants    the mutation tests, at most 30 minutes on two cores: a mutant of a file of [tool.mutmut] that no fast
#              test detects is an error, unless tests/mutation/accepted.toml lists it with a reason
# make setup   only the environment, in .venv, with the packages for development; make demo installs fewer
# make image   the container image; BASE=debian:bookworm-slim builds one without CUDA
# make demo-nodes   the demo on two nodes (containers of that image); ARGS and BASE as above
# (make exports the variables of its command line to the commands it runs)

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip install --disable-pip-version-check
# Python compiles the modules that are imported. Here, pip would compile all, which takes longer than their installation.
demo test test-all check: export PIP_COMPILE := 0
unexport PYTHONDONTWRITEBYTECODE
TORCH := $(VENV)/.torch
PROJECT := $(VENV)/.project
PACKAGES := $(VENV)/.packages
SITE := rm -rf build/site docs/api && $(VENV)/bin/sphinx-build -q -E -W --keep-going -c docs -d build/doctrees . build/site

.PHONY: demo test test-all check docs mutants setup image demo-nodes clean
demo: $(PROJECT)
	$(VENV)/bin/python launcher/demo.py $(ARGS)

test: $(PACKAGES) $(PROJECT)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 20 $(ARGS)

test-all: $(PACKAGES) $(PROJECT)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "slow or not slow" --durations 20 $(ARGS)

check: $(PACKAGES) $(PROJECT)
	@status=0; $(VENV)/bin/ruff check . || status=1; $(VENV)/bin/ruff format --check . || status=1; $(VENV)/bin/mypy || status=1; $(SITE) || status=1; exit $$status

docs: $(PACKAGES) $(PROJECT)
	$(SITE)

mutants: $(PACKAGES) $(PROJECT)
	rm -rf mutants
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(VENV)/bin/mutmut run
	$(VENV)/bin/python -m tests.mutation.check_survivors

setup: $(PACKAGES) $(PROJECT)

$(TORCH): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11: use a newer one, e.g. make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "error: $(PYTHON) cannot create virtual environments: install the package with apt install python3-venv" >&2; exit 2; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "installing torch (the largest part: 200 MB for the CPU package, 3 GB with CUDA)"
	@$(PIP) -c requirements.lock torch
	@touch $@

$(PROJECT): $(TORCH) pyproject.toml
	@echo "installing this project and the packages that it needs, pinned in requirements.lock"
	@$(PIP) -c requirements.lock --editable .
	@touch $@

$(PACKAGES): $(TORCH)
	@echo "installing all packages of requirements.lock, including the ones for development"
	@$(PIP) -r requirements.lock
	@touch $@

image:
	docker/build.sh

demo-nodes: image
	JEPA_IMAGE=$$(docker image inspect --format '{{.Id}}' jepa-pretrain) docker compose -f docker/compose.yaml up --exit-code-from node1

clean:
	rm -rf $(VENV) runs
