"""FLOPs of a run, counted as in a dry run."""

from data_prep.console import UserError
from data_prep.tokenizer import Tokenizer
from pretrain.config import RunConfig, load_config
from pretrain.data.corpus import Corpus, was_trained_on
from pretrain.report.runs import Run
from pretrain.run_folder import MODEL_DIR
from pretrain.training.dry_run import make_plan


def flops_per_token(run: Run) -> float:
    """Return the forward and backward FLOPs of a run per corpus token.

    Copies and predictor tokens add FLOPs but do not count as tokens. The FLOPs follow from the run's planned steps, and
    these from the lengths of the records in its corpus. Raises UserError if the corpus is missing or has changed.
    """
    config = load_config(run.folder / "config.yaml")
    plan = make_plan(config, open_corpus(run, config, "train"))
    return plan.flops / plan.step.tokens


def open_corpus(run: Run, config: RunConfig, split: str) -> Corpus:
    """Open the corpus of a run. Raises UserError if it is missing or is not the corpus that the run read."""
    folder = next(
        (folder for folder in (run.root / config.data.path, run.folder.parent / config.data.path) if folder.is_dir()),
        None,
    )
    if folder is None:
        raise UserError(f"the corpus {config.data.path} is not here")
    corpus = Corpus(folder, split)
    if (run.folder / MODEL_DIR).is_dir() and Tokenizer.load(
        run.folder / MODEL_DIR
    ).fingerprint != corpus.tokenizer.fingerprint:
        raise UserError(f"{folder} holds the corpus of another run: its tokenizer is different")
    if not was_trained_on(run.folder, corpus.manifest):
        raise UserError(f"{folder} holds another corpus than the one that {run.folder} was trained on")
    return corpus
