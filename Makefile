# make demo    the main job on the embedded corpus, on two CPU processes; ARGS="key=value ..." overrides
# make test    the tests; ARGS is passed to pytest
# make setup   the environment alone, in .venv; the other two call it

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.ready

.PHONY: demo test setup clean
demo: $(STAMP)
	$(VENV)/bin/python launcher/demo.py $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(ARGS)

setup: $(STAMP)

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "error: $(PYTHON) cannot make virtual environments; install them: apt install python3-venv" >&2; exit 2; }
	@echo "[1/4] making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "[2/4] installing torch (the largest part: 200 MB for CPU alone, 3 GB where the package carries CUDA)"
	@$(VENV)/bin/pip install --disable-pip-version-check -c requirements.lock torch
	@echo "[3/4] installing the other packages, pinned in requirements.lock"
	@$(VENV)/bin/pip install --disable-pip-version-check -r requirements.lock
	@echo "[4/4] installing this project into $(VENV)"
	@$(VENV)/bin/pip install --disable-pip-version-check --quiet --no-deps --editable .
	@touch $@

clean:
	rm -rf $(VENV) runs
