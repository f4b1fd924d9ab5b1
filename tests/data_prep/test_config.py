"""Tests of the configuration file: overrides, placeholders, and errors that name the key and the remedy."""

from pathlib import Path

import pytest

from data_prep.config import DataConfig, evaluation_tests
from data_prep.utils.config_file import load_yaml, validate
from data_prep.utils.console import UserError
from pretrain.config import RunConfig

REPO_ROOT = Path(__file__).resolve().parents[2]
DATA = {"path": "out", "sources": [{"type": "nlrx", "records": 5}], "tokenizer": {"vocab_size": 400}}


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("""
name: study-{objective.name}-{seed}
seed: 3
objective: {name: llm_jepa}
data:
  path: out
  sources:
    - {type: nlrx, records: 5}
    - {type: json, split: validation}
  tokenizer: {vocab_size: 400}
""")
    return path


def error_message(**changes) -> str:
    with pytest.raises(UserError) as raised:
        validate(DataConfig, DATA | changes, "data")
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_overrides_reach_nested_keys_list_entries_and_missing_sections(config):
    values = load_yaml(
        config,
        [
            "seed=7",
            "data.sources.1.path=train.jsonl",
            "data.sources.0={type: nlrx, records: 9}",
            "train.learning_rate=1.5e-3",
            "data.views=[question, answer]",
            "data.workers=",
        ],
    )
    assert values["seed"] == 7 and values["train"] == {"learning_rate": 1.5e-3}
    assert values["data"]["sources"] == [
        {"type": "nlrx", "records": 9},
        {"type": "json", "split": "validation", "path": "train.jsonl"},
    ]
    data = validate(DataConfig, values["data"], "data")
    assert data.views == ("question", "answer") and data.workers is None
    assert data.sources[1].path == "train.jsonl" and data.sources[1].split == "validation"


def test_an_override_value_may_contain_equals_signs(config):
    assert load_yaml(config, ["data.path=a=b"])["data"]["path"] == "a=b"


@pytest.mark.parametrize(
    "override, expected",
    [
        ("seed", "write key=value"),
        ("=3", "write key=value"),
        ("data.sources.2.path=x", "'2' is not an index of that list, which has 2 entries (from 0)"),
        ("data.sources.path=x", "'path' is not an index of that list"),
        ("data.sources.-1.path=x", "'-1' is not an index of that list"),
        ("data.sources.².path=x", "'²' is not an index of that list"),
        ("seed.x=1", "seed is a single value and has no keys below it"),
        ("seed=[1", "seed: cannot read the value '[1' as YAML"),
        # YAML reads this as a date that does not exist.
        ("name=2024-13-45", "name: cannot read the value '2024-13-45' as YAML"),
    ],
)
def test_an_invalid_override_is_explained(config, override, expected):
    with pytest.raises(UserError) as raised:
        load_yaml(config, [override])
    assert expected in str(raised.value) and "\n" not in str(raised.value)


def test_placeholders_in_the_name_use_overridden_values(config):
    assert load_yaml(config)["name"] == "study-llm_jepa-3"
    assert load_yaml(config, ["objective.name=next_token", "seed=4"])["name"] == "study-next_token-4"


@pytest.mark.parametrize("name", ["x-{objective.nme}", "x-{data}", "x-{seed.x}"])
def test_a_placeholder_without_a_single_value_is_an_error(config, name):
    with pytest.raises(UserError, match="does not name a single value"):
        load_yaml(config, [f"name={name!r}"])


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"name: \xff\n", "is not valid YAML"),
        (b"name: [", "is not valid YAML"),
        (b"name: 2024-13-45", "is not valid YAML"),
        (b"- name\n", "is not a mapping of keys"),
        (b"", "is not a mapping of keys"),
        (b"\x00", "is not valid YAML"),
        (b"name: x\nobjectve: {}\n", "unknown key 'objectve' in "),
        (b"1: x\n", "unknown key '1' in "),
    ],
)
def test_an_invalid_configuration_file_is_one_line(tmp_path, content, expected):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_yaml(path, sections=("name", "objective"))
    assert expected in str(raised.value) and str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_byte_order_mark_is_not_part_of_the_first_key(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbfname: x\n")
    assert load_yaml(path) == {"name": "x"}


@pytest.mark.parametrize(
    "changes, unknown, nearest",
    [
        ({"sequence_lenght": 3}, "data.sequence_lenght", "data.sequence_length"),
        ({"tokenizer": {"vocab": 3}}, "data.tokenizer.vocab", "data.tokenizer.vocab_size"),
        (
            {"sources": [{"type": "nlrx", "records": 5}, {"type": "nlrx", "record": 5, "records": 1}]},
            "data.sources.1.record",
            "data.sources.0.records",
        ),
        ({"sources": [{"type": "json", "pth": "x"}]}, "data.sources.0.pth", "data.sources.0.path"),
        ({"on_malfromed": "drop"}, "data.on_malfromed", "data.on_malformed"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(changes, unknown, nearest):
    assert error_message(**changes) == f"unknown key {unknown!r}; the nearest known key is {nearest!r}"


def test_an_unknown_section_names_the_nearest_known_one(config):
    with pytest.raises(UserError, match=r"unknown key 'chekpoint' in .*; the nearest known key is 'checkpoint'"):
        load_yaml(config, ["chekpoint.every=3"], tuple(RunConfig.model_fields))


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"sequence_length": "long"}, "data.sequence_length: "),
        ({"sequence_length": 3}, "data.sequence_length: "),
        ({"validation_fraction": 1.0}, "data.validation_fraction: "),
        ({"workers": 0}, "data.workers: "),
        ({"lm_views": "first"}, "data.lm_views: "),
        ({"on_malformed": "skip"}, "data.on_malformed: "),
        ({"path": 3}, "data.path: "),
        ({"path": None}, "data.path: "),
        ({"views": []}, "data.views"),
        ({"views": ["text", "text"]}, "give each view a different name"),
        ({"sources": [{"type": "xml"}]}, "data.sources.0.type: 'xml' is not one of "),
        ({"sources": [{"records": 5}]}, "data.sources.0.type is missing"),
        ({"sources": [{"type": "nlrx", "records": 0}]}, "data.sources.0.records: "),
        ({"sources": [{"type": "nlrx"}]}, "data.sources.0.records: "),
        ({"sources": [{"type": "nlrx", "records": 5, "split": "dev"}]}, "data.sources.0.split: "),
        ({"sources": {"0": {}}}, "data.sources: "),
        ({"sources": [{"type": "json", "weight": 0}]}, "data.sources.0.weight: "),
        (
            {"sources": [{"type": "json", "weight": 2, "split": "test"}]},
            "data.sources.0: weight has no effect with split: test, only with split train",
        ),
        (
            {"sources": [{"type": "nlrx", "records": 1, "weight": 0.5, "split": "validation"}]},
            "data.sources.0: weight has no effect with split: validation, only with split train",
        ),
        (
            {"sources": [{"type": "json", "views": 3}]},
            "data.sources.0.views: give a mapping of views to columns, or the name of a column",
        ),
        ({"sources": [{"type": "json", "views": {}}]}, "data.sources.0.views: give a mapping"),
        ({"sources": [{"type": "json", "views": {"text": 3}}]}, "data.sources.0.views: give a mapping"),
        ({"sources": [{"type": "json", "views": {"text": ""}}]}, "data.sources.0.views: give a mapping"),
        ({"sources": [{"type": "json", "views": ["a"]}]}, "data.sources.0.views: give a mapping"),
        ({"sources": [{"type": "hub"}]}, "data.sources.0.path: "),
        (
            {"sources": [{"type": "text", "separator": "a\nb"}]},
            "data.sources.0.separator: a separator is the text of one line",
        ),
        (
            {"sources": [{"type": "text", "separator": "  "}]},
            "data.sources.0.separator: a separator is the text of one line",
        ),
        ({"sources": [{"type": "text", "separator": "x" * 1001}]}, "data.sources.0.separator: "),
        ({"sources": [{"type": "text", "records": 3}]}, "data.sources.0.records has no effect with text; remove it"),
        ({"tokenizer": {}}, "data.tokenizer: give exactly one"),
        ({"tokenizer": {"vocab_size": 9, "path": "x"}}, "data.tokenizer: give exactly one"),
        ({"tokenizer": {"path": "x", "model_type": "bpe"}}, "has no effect with path"),
    ],
)
def test_an_invalid_value_is_reported_with_its_key(changes, expected):
    assert expected in error_message(**changes)


def test_only_settings_that_affect_shards_are_compared():
    base = validate(DataConfig, DATA).shard_settings()
    for ignored in ({"path": "elsewhere"}, {"workers": 3}, {"lm_views": "last"}):
        assert validate(DataConfig, DATA | ignored).shard_settings() == base
    for compared in (
        {"sequence_length": 64},
        {"views": ["a", "b"]},
        {"validation_fraction": 0.1},
        {"tokenizer": {"vocab_size": 401}},
        {"sources": [{"type": "nlrx", "records": 5, "seed": 1}]},
        {"on_malformed": "drop"},
    ):
        assert validate(DataConfig, DATA | compared).shard_settings() != base


def test_the_data_sections_of_the_configs_are_valid():
    configs = sorted((REPO_ROOT / "configs").glob("*.yaml"))
    assert configs
    for path in configs:
        validate(DataConfig, load_yaml(path)["data"], "data")


def test_configuration_errors_are_one_line(config, run_expecting_user_error, tmp_path):
    assert "No such file" in run_expecting_user_error(tmp_path / "absent.yaml")
    assert run_expecting_user_error(config, "data.tokenizer.vocab_sise=3") == (
        "unknown key 'data.tokenizer.vocab_sise'; the nearest known key is 'data.tokenizer.vocab_size'"
    )
    config.write_text("name: x\n")
    assert "no `data` section" in run_expecting_user_error(config)


def test_a_duplicate_key_is_reported(tmp_path):
    (tmp_path / "run.yaml").write_text("name: x\ndata: {path: a}\ntrain:\n  steps: 1\n  steps: 2\n")
    with pytest.raises(UserError, match=r"run.yaml is not valid YAML: the key 'steps' is given twice .*line 5"):
        load_yaml(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("name: x\ndata: &base {path: a}\ntrain: {<<: *base, path: b}\n")
    assert load_yaml(tmp_path / "run.yaml")["train"] == {"path": "b"}


@pytest.mark.parametrize(
    "source, message",
    [
        ({"path": "a.jsonl"}, "data.sources.0.type is missing"),
        ({"type": "xml", "path": "a"}, "data.sources.0.type: 'xml' is not one of"),
    ],
)
def test_a_source_without_a_known_type_is_reported(source, message):
    with pytest.raises(UserError, match=message):
        validate(DataConfig, {"path": "x", "sources": [source], "tokenizer": {"vocab_size": 300}}, "data")


@pytest.mark.parametrize(
    "test, message",
    [
        ({"type": "csv", "path": "a.csv"}, r"evaluation.tasks.0.test.type: 'csv' is not one of 'json', 'hub'"),
        ({"path": "a.jsonl"}, "evaluation.tasks.0.test.type is missing"),
        (
            {"type": "json", "paht": "a"},
            "unknown key 'evaluation.tasks.0.test.paht'; the nearest known key is 'evaluation.tasks.0.test.path'",
        ),
    ],
)
def test_an_invalid_source_of_test_rows_is_reported(test, message):
    data = validate(DataConfig, {"path": "x", "tokenizer": {"vocab_size": 300}}, "data")
    with pytest.raises(UserError, match=message):
        evaluation_tests(data, {"tasks": [{"name": "nl_rx", "test": test}]})
