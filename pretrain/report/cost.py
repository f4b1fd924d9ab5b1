"""FLOPs of a run, as the dry run counts them."""

from data_prep.console import UserError
from data_prep.tokenizer import Tokenizer
from pretrain.config import RunConfig, load_config
from pretrain.data.corpus import Corpus, was_trained_on
from pretrain.report.runs import Run
from pretrain.run_folder import MODEL_DIR
from pretrain.training.dry_run import make_plan


def flops_per_token(run: Run) -> float:
    """Forward and backward, for one token of the corpus: copies and predictor tokens make it dearer, and are no tokens of their own.

    Plans the run's steps from the lengths of its corpus, as it did itself. Raises UserError where something needed is missing.
    """
    config = load_config(run.folder / "config.yaml")
    plan = make_plan(config, open_corpus(run, config, "train"))
    return plan.flops / plan.step.tokens


def open_corpus(run: Run, config: RunConfig, split: str) -> Corpus:
    """Return the corpus of a run, if it still stands where the run read it, and is the same as then. Raises UserError."""
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
        raise UserError(f"{folder} holds the corpus of another run: its tokenizer is another one")
    if not was_trained_on(run.folder, corpus.manifest):
        raise UserError(f"{folder} holds another corpus than the one that {run.folder} was trained on")
    return corpus
