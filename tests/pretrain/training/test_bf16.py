"""Every family trains in bf16 on two ranks, resumes on one rank, and is exported.

Bf16 on CPU stands in for a run on GPUs.
"""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pretrain.evaluation.export import export_checkpoint
from pretrain.models.families import register_family_from_folder
from pretrain.run_folder import step_name
from pretrain.training.checkpoint_loading import consolidate
from tests.commands import ROOT, ranks_command, run_command, tiny_config, write_config
from tests.families import FAMILIES

WORKER = ROOT / "tests" / "pretrain" / "training" / "several_runs.py"
OBJECTIVES = {
    "llama": {"name": "llm_jepa", "distance": "info_nce", "weight": 0.5},
    "gemma2": {"name": "nextlat", "kl_weight": 0.5},
    "olmo2": {"name": "nitp"},
    "openelm": {"name": "llm_jepa", "weight": 0.5, "predictor_mlp": 24},
    "qwen3": {"name": "llm_jepa", "weight": 0.5},
    "mistral": {"name": "nextlat", "kl_weight": 0.5},
    "smollm3": {"name": "llm_jepa", "distance": "l2", "weight": 0.5},
    "olmo3": {"name": "nitp"},
    "gemma3_text": {"name": "llm_jepa", "weight": 0.5, "predictor_mlp": 24},
}
STEPS = 4


@pytest.fixture(scope="module")
def folder(prepared, tmp_path_factory):
    """Train three runs per family, and return their folder.

    The first runs in bf16 on two ranks, the second in fp32. The third resumes from the middle of the first on one rank.
    """
    folder = tmp_path_factory.mktemp("bf16")

    def add(family: str, name: str, precision: str, micro_batch_rows: int = 2) -> str:
        shape = yaml.safe_load((ROOT / "configs" / "models" / f"{family}_tiny.yaml").read_text())
        return str(
            write_config(
                folder,
                tiny_config(
                    folder,
                    name=f"{family}-{name}",
                    data__path=str(prepared),
                    data__sources=[],
                    data__tokenizer={"vocab_size": 512},
                    model={"family": family, "shape": shape},
                    objective=OBJECTIVES[family],
                    checkpoint={"every": STEPS // 2},
                    monitor__loggers=[],
                    train={
                        "steps": STEPS,
                        "global_batch_rows": 8,
                        "micro_batch_rows": micro_batch_rows,
                        "learning_rate": 1e-3,
                        "precision": precision,
                    },
                ),
            )
        )

    run_command(
        ranks_command(
            2,
            WORKER,
            *(
                add(family, name, precision)
                for family in FAMILIES
                for name, precision in (("two", "bf16"), ("fp32", "fp32"))
            ),
        )
    )
    resumed = [add(family, "one", "bf16", micro_batch_rows=4) for family in FAMILIES]
    for family in FAMILIES:
        shutil.copytree(folder / "runs" / f"{family}-two", folder / "runs" / f"{family}-one")
        shutil.rmtree(folder / "runs" / f"{family}-one" / "checkpoints" / step_name(STEPS))
        (folder / "runs" / f"{family}-one" / "status.json").unlink()
    run_command(["python", str(WORKER), *resumed])
    return folder


def has_weights(family: str) -> bool:
    """Return whether the objective of a family has weights."""
    return OBJECTIVES[family]["name"] != "llm_jepa" or "predictor_mlp" in OBJECTIVES[family]


def losses(folder, name: str) -> np.ndarray:
    return np.array(
        [json.loads(line)["loss/total"] for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_losses_are_close_to_the_losses_in_fp32_and_on_a_different_number_of_ranks(folder, family):
    two = losses(folder, f"{family}-two")
    assert len(two) == STEPS and two[-1] < two[0]
    np.testing.assert_allclose(two, losses(folder, f"{family}-fp32"), rtol=1e-2)
    np.testing.assert_allclose(losses(folder, f"{family}-one"), two, rtol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_has_the_fp32_weights_of_the_checkpoint(folder, family):
    """Check that the export has the weights that the optimizer updates, not their rounded copies in bf16."""
    run_dir = folder / "runs" / f"{family}-one"
    export = export_checkpoint(run_dir, STEPS)
    register_family_from_folder(export)
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32, local_files_only=True)
    weights = consolidate(run_dir / "checkpoints" / step_name(STEPS))
    exported = {f"causal_lm.{name}": weight for name, weight in model.state_dict().items()}
    if (export / "jepa.safetensors").exists():
        exported |= load_file(export / "jepa.safetensors")
    assert weights.keys() <= exported.keys()
    assert any(name.startswith("objective.") for name in weights) == has_weights(family)
    for name, weight in weights.items():
        assert torch.equal(exported[name], weight), name
    assert any((weight != weight.bfloat16()).any() for weight in weights.values()), (
        "every weight is exact in bf16: the export may hold rounded copies"
    )
    assert model(torch.arange(3, 40)[None]).logits.isfinite().all()
    card = (export / "README.md").read_text()
    assert "| NL-RX grammar (generated) | train |" in card, "the sources of a run without data.sources are the corpus's"
