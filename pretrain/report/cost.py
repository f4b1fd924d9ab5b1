"""FLOPs of a run, counted as in a dry run."""

from data_prep.tokenizer import Tokenizer
from data_prep.utils.console import UserError
from pretrain.config import RunConfig, load_config
from pretrain.data.corpus import Corpus, was_trained_on
from pretrain.imports import libraries
from pretrain.report.runs import Run
from pretrain.run_folder import MODEL_DIR


def flops_per_token(run: Run) -> float:
    """Return the forward and backward FLOPs of a run per corpus token.

    Copies and predictor tokens add FLOPs but do not count as tokens. The FLOPs are means over steps that are planned
    from the lengths of the records in the run's corpus. Raises UserError if the corpus is missing or has changed.
    """
    config = load_config(run.folder / "config.yaml")
    corpus = open_corpus(run, config, "train")
    with libraries():
        from pretrain.planning.plan import make_plan

    plan = make_plan(config, corpus)
    return plan.flops / plan.step.tokens


def open_corpus(run: Run, config: RunConfig, split: str) -> Corpus:
    """Open the corpus of a run. Raises UserError if it is missing or is not the corpus that the run read."""
    candidates = (run.root / config.data.path, run.folder.parent / config.data.path)
    folder = next((path for path in candidates if path.is_dir()), None)
    if folder is None:
        raise UserError(f"the corpus {config.data.path} does not exist; prepare it again, or copy it to that path")
    corpus = Corpus(folder, split)
    model_dir = run.folder / MODEL_DIR
    if model_dir.is_dir() and Tokenizer.load(model_dir).fingerprint != corpus.tokenizer.fingerprint:
        raise UserError(f"{folder} holds the corpus of a different run: it has a different tokenizer")
    if not was_trained_on(run.folder, corpus.manifest):
        raise UserError(f"{folder} does not hold the corpus that {run.folder} was trained on")
    return corpus
