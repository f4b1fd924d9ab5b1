"""The corpora of a study: their assignment to arms, and the inputs that a prepared corpus still needs."""

import re
import sys

import pytest

from data_prep.utils.console import UserError
from data_prep.utils.files import read_json, write_json
from pretrain.config import load_config
from pretrain.studies.corpora import assign_corpora, prepare_corpus
from pretrain.studies.matching import load_base_config
from tests.commands import run_command, tiny_config, write_config

SHORT = {"data.filters.min_characters": 40}


def assign(study):
    return assign_corpora(study, load_base_config(study))


def test_arms_with_different_records_cannot_share_a_corpus(make_study, folder):
    path = str(folder / "corpus")
    for name in (path, f"{folder}/./corpus"):
        with pytest.raises(
            UserError,
            match=rf"arms.short: .* than the base, .* {re.escape(name)}; give the arm a different data.path",
        ):
            assign(make_study(arms={"plain": {}, "short": SHORT | {"data.path": name}}))
    with pytest.raises(UserError, match=r"arms.longer: .* than arms.short, .* elsewhere; give the arm"):
        assign(
            make_study(
                arms={
                    "plain": {},
                    "short": SHORT | {"data.path": "elsewhere"},
                    "longer": {"data.filters.min_characters": 50, "data.path": "elsewhere"},
                }
            )
        )
    overrides, corpora = assign(
        make_study(arms={"plain": {"data.path": path}, "short": SHORT | {"data.path": "elsewhere"}})
    )
    assert overrides == {"plain": {}, "short": {}} and len(corpora) == 2


def test_a_prepared_corpus_does_not_need_its_sources(tmp_path, messages):
    files = [tmp_path / name for name in ("first.jsonl", "second.jsonl")]
    for number, file in enumerate(files):
        file.write_text(
            "".join(f'{{"text": "lines {row} of file {number}", "code": "[0-9]{{{row}}}"}}\n' for row in range(60))
        )
    sources = [{"type": "json", "path": str(file)} for file in files]
    config = load_config(
        write_config(tmp_path, tiny_config(tmp_path, data__sources=sources, data__tokenizer={"vocab_size": 310}))
    )
    prepare_corpus(config)
    content = files[1].read_text()
    files[1].write_text(content.replace("lines", "rows "))
    with pytest.raises(UserError, match=r"was prepared with a different content of .*second.jsonl"):
        prepare_corpus(config)
    files[1].write_text(content)
    for gone, text in ((0, "first.jsonl is missing"), (1, " and 1 other input are missing")):
        files[gone].unlink()
        messages.clear()
        prepare_corpus(config)
        assert any(text in line for line in messages)
    test = tmp_path / "test.jsonl"
    test.write_text('{"text": "another question", "code": "a"}\n')
    others = {"evaluation": {"tasks": [{"name": "nl_rx", "test": str(test)}]}}
    other = load_config(
        write_config(
            tmp_path, tiny_config(tmp_path, data__sources=sources, data__tokenizer={"vocab_size": 310}, **others)
        )
    )
    with pytest.raises(
        UserError,
        match=r"was prepared with a different evaluation.tasks, and cannot be prepared again: its input .* missing",
    ):
        prepare_corpus(other)


PREPARE = """
import sys
from data_prep.utils.console import show_messages
from pretrain.config import load_config
from pretrain.studies.corpora import prepare_corpus
show_messages()
prepare_corpus(load_config(sys.argv[1]))
"""


def test_a_prepared_corpus_does_not_need_the_hub(tmp_path):
    config = write_config(tmp_path, tiny_config(tmp_path))
    prepare_corpus(load_config(config))
    manifest = read_json(tmp_path / "corpus" / "manifest.json")
    sources = [{"type": "hub", "path": "nobody/nothing-at-all", "hub_split": "train"}]
    prepared = load_config(write_config(tmp_path, tiny_config(tmp_path, data__sources=sources)))
    manifest["settings"]["data"]["sources"] = prepared.data.shard_settings()["sources"]
    write_json(tmp_path / "corpus" / "manifest.json", manifest)
    output = run_command(
        [sys.executable, "-c", PREPARE, str(config)], cold=True, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)
    ).stdout
    assert "is used as it is: cannot open the data set nobody/nothing-at-all (data.sources.0.path)" in output
