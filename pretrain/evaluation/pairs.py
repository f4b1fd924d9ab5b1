"""The rows of a task: pairs of texts from a JSON lines file, or from the embedded grammar."""

import hashlib
import json
from pathlib import Path

from data_prep.config import DataConfig, JsonSource
from data_prep.console import UserError
from data_prep.files import sha256_file, write_text
from data_prep.nlrx_grammar import generate
from data_prep.pipeline import prepare
from data_prep.sources.json_lines import JsonLines
from pretrain.config import RunConfig
from pretrain.run_folder import MODEL

GRAMMAR_ROWS = 1000
GRAMMAR_SEED = 0


def read_pairs(source: JsonSource, views: tuple[str, str], key: str, rows: int | None = None) -> list[tuple[str, str]]:
    """The (context, target) texts of a file, the first `rows`. Raises UserError for a row that is no pair."""
    reader = JsonLines(source, views, key)
    pairs, before = [], {}
    for piece in reader.pieces():
        for record in reader.read(piece):
            if len(pairs) == rows:
                return pairs
            if record.views is None or not all(record.views):
                problem = record.problem or f"{' or '.join(reader.mapping.columns)} is missing or empty"
                raise UserError(f"{reader.place(piece, record.position, before.get(piece.path, 0))}: {problem}")
            pairs.append(record.views)
        before[piece.path] = before.get(piece.path, 0) + reader.count(piece)
    if not pairs:
        raise UserError(f"{source.path} ({key}) holds no rows")
    return pairs


def prepare_pairs(config: RunConfig, source: JsonSource, folder: Path) -> DataConfig:
    """Shards of all pairs of a file below the evaluation `folder`, with the tokenizer of the run. Raises UserError."""
    try:
        name = hashlib.sha256(f"{source}\0{sha256_file(Path(source.path))}".encode()).hexdigest()[:16]
    except OSError as error:
        raise UserError(f"cannot read {source.path}: {error.strerror}") from None
    data = DataConfig(path=str(folder / "data" / name), views=config.data.views, missing_views=config.data.missing_views, sources=[source],
                      tokenizer={"path": str(folder.parent / MODEL)}, sequence_length=config.data.sequence_length, deduplicate="none")
    prepare(data)
    return data


def grammar_source(folder: Path, split: str, views: tuple[str, str], rows: int = GRAMMAR_ROWS) -> JsonSource:
    """Rows of the embedded NL-RX grammar as a file. Splits share no target with each other or with pretraining."""
    path = folder / f"{split}-{rows}.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pairs = (generate(GRAMMAR_SEED, split, index) for index in range(rows))
        write_text(path, "".join(json.dumps(dict(zip(views, pair, strict=True))) + "\n" for pair in pairs))
    return JsonSource(type="json", path=str(path))
