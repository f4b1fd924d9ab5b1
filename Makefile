# make demo    the main job on the embedded corpus, on two CPU processes; ARGS="key=value ..." overrides
# make test    the tests, in two processes; ARGS is passed to pytest
# make test-all   the slow tests too, which take hours
# make check   lint and types (ruff, mypy)
# make mutants    the mutation tests, at most 30 minutes on two cores: a mistake that mutmut puts into a file of [tool.mutmut] and
#              no fast test finds is an error unless tests/mutation/accepted.toml gives a reason
# make setup   the environment alone, in .venv; the others call it
# make image   the container image; BASE=debian:bookworm-slim makes one without CUDA
# make demo-nodes   the demo on two nodes, which are containers of that image; ARGS and BASE as above
# (make hands variables of its command line on to what it runs, by their names)

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.ready
PACKAGES := $(VENV)/.packages

.PHONY: demo test test-all check mutants setup image demo-nodes clean
demo: $(STAMP)
	$(VENV)/bin/python launcher/demo.py $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 20 $(ARGS)

test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "slow or not slow" --durations 20 $(ARGS)

check: $(STAMP)
	@status=0; $(VENV)/bin/ruff check . || status=1; $(VENV)/bin/ruff format --check . || status=1; $(VENV)/bin/mypy || status=1; exit $$status

mutants: $(STAMP)
	rm -rf mutants
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(VENV)/bin/mutmut run
	$(VENV)/bin/python -m tests.mutation.check_survivors

setup: $(STAMP)

$(PACKAGES): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "error: $(PYTHON) cannot make virtual environments; install them: apt install python3-venv" >&2; exit 2; }
	@echo "[1/4] making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "[2/4] installing torch (the largest part: 200 MB for CPU alone, 3 GB where the package carries CUDA)"
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
