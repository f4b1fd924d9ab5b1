"""Preparations from the hub of tests/data_prep/sources/hub_server.py, in a process that knows its address before it imports `datasets`."""

import json
import os
import sys
from pathlib import Path

from data_prep.console import UserError
from data_prep.pipeline import prepare
from data_prep.tokenizer import Tokenizer
from tests.data_prep.sources.hub_server import serve
from tests.small_corpora import data_config, split_rows

OLD, NEW, OTHER = "a" * 40, "b" * 40, "c" * 40


class Interrupted(Exception):
    pass


def files(word: str) -> dict[str, bytes]:
    """Two files of rows that name the commit which they are of."""
    rows = [
        [
            {"text": f"{word} {part} {row}", "code": f"SELECT name FROM dogs WHERE id = {row * 7919 + part}"}
            for row in range(100)
        ]
        for part in range(2)
    ]
    return {
        f"train-0000{part}-of-00002.jsonl": "".join(json.dumps(row) + "\n" for row in of_part).encode()
        for part, of_part in enumerate(rows)
    }


def found(folder: Path, revision: str | None, stop_at: str = "nothing") -> dict:
    """Prepare a corpus; return its commits, the words that name them in its rows, and what was said."""
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if line.startswith(stop_at):
            raise Interrupted

    try:
        manifest = prepare(
            data_config(
                folder, {"type": "hub", "path": "owner/name", "revision": revision}, tokenizer={"vocab_size": 320}
            ),
            say=say,
        )
    except (UserError, Interrupted) as error:
        return {"error": str(error), "said": said}
    decode = Tokenizer.load(folder / "tokenizer").decode
    words = sorted({decode(text).split()[0] for text, _ in split_rows(folder)})
    return {
        "commits": manifest["settings"]["commits"],
        "records": manifest["sources"][0]["records"],
        "words": words,
        "said": said,
    }


def main(folder: Path) -> dict[str, dict]:
    with serve({OLD: files("old"), NEW: files("new"), OTHER: files("other")}, {"main": OLD, "dev": OTHER}) as hub:
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "cache")}
        results = {
            "main": found(folder / "main", None),
            "dev": found(folder / "dev", "dev"),
            "commit": found(folder / "commit", NEW),
            "nowhere": found(folder / "nowhere", "nowhere"),
            "interrupted": found(folder / "again", None, stop_at="training"),
        }
        hub.branches |= {"main": NEW, "dev": NEW}
        return results | {
            "main again": found(folder / "main", None),
            "resumed": found(folder / "again", None),
            "moved": found(folder / "moved", None),
        }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
