"""Embeddings and predictions of the views of rows, computed from an export alone and read out as in training."""

import itertools
import logging
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data_prep.config import HubSource, JsonSource
from data_prep.task_rows import read_rows
from data_prep.utils.console import UserError
from data_prep.utils.files import atomic_path, read_json
from data_prep.utils.progress import Progress
from pretrain.models.export import EMBEDDINGS, load_language_model, load_objective
from pretrain.models.language_model import LanguageModel
from pretrain.models.view_templates import (
    ViewTemplate,
    objective_from_export,
    pairing_from_export,
    prediction_name,
    text_templates,
    view_template,
)
from pretrain.objectives.base import Objective
from pretrain.objectives.mlp import Mlp
from pretrain.tasks.options import parse_source

logger = logging.getLogger(__name__)

TOKENS = 16_384
"""Maximum number of tokens of a batch, padding included."""
IN_CONTEXT_NOTE = "note: the views are encoded separately, but the model was trained with targets in their context"
"""Note about embeddings that may be poor; see `objective.target`."""


class Embeddings(NamedTuple):
    """Embeddings of N rows. An encoding that does not fit into the model's positions is NaN."""

    views: dict[str, np.ndarray]
    """(N, D) fp32 embeddings of each view, encoded separately."""
    predictions: dict[tuple[str, str], np.ndarray]
    """(N, D) fp32 predictions by (source view, target view).

    Without predictor tokens and a predictor MLP, a prediction is the embedding of the source view.
    """
    fits: np.ndarray
    """(N,) bool: whether all encodings of a row fit into the model's positions.

    NaN in a row that fits is due to the weights.
    """


def embed_file(export: Path, file: str) -> None:
    """Write the embeddings of the rows of a file, or of a source as in `task.test`, to `embeddings/` in the export.

    The result is an .npz of fp32 arrays (N, D): one for each view, and `A_to_B` for each prediction by predictor
    tokens or a predictor MLP. Row i of each array belongs to row i of the source. The file is named after the source; a
    number is appended if a different source of the same name was embedded before. Raises UserError if the source cannot
    be read or array names collide.
    """
    views = tuple(read_json(export / "jepa.json")["views"])
    source = parse_source(file, "--embed")
    rows = read_rows(source, views, "--embed")
    embeddings = embed(export, [row.views for row in rows])
    predictions = {
        prediction_name(view, predicted_view): array
        for (view, predicted_view), array in embeddings.predictions.items()
        if array is not embeddings.views[view]
    }
    check_names(export, embeddings.views, predictions)
    arrays = embeddings.views | predictions
    output = _write(export / EMBEDDINGS, source, arrays)
    for name, array in arrays.items():
        logger.info(f"{name}: {array.shape[0]:,} rows of {array.shape[1]:,} numbers")
    too_long = int((~embeddings.fits).sum())
    not_finite = int((embeddings.fits & ~finite_rows(arrays.values())).sum())
    if too_long:
        logger.info(
            f"note: in {too_long:,} rows a text does not fit into the positions of the model; its embedding is NaN"
        )
    if not_finite:
        logger.warning(
            f"the embeddings of {not_finite:,} rows are not finite because the weights of the model have "
            "diverged; use an earlier checkpoint"
        )
    if pairing_from_export(read_json(export / "jepa.json")).in_context:
        logger.info(IN_CONTEXT_NOTE)
    logger.info(f"written to {output}")


def check_names(export: Path, views: Iterable[str], predictions: Iterable[str]) -> None:
    """Raise UserError if a prediction has the name of a view."""
    if ambiguous := {*views} & {*predictions}:
        raise UserError(
            f"{export}: the view {min(ambiguous)!r} has the same name as the array of a prediction; "
            "rename the view in data.views"
        )


def finite_rows(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """Return the mask of the rows that are finite in every array: several (N, D) -> (N,) bool."""
    return np.asarray(np.stack([np.isfinite(array).all(axis=1) for array in arrays]).all(axis=0))


def _write(folder: Path, source: JsonSource | HubSource, arrays: dict[str, np.ndarray]) -> Path:
    """Write an .npz with the source as its comment, and return its path; a file of another source is not overwritten.

    The archive is written directly because np.savez does not allow every name that a view may have.
    """
    assert source.path is not None  # read_rows has read it
    absolute = os.path.abspath(source.path) if os.path.exists(source.path) else source.path
    comment = source.model_copy(update={"path": absolute}).model_dump_json(exclude_none=True).encode()
    folder.mkdir(exist_ok=True)
    stem = Path(source.path).stem
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    paths = (folder / f"{name}.npz" for name in names)
    output = next(path for path in paths if not path.exists() or _comment(path) == comment)
    with atomic_path(output) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.comment = comment
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)
    return output


def _comment(path: Path) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment
    except zipfile.BadZipFile:
        return b""


def embed(export: Path, texts: Sequence[tuple[str, ...]], *, in_context: bool = False) -> Embeddings:
    """Return the embeddings of rows that have all views of the export.

    With `in_context`, the second of two views is encoded after the first one instead of separately.
    """
    embedder = Embedder(export)
    by_view = [list(view_texts) for view_texts in zip(*texts, strict=True)]
    views, fits = {}, np.ones(len(texts), bool)
    for number, name in enumerate(embedder.names):
        if in_context and number == 1:
            views[name], view_fits = embedder.embed_in_context(texts)
        else:
            views[name], view_fits = embedder.embed_view(number, by_view[number])
        fits &= view_fits
    predictions: dict[tuple[str, str], np.ndarray] = {}
    by_source: dict[int, np.ndarray] = {}
    for source, target in embedder.pairing.edges(len(views)):
        if source not in by_source:
            by_source[source], prediction_fits = embedder.predict_from(
                source, by_view[source], views[embedder.names[source]]
            )
            fits &= prediction_fits
        predictions[embedder.names[source], embedder.names[target]] = by_source[source]
    return Embeddings(views, predictions, fits)


class Embedder:
    """The model of an export, which embeds texts as one of its views and predicts the embedding of another view."""

    def __init__(self, export: Path):
        self._jepa = read_json(export / "jepa.json")
        # Even on CUDA, use the attention kernel for CPU, because it accepts rows that are not packed.
        self.model, self._tokenizer = load_language_model(export, "auto", torch.device("cpu"))
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer, model = self._tokenizer, self.model
        self._ids = {"bos": tokenizer.bos_id, "sep": tokenizer.sep_id, "eos": tokenizer.eos_id}
        self.names: list[str] = self._jepa["views"]
        self.pairing = pairing_from_export(self._jepa)
        self.has_pairs = objective_from_export(self._jepa).pairing is not None
        self._objective = load_objective(export, objective_from_export(self._jepa), model)
        self.predictor_mlp: Mlp | None = getattr(self._objective, "predictor", None)
        predictor_tokens = model.predictor.num_embeddings if model.predictor else 0
        self.predictor_ids = list(range(model.vocab_size, model.vocab_size + predictor_tokens))

    def ids_around(self, view: int, *, predict: bool = False) -> tuple[list[int], list[int]]:
        """Return the token ids before and after a text that is encoded as a view.

        With `predict`, they include the predictor tokens, whose ids follow the vocabulary.
        """
        template: ViewTemplate = view_template(self._jepa, view)
        before, after = ([self._ids[name] for name in part] for part in template)
        if predict and self.pairing.prepended:
            before += self.predictor_ids
        elif predict:
            after += self.predictor_ids
        return before, after

    def embed_view(self, view: int, texts: Sequence[str], *, predict: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Return the embeddings (N, D) fp32 of texts as a view, and whether each fits into the positions, (N,) bool.

        With `predict`, they are read after the predictor tokens. The embedding of a text that does not fit is NaN.
        """
        before, after = self.ids_around(view, predict=predict)
        rows = [[*before, *row, *after] for row in self._tokenizer.encode_batch(list(texts))]
        limit = self.model.max_positions
        return encode(self.model, rows), np.array([len(row) <= limit for row in rows], bool)

    def embed_in_context(self, texts: Sequence[tuple[str, ...]]) -> tuple[np.ndarray, np.ndarray]:
        """Return the embeddings at the end of the text of both views of each row; see `embed_view`.

        The model must have been trained with the joint layout.
        """
        templates = text_templates(self._jepa)
        rows: list[list[int]] = [[] for _ in texts]
        for template, view_texts in zip(templates, zip(*texts, strict=True), strict=True):
            before, after = ([self._ids[name] for name in part] for part in template)
            for row, ids in zip(rows, self._tokenizer.encode_batch(list(view_texts)), strict=True):
                row += [*before, *ids, *after]
        return encode(self.model, rows), np.array([len(row) <= self.model.max_positions for row in rows], bool)

    def predict_from(
        self, view: int, texts: Sequence[str], embeddings: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the predictions (N, D) of the other view's embeddings, and whether each text fits; see `embed_view`.

        `embeddings` are the embeddings of the texts, if they are known. Without predictor tokens and a predictor MLP,
        they are the predictions.
        """
        if self.predictor_ids or embeddings is None:
            context, fits = self.embed_view(view, texts, predict=True)
        else:
            context, fits = embeddings, np.ones(len(texts), bool)
        return _predict(self._objective, context), fits


def _predict(objective: Objective, context: np.ndarray) -> np.ndarray:
    """Return the predictions (N, D) from the embeddings of contexts (N, D); the same array if nothing changes."""
    with torch.inference_mode():
        embeddings = torch.from_numpy(context)
        predictions = objective.predict(embeddings)
    return context if predictions is embeddings else predictions.numpy()


def encode(model: LanguageModel, rows: list[list[int]]) -> np.ndarray:
    """Return the last hidden state of each row of token ids, (N, D) fp32; NaN for a row that is too long."""
    embeddings = np.full((len(rows), model.hidden_size), np.nan, np.float32)
    limit = model.max_positions
    batches = list(_batches([len(row) for row in rows], limit))
    with Progress("embedding", sum(map(len, batches)), "texts") as progress:
        for indices in batches:
            longest = max(len(rows[index]) for index in indices)
            # Attention is causal, so no token sees the padding after it.
            ids = torch.tensor([rows[index] + [0] * (longest - len(rows[index])) for index in indices])
            last = torch.tensor([len(rows[index]) - 1 for index in indices])
            with torch.inference_mode():
                hidden = model.transformer(
                    inputs_embeds=model.embed(ids.to(model.device)), use_cache=False
                ).last_hidden_state
            embeddings[indices] = hidden[torch.arange(len(indices)), last].float().cpu().numpy()
            progress.update(len(indices))
    return embeddings


def _batches(lengths: list[int], limit: float) -> Iterator[list[int]]:
    """Yield batches of the indices of rows of similar length; rows that do not fit `limit` positions are skipped."""
    batch: list[int] = []
    fitting = [index for index, length in enumerate(lengths) if length <= limit]
    for index in sorted(fitting, key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
