"""The dry run: print the plan of a run and check what would stop it, without starting it."""

import logging
import os
from pathlib import Path

from data_prep.shards import MANIFEST
from data_prep.utils.console import UserError, print_table
from pretrain.config import RunConfig
from pretrain.data.corpus import Corpus
from pretrain.planning.plan import Plan, make_plan
from pretrain.planning.settings import engine_settings
from pretrain.planning.tables import plan_tables
from pretrain.run_folder import list_steps
from pretrain.training.branch import read_branch
from pretrain.training.describe import check_same_run, previous_config
from pretrain.training.distributed import normalize_launcher_env
from pretrain.training.extension import larger_budget, step_to_extend
from pretrain.training.hub_pushes import check_hub
from pretrain.training.loggers import check_trackers
from pretrain.training.start_checks import check

logger = logging.getLogger(__name__)


def dry_run(config: RunConfig) -> None:
    """Print the plan on rank 0. Raises the UserErrors of a real run, except for a corpus that is not prepared."""
    rank, ranks = _rank_and_ranks()
    if rank:
        return
    plan = checked_plan(config, ranks)
    corpus = plan.corpus

    if config.ignored_keys:
        logger.info(f"note: ignored with objective.name=next_token: {', '.join(config.ignored_keys)}")
    if config.model.lora:
        logger.info(
            "note: FLOPs and activations are for training the whole model; adapters need up to a third fewer FLOPs"
        )
    if corpus is None:
        logger.info(
            f"note: there is no corpus in {config.data.path}. The vocabulary is taken from data.tokenizer and rows are "
            "assumed to be full.\nTo include records, pairs and the cost of the JEPA term, run: python -m data_prep "
            "CONFIG"
        )
    if plan.step.skipped_windows:
        logger.info(f"note: means of a step are over {plan.step.planned:,} steps, spread evenly over the first epoch")
    if len(plan.step.dropout_levels) > 1:
        logger.info(f"note: {_averaging(plan.step.dropout_levels)}")
    for table in plan_tables(plan):
        print_table(table)
    print(
        "\n6 FLOPs per position and layer parameter, and per target and head parameter (arXiv 2001.08361). Attention "
        "scores: 12 FLOPs per\nlayer, width of the heads and visible key. Model states: arXiv 1910.02054. Activations: "
        "arXiv 2205.05198, without stored scores.\nOffloading is not included.",
        flush=True,
    )


def checked_plan(config: RunConfig, ranks: int | None) -> Plan:
    """Return the plan of a run, with the corpus if it is prepared. Raises the UserErrors of a real run on `ranks`."""
    corpus = Corpus(config.data.path, "train") if (Path(config.data.path) / MANIFEST).exists() else None
    engine_settings(config, ranks)
    _check_start(config, corpus, ranks)
    return make_plan(config, corpus, ranks)


def _averaging(dropout_levels: dict[float, float]) -> str:
    """Return how the values of a step are averaged if the dropout of the records changes during the run."""
    dropouts = [level for level in dropout_levels if level < 1]
    changes = f", with objective.dropout from {min(dropouts):.2f} to {max(dropouts):.2f}" * (len(dropouts) > 1)
    active = 1 - dropout_levels.get(1.0, 0.0)
    return f"means of a step are over the whole run; the terms on pairs are active in {active:.0%} of it{changes}"


def _rank_and_ranks() -> tuple[int, int | None]:
    """Return this process's rank and the number of ranks; the number is None if no launcher started the process."""
    set_by_launcher = "WORLD_SIZE" in os.environ
    normalize_launcher_env()
    ranks = int(os.environ["WORLD_SIZE"])
    return int(os.environ["RANK"]), ranks if set_by_launcher or ranks > 1 else None


def _check_start(config: RunConfig, corpus: Corpus | None, ranks: int | None) -> None:
    """Raise the UserErrors of a real run about the corpus, files and the run folder."""
    check(config, corpus)
    check_hub(config.hub)
    check_trackers(config)
    if corpus and "validation" in corpus.manifest["splits"]:
        Corpus(config.data.path, "validation")
    # a run that was killed early leaves a folder without config.yaml
    if corpus and (config.run_dir / "config.yaml").exists():
        for change in check_same_run(config, corpus.manifest, ranks):
            logger.info(f"note: resuming with a changed setting: {change}")
        before = previous_config(config.run_dir)
        if before is not None and larger_budget(before, config.train):
            step = step_to_extend(config, before, corpus)
            logger.info(f"note: the run is extended from step {step or 0}")
    if corpus and config.branch_from and not list_steps(config.run_dir / "checkpoints"):
        branch = read_branch(config, corpus)
        for difference in branch.differences:
            logger.info(f"note: the branch differs from its source: {difference}")
        logger.info(f"note: {branch.used:.0%} of the budget is used before the branch; the figures include that part")
    existing = next(folder for folder in (config.run_dir, *config.run_dir.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"cannot write to {config.run_dir} (output_dir/name): {existing} is not a writable folder")
