"""The task `loss`: all loss terms of the objective, and the embedding monitors, on a file of pairs."""

import json

import torch

from data_prep.task_rows import read_rows, write_views
from pretrain.data.corpus import Corpus
from pretrain.evaluation.task_corpus import prepare_task_corpus
from pretrain.evaluation.task_run import CheckpointTask
from pretrain.models.export import load_language_model, load_objective
from pretrain.models.language_model import special_ids
from pretrain.objectives.pool import Gather
from pretrain.tasks.scoring import TaskResult
from pretrain.training.distributed import World
from pretrain.training.engine import TrainingModule
from pretrain.training.validation import Validation


def evaluate(run: CheckpointTask) -> TaskResult:
    """Compute the losses of the exported model in the same way as validation during training."""
    config, source = run.config, run.source("test")
    assert source is not None  # the configuration requires it
    views = config.data.views
    rows = read_rows(source, views, "task.test", run.task.rows, allow_missing_views=config.data.missing_views == "keep")
    pairs = write_views(run.folder / "data" / f"{run.task.title}-test.jsonl", views, (row.views for row in rows))
    corpus = Corpus(prepare_task_corpus(config, pairs, run.folder).path, "train")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_language_model(run.export, config.model.attention, device)
    specials = special_ids(tokenizer, model.vocab_size)
    layouts = config.validation_layouts(specials, corpus.views)
    world = World(0, 1, device)
    ranks = json.loads((run.folder.parent / "environment.json").read_text())["ranks"]
    micro_step_rows = config.train.micro_batch_rows * ranks  # a contrastive term needs pools as large as in training
    validation = Validation(corpus, layouts, specials, config.data.sequence_length, len(corpus), micro_step_rows, world)
    objective = load_objective(run.export, config.objective, model)
    module = TrainingModule(model, objective, Gather(world.all_gather, 0)).to(device)
    values = validation.run(module, objective.units)
    assert values is not None  # nothing stops the validation
    in_context = "validation/embedding_in_context/"
    separate = {tag.rsplit("/", 1)[1]: value for tag, value in values.items() if not tag.startswith(in_context)}
    return TaskResult(
        len(rows),
        separate
        | {
            f"in_context_{tag.removeprefix(in_context)}": value
            for tag, value in values.items()
            if tag.startswith(in_context)
        },
    )
