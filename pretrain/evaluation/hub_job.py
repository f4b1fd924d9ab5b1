"""Entry point of the process that pushes a run in the background: `python -m pretrain.evaluation.hub_job RUN_DIR KEYS`.

It exports and pushes the newest checkpoint until there is no newer one. `launcher/evaluate.py RUN_DIR --push` does the
same in the foreground. KEYS are overrides of the configuration.
"""

import sys
from pathlib import Path

from data_prep.utils.console import exit_on_user_error
from pretrain.config import load_config
from pretrain.imports import libraries


def main() -> None:
    """Push the exports of a run."""
    run_dir = Path(sys.argv[1])
    hub = load_config(run_dir / "config.yaml", sys.argv[2:]).hub
    assert hub is not None  # the overrides name the repository
    with libraries():
        from pretrain.evaluation.hub import push_in_background  # loads torch, after the libraries have been silenced

    push_in_background(run_dir, hub)


if __name__ == "__main__":
    exit_on_user_error(main)
