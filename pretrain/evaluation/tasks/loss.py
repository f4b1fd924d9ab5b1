"""loss: both losses of the objective, and the embedding monitors, on a file of pairs."""

import json

import torch

from pretrain.data.corpus import Corpus
from pretrain.evaluation.pairs import prepare_pairs
from pretrain.evaluation.tasks.task_run import TaskResult, TaskRun
from pretrain.models.export import load_language_model
from pretrain.models.language_model import special_ids
from pretrain.objectives.base import build_objective
from pretrain.objectives.pool import Gather
from pretrain.training.distributed import World
from pretrain.training.engine import TrainingModule
from pretrain.training.validation import Validation


def evaluate(run: TaskRun) -> TaskResult:
    """Compute the losses from the export alone, as validation does from the training state."""
    config = run.config
    corpus = Corpus(prepare_pairs(config, run.test, run.folder).path, "train")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_language_model(run.export, config.model.attention, device)
    specials = special_ids(tokenizer, model.vocabulary)
    layout = config.make_layout(specials, corpus.views, validating=True)
    world = World(0, 1, device)
    records = min(len(corpus), run.task.rows or len(corpus))
    ranks = json.loads((run.folder.parent / "environment.json").read_text())["ranks"]
    rows = config.train.micro_batch_rows * ranks  # a contrastive term's pools are those of the training
    validation = Validation(corpus, layout, specials, config.data.sequence_length, records, rows, world)
    objective = build_objective(config.objective)
    module = TrainingModule(model, objective, Gather(world.all_gather, 0)).to(device)
    return TaskResult(records, {tag.rsplit("/", 1)[1]: value for tag, value in validation.run(module, objective.units).items()})
