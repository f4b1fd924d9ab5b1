# make demo    the main job on the embedded corpus, on two CPU processes; ARGS="key=value ..." overrides settings
# make test    the tests, in two processes; ARGS is passed to pytest
# make test-all   all tests, including the slow ones, which take hours
# make check   lint, format and types (ruff, mypy), and the documentation site
# make docs    the documentation site, in build/site; a warning or a broken link is an error
# make mutants    the mutation tests, at most 30 minutes on two cores: a mutant of a file of [tool.mutmut] that no fast
#              test detects is an error, unless tests/mutation/accepted.toml lists it with a reason
# make setup   only the environment, in .venv; all targets above call it
# make image   the container image; BASE=debian:bookworm-slim builds one without CUDA
# make demo-nodes   the demo on two nodes (containers of that image); ARGS and BASE as above
# (make exports the variables of its command line to the commands it runs)

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.ready
PACKAGES := $(VENV)/.packages
SITE := rm -rf build/site docs/api && $(VENV)/bin/sphinx-build -q -E -W --keep-going -c docs -d build/doctrees . build/site

.PHONY: demo test test-all check docs mutants setup image demo-nodes clean
demo: $(STAMP)
	$(VENV)/bin/python launcher/demo.py $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 20 $(ARGS)

test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "slow or not slow" --durations 20 $(ARGS)

check: $(STAMP)
	@status=0; $(VENV)/bin/ruff check . || status=1; $(VENV)/bin/ruff format --check . || status=1; $(VENV)/bin/mypy || status=1; $(SITE) || status=1; exit $$status

docs: $(STAMP)
	$(SITE)

mutants: $(STAMP)
	rm -rf mutants
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(VENV)/bin/mutmut run
	$(VENV)/bin/python -m tests.mutation.check_survivors

setup: $(STAMP)

$(PACKAGES): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11: use a newer one, e.g. make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "error: $(PYTHON) cannot create virtual environments: install the package with apt install python3-venv" >&2; exit 2; }
	@echo "[1/4] making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "[2/4] installing torch (the largest part: 200 MB for the CPU package, 3 GB with CUDA)"
	@$(VENV)/bin/pip install --disable-pip-version-check -c requirements.lock torch
	@echo "[3/4] installing the other packages, pinned in requirements.lock"
	@$(VENV)/bin/pip install --disable-pip-version-check -r requirements.lock
	@touch $@

$(STAMP): $(PACKAGES) pyproject.toml
	@echo "[4/4] installing this project into $(VENV)"
	@$(VENV)/bin/pip install --disable-pip-version-check --quiet --no-deps --editable .
	@touch $@

image:
	docker/build.sh

demo-nodes: image
	JEPA_IMAGE=$$(docker image inspect --format '{{.Id}}' jepa-pretrain) docker compose -f docker/compose.yaml up --exit-code-from node1

clean:
	rm -rf $(VENV) runs
