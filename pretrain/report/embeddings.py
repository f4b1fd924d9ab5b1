"""Projection of the embeddings of unseen pairs to two dimensions."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.utils.console import UserError
from pretrain.config import load_config
from pretrain.data.loader import Rows, draw_random_bits, plan_rows
from pretrain.imports import libraries
from pretrain.report.cost import open_corpus
from pretrain.report.runs import Run
from pretrain.run_folder import list_steps, step_name

PAIRS = 150
"""Maximum number of pairs in a picture."""
ROWS = 4
"""Number of packed rows per forward pass."""


@dataclass(frozen=True)
class EmbeddingProjection:
    """Pairs of embeddings, projected to a plane."""

    names: tuple[str, str]
    """Names of the two embeddings of a pair."""
    first: np.ndarray
    """Projections of the first embeddings, (n, 2)."""
    second: np.ndarray
    """Projections of the second embeddings, (n, 2); row i is the partner of row i of `first`."""
    explained: float
    """Fraction of the variance that the plane shows."""


def picture(run: Run) -> EmbeddingProjection:
    """Return the projected pairs of the run's last export.

    The pairs are unseen records of the run's corpus. If the corpus is not available, they come from a file that
    `launcher/evaluate.py EXPORT --embed FILE` has written to the export. Raises UserError if neither is available.
    """
    try:
        return project(*_compute(run))
    except UserError:
        files = sorted((run.folder / "export").glob("step-*/embeddings/*.npz"))
        if not files:
            raise
        return project(*_read(files[-1]))


def _read(path: Path) -> tuple[tuple[str, str], np.ndarray, np.ndarray]:
    """Read two arrays of embeddings and their names; return the first rows that are finite in both, (n, D) each.

    The arrays are a prediction (`A_to_B`) and its target (`B`), or the first two views if there are no predictions.
    """
    try:
        with np.load(path) as arrays:
            predictions = [name for name in arrays.files if name.partition("_to_")[2] in arrays.files]
            names = (predictions[0], predictions[0].partition("_to_")[2]) if predictions else tuple(arrays.files[:2])
            first, second = (arrays[name] for name in names)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read two arrays of embeddings from {path}: {error}") from None
    finite = np.flatnonzero(np.isfinite(first).all(axis=1) & np.isfinite(second).all(axis=1))[:PAIRS]
    return names, first[finite], second[finite]


def _compute(run: Run) -> tuple[tuple[str, str], np.ndarray, np.ndarray]:
    """Compute the predictions and targets, (n, D) each, of records spread over the validation split."""
    config = load_config(run.folder / "config.yaml")
    steps = list_steps(run.folder / "export")
    if not steps:
        raise UserError("no checkpoint is exported; run launcher/evaluate.py RUN_DIR to export one")
    if len(config.data.views) < 2:
        raise UserError("the records have only one view")
    corpus = open_corpus(run, config, "validation")
    with libraries():  # late, because a report without exports does not need them
        import torch

        from pretrain.data.batch import micro_batches
        from pretrain.models.export import load_language_model, load_objective
        from pretrain.models.language_model import special_ids
        from pretrain.objectives.pool import select_pair_embeddings

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    export = run.folder / "export" / step_name(steps[-1])
    model, _ = load_language_model(export, config.model.attention, device)
    objective = load_objective(export, config.objective, model).to(device)
    model = model.to(device)
    specials = special_ids(corpus.tokenizer, model.vocab_size)
    layout = config.validation_layouts(specials, corpus.views)["embedding"]
    count = min(PAIRS, len(corpus))
    record_numbers = (2 * np.arange(count) + 1) * len(corpus) // (2 * count)
    rows = plan_rows(
        corpus,
        record_numbers,
        layout,
        config.data.sequence_length,
        np.ones(count, bool),
        draw_random_bits(record_numbers, 0, np.zeros_like(record_numbers)),
    )
    rows = Rows.join([rows], -(-rows.count // ROWS) * ROWS)
    predictions: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for batch in micro_batches(
        rows, corpus, layout, specials, config.data.sequence_length, micro_batch_rows=ROWS, rank=0, ranks=1
    ):
        batch = batch.to(device)
        with torch.no_grad():
            context, target = select_pair_embeddings(model(batch), batch)
            for collected, selected in zip((predictions, targets), (objective.predict(context), target), strict=True):
                collected.append(selected[batch.pair_valid].cpu().numpy())
    return ("prediction", "target"), np.concatenate(predictions), np.concatenate(targets)


def project(names: tuple[str, str], first: np.ndarray, second: np.ndarray) -> EmbeddingProjection:
    """Project two sets of embeddings, (n, D) each, to the plane of their first two principal components.

    The embeddings are normalised to length 1 because the cosine depends only on angles. The projections are not
    rescaled: embeddings that all point in the same direction form a single spot. Raises UserError for fewer than three
    pairs or embeddings that are not finite.
    """
    if len(first) < 3 or len(first) != len(second) or not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise UserError("there are fewer than three pairs of finite embeddings")
    points = np.concatenate([first, second]).astype(np.float64)
    points /= np.linalg.norm(points, axis=1, keepdims=True).clip(min=np.finfo(np.float64).tiny)
    points -= points.mean(axis=0)
    _, widths, directions = np.linalg.svd(points, full_matrices=False)
    plane = points @ directions[:2].T
    variance = (widths**2).sum()
    return EmbeddingProjection(
        names,
        plane[: len(first)],
        plane[len(first) :],
        float((widths[:2] ** 2).sum() / variance) if variance > 0 else 1.0,
    )
