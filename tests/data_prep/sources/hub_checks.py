"""Prepare corpora from the server of tests/data_prep/sources/hub_server.py.

This runs in a separate process that sets the address of the server before it imports `datasets`.
"""

import json
import os
import sys
from pathlib import Path

from data_prep.pipeline import prepare
from data_prep.tokenizer import Tokenizer
from data_prep.utils.console import UserError
from tests.data_prep.sources.hub_server import serve
from tests.messages import receive_messages
from tests.small_corpora import data_config, split_rows

OLD, NEW, OTHER = "a" * 40, "b" * 40, "c" * 40


class Interrupted(Exception):
    pass


def make_files(word: str) -> dict[str, bytes]:
    """Return two files whose rows start with a word that identifies the commit."""
    rows = [
        [
            {"text": f"{word} {part} {row}", "code": f"SELECT name FROM dogs WHERE id = {row * 7919 + part}"}
            for row in range(100)
        ]
        for part in range(2)
    ]
    return {
        f"train-0000{part}-of-00002.jsonl": "".join(json.dumps(row) + "\n" for row in part_rows).encode()
        for part, part_rows in enumerate(rows)
    }


def prepare_and_summarize(folder: Path, revision: str | None, stop_at: str = "nothing") -> dict:
    """Prepare a corpus, and return its commits, the words of those commits in its rows, and the log lines."""
    log: list[str] = []

    def receive(line: str) -> None:
        log.append(line)
        if line.startswith(stop_at):
            raise Interrupted

    source = {"type": "hub", "path": "owner/name", "revision": revision}
    try:
        with receive_messages(receive):
            manifest = prepare(data_config(folder, source, tokenizer={"vocab_size": 320}))
    except (UserError, Interrupted) as error:
        return {"error": str(error), "log": log}
    decode = Tokenizer.load(folder / "tokenizer").decode
    words = sorted({decode(text).split()[0] for text, _ in split_rows(folder)})
    return {
        "commits": manifest["settings"]["commits"],
        "records": manifest["sources"][0]["records"],
        "words": words,
        "log": log,
    }


def main(folder: Path) -> dict[str, dict]:
    with serve(
        {OLD: make_files("old"), NEW: make_files("new"), OTHER: make_files("other")}, {"main": OLD, "dev": OTHER}
    ) as hub:
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "cache")}
        results = {
            "main": prepare_and_summarize(folder / "main", None),
            "dev": prepare_and_summarize(folder / "dev", "dev"),
            "commit": prepare_and_summarize(folder / "commit", NEW),
            "nowhere": prepare_and_summarize(folder / "nowhere", "nowhere"),
            "interrupted": prepare_and_summarize(folder / "again", None, stop_at="training"),
        }
        hub.branches |= {"main": NEW, "dev": NEW}
        return results | {
            "main again": prepare_and_summarize(folder / "main", None),
            "resumed": prepare_and_summarize(folder / "again", None),
            "moved": prepare_and_summarize(folder / "moved", None),
        }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
