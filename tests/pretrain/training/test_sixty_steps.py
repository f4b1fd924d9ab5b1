"""Every family and every objective trains for sixty steps under ZeRO-3 on two ranks.

Each export, loaded with transformers, has the same logits as the trained engine.
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from data_prep.tokenizer import Tokenizer
from pretrain.config import load_config
from pretrain.evaluation.export import export_checkpoint
from tests.commands import ROOT, prepare_corpus, ranks_command, run_command, tiny_config, write_config
from tests.families import FAMILIES
from tests.processes import TIMEOUT

WORKER = ROOT / "tests/pretrain/training/logits_after_training.py"
JEPA = {"name": "llm_jepa", "weight": 0.5}
TUBE = {"name": "semantic_tube", "weight": 0.02}
OBJECTIVES = {
    "next-token": {"name": "next_token"},
    **{distance: JEPA | {"distance": distance} for distance in ("cosine", "l2", "mse", "info_nce")},
    "both-prepended": JEPA
    | {"direction": "both", "predictor_placement": "prepend", "predictor_tokens": 2, "stop_gradient": True},
    "backward-independent": JEPA | {"direction": "backward", "layout": "independent", "dropout": 0.5},
    "regularized": JEPA
    | {
        "regularizers": [{"name": name, "weight": 0.05} for name in ("vicreg", "sigreg", "coding_rate")],
        "weight_schedule": [[0, 0], [0.5, 1]],
    },
    **{form: TUBE | {"form": form} for form in ("three_points", "sub_span", "views")},
}
PARAPHRASE_VIEWS = ("one", "two", "three")
DOCUMENT_VIEWS = ("text",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sixty")
    settings = {"train__steps": 60, "monitor__log_every": 20, "monitor__loggers": []}
    configs = [
        tiny_config(
            folder, name=f"family-{family}", model={"family": family, "shape": f"{family}_tiny.yaml"}, **settings
        )
        for family in FAMILIES
    ]
    configs += [
        tiny_config(folder, name=f"objective-{name}", objective=objective, **settings)
        for name, objective in OBJECTIVES.items()
    ]
    for config in configs:
        # prepended predictor tokens need copies of both views, so the rows must be longer
        config["data"]["sequence_length"] = 192 if "prepended" in config["name"] else 128
    configs += [
        config_on_other_views(folder, "paraphrases", PARAPHRASE_VIEWS, OBJECTIVES["info_nce"], settings),
        config_on_other_views(folder, "documents", DOCUMENT_VIEWS, OBJECTIVES["sub_span"], settings),
    ]
    for family in FAMILIES:
        (folder / f"{family}_tiny.yaml").write_text((ROOT / "configs" / "models" / f"{family}_tiny.yaml").read_text())
    paths = [write_config(folder, config) for config in configs]
    for path in (paths[0], *paths[-2:]):
        prepare_corpus(path)
    run_command(ranks_command(2, WORKER, *paths), timeout=4 * TIMEOUT)
    return folder


def config_on_other_views(folder, name, views, objective, settings):
    """Write groups of paraphrases or plain documents, and return the configuration of a run on them.

    Some groups of paraphrases lack a view.
    """

    def has_view(number: int, view_number: int) -> bool:
        return len(views) == 1 or (number + view_number) % 4 != 0

    lines = [
        {
            view: f"{view} says {number * 7 % 31} of {number}"
            for view_number, view in enumerate(views)
            if has_view(number, view_number)
        }
        for number in range(400)
    ]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = tiny_config(folder, name=name, objective=objective, **settings)
    config["data"] |= {
        "tokenizer": {"vocab_size": 300},
        "path": str(folder / f"{name}-corpus"),
        "views": list(views),
        "validation_fraction": 0.1,
        "sources": [{"type": "json", "path": str(folder / f"{name}.jsonl")}],
    }
    if len(views) > 1:
        config["data"]["missing_views"] = "keep"
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *(f"family-{family}" for family in FAMILIES),
        *(f"objective-{name}" for name in OBJECTIVES),
        "paraphrases",
        "documents",
    ],
)
def test_the_loss_falls_and_the_export_has_the_logits_of_the_trained_engine(folder, name):
    lines = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 20, 40, 60]
    assert lines[-1]["loss/lm"] < 0.8 * lines[0]["loss/lm"] and lines[-1]["optimizer/skipped_steps"] == 0
    config = load_config(folder / f"{name}.yaml")
    export = export_checkpoint(config.run_dir, 60)
    model = AutoModelForCausalLM.from_pretrained(export, attn_implementation="eager")
    saved = torch.load(config.run_dir / "logits.pt")
    tokens = saved["token_ids"].tolist()
    bos = Tokenizer.load(export).bos_id
    assert len(saved["label_index"]) > 40
    for position, logits in list(zip(saved["label_index"].tolist(), saved["logits"], strict=True))[::3]:
        document_start = max(earlier for earlier in range(position + 1) if tokens[earlier] == bos)
        with torch.no_grad():
            expected = model(torch.tensor([tokens[document_start : position + 1]])).logits[0, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
