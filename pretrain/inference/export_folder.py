"""The export that a command uses: the given folder, or the newest one of a run."""

import logging
import os
from pathlib import Path

from data_prep.utils.console import UserError
from pretrain.imports import libraries
from pretrain.run_folder import list_steps, step_name

logger = logging.getLogger(__name__)

JEPA = "jepa.json"
"""File that makes a folder an export."""


def find_export(path: Path) -> Path:
    """Return an export: `path` itself, or the export of the newest checkpoint if `path` is a run directory.

    A checkpoint that has not been exported yet is exported into the run directory. Raises UserError if `path` is
    neither, or if the run has no checkpoint.
    """
    # DeepSpeed would write a warning into the standard output, which contains the results. Its accelerator is not used.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if (path / JEPA).is_file():
        return path
    if not (path / "config.yaml").is_file():
        raise UserError(
            f"{path} is neither a run directory (it has no config.yaml) nor an export (it has no {JEPA}); correct the "
            "path"
        )
    checkpoints, exports = list_steps(path / "checkpoints"), list_steps(path / "export")
    if not checkpoints and not exports:
        raise UserError(f"{path} has no checkpoint yet; wait for the first one, or use another run")
    step = max(checkpoints + exports)
    folder = path / "export" / step_name(step)
    if not folder.exists():
        logger.info(f"exporting step {step:,} to {folder}")
        with libraries():
            from pretrain.evaluation.export import export_checkpoint  # imported late because it loads torch

        return export_checkpoint(path, step)
    return folder
