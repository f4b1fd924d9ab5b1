"""Finetuning: a training run from an export on the train rows of a task, with loss only on the answer."""

import shutil
import subprocess
import sys
from pathlib import Path

from data_prep.config import JsonSource
from data_prep.utils.console import UserError
from data_prep.utils.files import write_text
from pretrain.config import RunConfig, dump_config, finetuning_config
from pretrain.evaluation.export import export_checkpoint
from pretrain.evaluation.task_corpus import prepare_task_corpus
from pretrain.run_folder import list_steps
from pretrain.tasks.options import TaskConfig
from pretrain.training.evaluation_requests import die_with_parent, single_process_environment


def finetune(config: RunConfig, task: TaskConfig, export: Path, pairs: JsonSource, folder: Path, name: str) -> Path:
    """Finetune `export` on `pairs`; return the export of the result.

    `task` has the settings that differ from the pretraining run `config`. An interrupted finetuning starts over. If
    its export exists, it is not repeated. Raises UserError if the run fails.
    """
    data = prepare_task_corpus(config, pairs, folder)
    run = finetuning_config(config, task, data, str(export), str(folder / "finetune"), name)
    path = folder / "finetune" / f"{name}.yaml"
    checkpoints = run.run_dir / "checkpoints"
    path.parent.mkdir(exist_ok=True)
    if path.exists() and path.read_text(encoding="utf-8") != dump_config(run):
        shutil.rmtree(run.run_dir, ignore_errors=True)  # from an earlier evaluation with different settings
    write_text(path, dump_config(run))
    if not (run.run_dir / "export").exists():
        # A run that outlived this process would disturb the next evaluation, which uses the same folder.
        command = die_with_parent([sys.executable, "-m", "pretrain.training", str(path)], "KILL")
        done = subprocess.run(command, env=single_process_environment(), check=False)
        if done.returncode or not list_steps(checkpoints):
            raise UserError(f"the finetuning {path} failed with exit code {done.returncode}; see its output above")
    steps = list_steps(run.run_dir / "export") or list_steps(checkpoints)
    result = export_checkpoint(run.run_dir, steps[-1])
    shutil.rmtree(checkpoints, ignore_errors=True)  # the export has the weights
    return result
