"""Export of a checkpoint of a run."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from data_prep.utils.console import UserError, os_error_number
from data_prep.utils.files import copy_folder, locked, read_json
from pretrain.config import load_config
from pretrain.evaluation.model_card import render_figures, render_metadata
from pretrain.models.export import EMBEDDINGS, OBJECTIVE_PREFIX, PREDICTOR_KEY, SEARCH_INDEX, write_export
from pretrain.models.export_readme import render_readme
from pretrain.models.lora import merge_adapters
from pretrain.run_folder import MODEL_DIR, PINS, step_name
from pretrain.training.checkpoint_loading import consolidate

PIN_SUFFIX = ".export"
"""Suffix of the pin of a checkpoint that is being exported."""
ADDED = (EMBEDDINGS, SEARCH_INDEX)
"""Folders that other commands add to an export. They hold texts of the user, so they are neither copied nor pushed."""


def export_checkpoint(run_dir: Path, step: int) -> Path:
    """Export the checkpoint of a step if it has not been exported yet, and return the folder of the export.

    Raises UserError for a missing or corrupt checkpoint, or a missing model folder.
    """
    folder = run_dir / "export" / step_name(step)
    if folder.exists():
        return folder
    with _exporting(run_dir, step):
        if not folder.exists():  # another process may have exported it
            folder.parent.mkdir(exist_ok=True)
            _write(run_dir, step, folder)
    return folder


def export_to(run_dir: Path, step: int, folder: Path) -> None:
    """Export the checkpoint of a step to any folder; a kill never leaves an incomplete folder.

    The result equals the run's own export of the step, which is copied if it exists. Raises UserError if the folder is
    not empty or cannot be written.
    """
    with new_folder(folder, "--export") as folder:
        existing = run_dir / "export" / step_name(step)
        if existing.exists():
            _copy(existing, folder)
        else:
            with _exporting(run_dir, step):
                _write(run_dir, step, folder)
    print(f"step {step} of {run_dir} is exported to {folder}")


@contextlib.contextmanager
def new_folder(folder: Path, option: str) -> Iterator[Path]:
    """Yield the absolute path of a folder that the caller writes, after creating its parent.

    Raises UserError, which names the option, if the folder is not empty or cannot be written.
    """
    folder = Path(os.path.abspath(folder.expanduser()))
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{option}: {folder} is not an empty folder; choose a new folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as error:
        raise UserError(f"{option}: cannot write {folder}: {error.strerror or error}; choose another folder") from None


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary path for a folder that becomes `folder` on success, also if that is an empty folder."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, folder)
    except Exception as error:
        number = os_error_number(error)
        if number is None or isinstance(error, OSError):
            raise
        raise OSError(number, os.strerror(number), str(folder)) from error  # an error of safetensors has no path
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def exported_files(export: Path) -> list[str]:
    """Return the relative paths of the files of an export, without texts and embeddings that were added to it."""
    files = [path.relative_to(export) for path in sorted(export.rglob("*")) if path.is_file()]
    return [str(file) for file in files if file.parts[0] not in ADDED]


def _copy(export: Path, folder: Path) -> None:
    with atomic_folder(folder) as temporary:
        copy_folder(export, temporary)
        for name in ADDED:
            shutil.rmtree(temporary / name, ignore_errors=True)


@contextlib.contextmanager
def _exporting(run_dir: Path, step: int) -> Iterator[None]:
    """Hold the lock of the run's exports, and keep the checkpoint of the step from being removed."""
    pins = run_dir / "checkpoints" / PINS
    with locked(run_dir / ".export.lock"):
        pins.mkdir(parents=True, exist_ok=True)
        for leftover in pins.glob(f"*{PIN_SUFFIX}"):  # its process was killed
            leftover.unlink(missing_ok=True)
        pin = pins / f"{step_name(step)}{PIN_SUFFIX}"
        pin.touch()
        try:
            yield
        finally:
            pin.unlink(missing_ok=True)


def _write(run_dir: Path, step: int, folder: Path) -> None:
    """Write the export of a checkpoint to `folder`, whose parent exists."""
    if not (run_dir / MODEL_DIR).exists():
        raise UserError(
            f"{run_dir / MODEL_DIR} is missing; an export needs the model's configuration and tokenizer from it"
        )
    config = load_config(run_dir / "config.yaml")
    state = consolidate(run_dir / "checkpoints" / step_name(step))
    if config.model.lora:
        state = merge_adapters(state, config.model.lora)
    jepa = {
        "run": config.name,
        "step": step,
        "seed": config.seed,
        "objective": config.objective.model_dump(mode="json", exclude_none=True),
        "views": list(config.data.views),
        "lm_views": config.data.lm_views,
        "train_end_token": config.data.train_end_token,
        "sequence_length": config.data.sequence_length,
    }
    family = read_json(run_dir / MODEL_DIR / "config.json")["model_type"]
    has_weights = any(key.startswith(OBJECTIVE_PREFIX) for key in state)
    figures = render_figures(run_dir, config, step)
    readme = render_readme(jepa, family, len(state.get(PREDICTOR_KEY, ())), has_weights, figures)
    write_export(folder, run_dir / MODEL_DIR, state, jepa, render_metadata(config, family) + readme)
