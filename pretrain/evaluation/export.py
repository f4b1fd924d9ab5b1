"""Export of a checkpoint of a run."""

from pathlib import Path

from data_prep.utils.console import UserError
from data_prep.utils.files import read_json
from pretrain.config import load_config
from pretrain.models.export import OBJECTIVE_PREFIX, PREDICTOR_KEY, write_export
from pretrain.models.export_readme import render_readme
from pretrain.models.lora import merge_adapters
from pretrain.run_folder import MODEL_DIR, step_name
from pretrain.training.checkpoint_loading import consolidate


def export_checkpoint(run_dir: Path, step: int) -> Path:
    """Export the checkpoint of a step if it has not been exported yet, and return the folder of the export.

    Raises UserError for a corrupt checkpoint or a missing model folder.
    """
    folder = run_dir / "export" / step_name(step)
    if folder.exists():
        return folder
    if not (run_dir / MODEL_DIR).exists():
        raise UserError(
            f"{run_dir / MODEL_DIR} is missing; an export needs the model's configuration and tokenizer from it"
        )
    config = load_config(run_dir / "config.yaml")
    state = consolidate(run_dir / "checkpoints" / step_name(step))
    if config.model.lora:
        state = merge_adapters(state, config.model.lora)
    folder.parent.mkdir(exist_ok=True)
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
    readme = render_readme(jepa, family, len(state.get(PREDICTOR_KEY, ())), has_weights)
    write_export(folder, run_dir / MODEL_DIR, state, jepa, readme)
    return folder
