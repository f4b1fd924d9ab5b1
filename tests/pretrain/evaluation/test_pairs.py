"""A task's file is taken as it is."""

import json
import shutil

from data_prep.config import JsonSource
from pretrain.config import load_config
from pretrain.data.corpus import Corpus
from pretrain.evaluation.pairs import prepare_pairs, read_pairs
from pretrain.run_folder import MODEL
from tests.launching import tiny_config, write_config


def test_all_rows_of_a_task_count_though_some_are_equal(prepared, tmp_path):
    shutil.copytree(prepared / "tokenizer", tmp_path / MODEL)
    rows = [{"text": f"lines with {number % 3}", "code": f".*{number % 3}.*"} for number in range(10)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = JsonSource(type="json", path=str(tmp_path / "test.jsonl"))
    config = load_config(write_config(tmp_path, tiny_config(tmp_path)))
    assert len(Corpus(prepare_pairs(config, source, tmp_path / "evaluation").path, "train")) == 10
    assert read_pairs(source, ("text", "code"), "test") == [tuple(row.values()) for row in rows]
    assert len(read_pairs(source, ("text", "code"), "test", rows=4)) == 4
