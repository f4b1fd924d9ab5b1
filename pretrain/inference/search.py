"""The search command: which texts of a file have the embedding that a model predicts for a query?"""

import argparse
import json
import logging
import sys
import zipfile
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data_prep.utils.console import UserError, exit_on_user_error
from data_prep.utils.files import atomic_path, read_json
from pretrain.imports import libraries
from pretrain.inference.export_folder import JEPA, find_export
from pretrain.inference.generate import read_views
from pretrain.tasks.options import parse_source

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

QUERIES_AT_A_TIME = 1000
"""Number of queries that are compared with the index at a time."""
ALMOST_EQUAL = 0.9
"""Mean cosine of different texts above which a warning is shown."""
FEWEST_TEXTS = 10
"""Fewest texts for this warning."""


def main() -> None:
    """Parse the command line and print the texts that were found."""
    parser = argparse.ArgumentParser(
        description="Find the texts of a file whose embeddings are closest to the predictions from each query. Without "
        "queries, they are read from the standard input, one per line."
    )
    parser.add_argument("model", type=Path, metavar="RUN|EXPORT", help="run directory, or folder of an export")
    parser.add_argument("queries", nargs="*", metavar="QUERY", help="text of the view that the model predicts from")
    parser.add_argument("--index", required=True, metavar="FILE", help="rows to search: JSON lines, CSV, Parquet ...")
    parser.add_argument("--file", metavar="FILE", help="read the queries from the rows of a file")
    parser.add_argument("--query-view", metavar="VIEW", help="view of the queries; default: the first one")
    parser.add_argument("--view", metavar="VIEW", help="view to search; default: the one that is predicted")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="number of texts for each query; default: 5")
    parser.add_argument("--json", action="store_true", help="print a JSON object per query")
    arguments = parser.parse_intermixed_args()
    exit_on_user_error(lambda: _search(arguments), messages="stderr")  # the texts are the standard output


class Index(NamedTuple):
    """The texts of a view and their embeddings."""

    texts: list[str]
    embeddings: "np.ndarray"
    """Unit embeddings, (N, D) fp32."""

    @property
    def mean_cosine(self) -> float:
        """Mean cosine of two different texts; 0 for a single text."""
        count = len(self.texts)
        total = self.embeddings.sum(axis=0, dtype="float64")
        return float(total @ total - count) / max(1, count * (count - 1))

    def search(self, queries: "np.ndarray", top: int) -> tuple["np.ndarray", "np.ndarray"]:
        """Return the cosines and the numbers of the closest texts to predictions (Q, D), both (Q, top), best first.

        The search is exact.
        """
        import numpy as np
        import torch

        top = min(top, len(self.texts))
        cosines, numbers = [np.zeros((0, top), np.float32)], [np.zeros((0, top), np.int64)]
        table = torch.from_numpy(self.embeddings).T
        for first in range(0, len(queries), QUERIES_AT_A_TIME):
            block = torch.from_numpy(unit(queries[first : first + QUERIES_AT_A_TIME]))
            found = torch.topk(block @ table, top)
            cosines.append(found.values.numpy())
            numbers.append(found.indices.numpy())
        return np.concatenate(cosines), np.concatenate(numbers)


def _search(arguments: argparse.Namespace) -> None:
    if arguments.top < 1:
        raise UserError(f"--top is {arguments.top}; it must be at least 1")
    if arguments.queries and arguments.file:
        raise UserError("give queries or --file, not both")
    export = find_export(arguments.model)
    query_view, view = _views(export, arguments.query_view, arguments.view)
    queries = _queries(arguments, export, query_view)

    with libraries():
        from pretrain.evaluation.embed import Embedder

    embedder = Embedder(export)
    if not embedder.has_pairs:
        logger.info("note: the model was trained without a term on pairs, so it does not predict embeddings")
    elif embedder.pairing.in_context:
        logger.info(
            "note: the model was trained with targets in their context, so it may not find texts encoded separately"
        )
    index = open_index(arguments.model, export, embedder, arguments.index, view)
    if index.mean_cosine > ALMOST_EQUAL and len(index.texts) >= FEWEST_TEXTS:
        logger.warning(
            f"the embeddings of the texts are almost equal (mean cosine {index.mean_cosine:.3f}), so the order of the "
            "results may mean nothing; compare paired_cosine and shuffled_cosine in the validation of the run"
        )
    predictions, fits = embedder.predict_from(query_view, queries)
    cosines, numbers = index.search(predictions, arguments.top)
    for query, found, scores, fit in zip(queries, numbers, cosines, fits, strict=True):
        if not fit:
            logger.warning(f"this query does not fit into the positions of the model: {query[:80]!r}")
        results = [(float(score), index.texts[number]) for score, number in zip(scores, found, strict=True) if fit]
        if arguments.json:
            found_texts = [{"text": text, "cosine": round(score, 6)} for score, text in results]
            print(json.dumps({"query": query, "found": found_texts}, ensure_ascii=False))
        else:
            print(query, *(f"  {score:.3f}  {text}" for score, text in results), sep="\n")


def _views(export: Path, query_view: str | None, view: str | None) -> tuple[int, int]:
    """Return the numbers of the view of the queries and of the view to search. Raises UserError for unknown names."""
    from pretrain.models.view_templates import pairing_from_export

    jepa = read_json(export / JEPA)
    names: list[str] = jepa["views"]
    for option, name in (("--query-view", query_view), ("--view", view)):
        if name is not None and name not in names:
            raise UserError(f"{option} is {name}, but the views of the model are {', '.join(names)}; name one of them")
    edges = list(pairing_from_export(jepa).edges(len(names)))
    source = names.index(query_view) if query_view is not None else (edges[0][0] if edges else 0)
    predicted = [target for edge_source, target in edges if edge_source == source]
    if view is None:
        return source, predicted[0] if predicted else len(names) - 1
    if names.index(view) not in predicted and names.index(view) != source:
        logger.info(f"note: the model was not trained to predict {view} from {names[source]}")
    return source, names.index(view)


def _queries(arguments: argparse.Namespace, export: Path, view: int) -> list[str]:
    if arguments.file:
        return read_views(arguments.file, arguments.model, export, "--file", view)
    queries = list(arguments.queries) or [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not queries:
        raise UserError("there is no query: name one, or give a file with --file")
    return queries


def open_index(model: Path, export: Path, embedder: Any, file: str, view: int) -> Index:
    """Return the index of a view of the rows of a file; it is saved in the folder `index` of the export.

    A saved index is used if the texts are the same. Texts that do not fit into the positions of the
    model are skipped with a note.
    """
    import numpy as np

    from pretrain.models.export import SEARCH_INDEX  # imported late because it loads torch

    texts = list(dict.fromkeys(read_views(file, model, export, "--index", view)))
    name = embedder.names[view]
    path = export / SEARCH_INDEX / f"{Path(parse_source(file, '--index').path or '').stem}-{name}.npz"
    origin = {"view": name, "sha256 of texts": sha256(json.dumps(texts).encode()).hexdigest()}
    saved = _read_index(path, origin)
    if saved is None:
        embeddings, fits = embedder.embed_view(view, texts)
        if not fits.all():
            logger.info(f"note: {int((~fits).sum()):,} texts do not fit into the positions of the model; skipped")
        saved = Index([text for text, fit in zip(texts, fits, strict=True) if fit], unit(embeddings[fits]))
        if not saved.texts:
            raise UserError(f"{file}: no text fits into the positions of the model; use shorter texts")
        path.parent.mkdir(exist_ok=True)
        with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            archive.comment = json.dumps(origin).encode()
            archive.writestr("texts.json", json.dumps(saved.texts, ensure_ascii=False))
            with archive.open("embeddings.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, saved.embeddings, allow_pickle=False)
        logger.info(f"{len(saved.texts):,} texts indexed in {path}")
    return saved


def _read_index(path: Path, origin: dict[str, Any]) -> Index | None:
    """Return a saved index; None if there is none, it is corrupt, or it has a different origin."""
    import numpy as np

    try:
        with zipfile.ZipFile(path) as archive:
            if json.loads(archive.comment) != origin:
                return None
            with archive.open("embeddings.npy") as entry:
                return Index(json.loads(archive.read("texts.json")), np.lib.format.read_array(entry))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def unit(embeddings: "np.ndarray") -> "np.ndarray":
    """Return embeddings (N, D) divided by their norms; a vector of zeros stays as it is."""
    import numpy as np

    norms: np.ndarray = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit: np.ndarray = embeddings / np.maximum(norms, np.finfo(np.float32).tiny)
    return unit
