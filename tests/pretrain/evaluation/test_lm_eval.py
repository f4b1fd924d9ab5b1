"""The lm-eval harness runs a custom task on an export. Skipped if the extra lm-eval is not installed."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from data_prep.make_tokenizer import train
from data_prep.nlrx_grammar import generate
from data_prep.utils.console import UserError
from pretrain.evaluation.model_tasks import lm_eval
from pretrain.models.language_model import build_model_config
from tests.commands import TINY_SHAPE


def test_metrics_of_the_harness_get_flat_names_without_standard_errors():
    results = {"mine": {"alias": "mine", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 1, "samples": 9}}
    assert lm_eval.flat(results) == {"mine_acc": 0.5, "mine_acc_norm": 1.0}


def test_directions_come_from_the_harness():
    results = {"speech": {"wer,none": 0.5, "wer_stderr,none": 0.1, "acc,none": 0.2, "odd,none": 1}}
    higher_is_better = {"speech": {"wer": False, "acc": True, "odd": None, "unused": True}}
    assert lm_eval.metric_directions(higher_is_better, results) == {"speech_wer": "lower", "speech_acc": "higher"}


def test_each_answer_filter_has_its_own_metric():
    results = {
        "sums": {
            "exact_match,strict-match": 0.25,
            "exact_match_stderr,strict-match": 0.1,
            "exact_match,flexible-extract": 0.5,
        }
    }
    assert lm_eval.flat(results) == {"sums_exact_match_strict-match": 0.25, "sums_exact_match_flexible-extract": 0.5}
    assert lm_eval.metric_directions({"sums": {"exact_match": True}}, results) == dict.fromkeys(
        lm_eval.flat(results), "higher"
    )


def test_a_task_of_the_harness_runs_on_an_export(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    tokenizer = train([text for index in range(40) for text in generate(0, "test", index)], 330, tmp_path / "export")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(build_model_config("llama", TINY_SHAPE, tokenizer, 96)).save_pretrained(
        tmp_path / "export"
    )
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps({"q": f"lines {number}", "choices": ["a", "b"], "gold": number % 2}) + "\n"
            for number in range(8)
        )
    )
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump(
            {
                "task": "mine",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "{{q}}",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "gold",
                "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            }
        )
    )
    run = SimpleNamespace(
        export=tmp_path / "export", task=SimpleNamespace(harness=[str(tmp_path / "mine.yaml")], rows=6)
    )
    result = lm_eval.evaluate(run)
    assert result.directions == {"mine_acc": "higher", "mine_acc_norm": "higher"}
    assert result.rows == 6 and set(result.metrics) == {"mine_acc", "mine_acc_norm"}
    assert all(0 <= value <= 1 for value in result.metrics.values())
    with pytest.raises(UserError, match="the harness cannot run no_such_task"):
        lm_eval.evaluate(SimpleNamespace(export=run.export, task=SimpleNamespace(harness=["no_such_task"], rows=6)))
