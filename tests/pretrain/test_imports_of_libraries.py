"""`pretrain/imports.py` relies on details of the pinned libraries: they still hold, and nothing is changed for good."""

import json

from tests.commands import run_command

TRANSFORMERS = """
import json
from pathlib import Path
from pretrain.imports import import_transformers
import_transformers()
from transformers.utils import import_utils, is_scipy_available, is_sklearn_available
function = import_utils.create_import_structure_from_path
misses = function.cache_info().misses
models = Path(import_utils.__file__).parents[1] / "models"
folders = sum((folder / "__init__.py").exists() for folder in models.iterdir() if folder.is_dir())
import transformers.models
names = set(dir(transformers.models))
import scipy
print(json.dumps({
    "losses": is_scipy_available(), "generation": is_sklearn_available(), "lists": misses / folders,
    "same": function(models) == function(str(models / "__init__.py")),
    "models": {"LlamaForCausalLM", "Gemma2Config", "llama", "gemma2"} <= names,
}))
"""
DEEPSPEED = """
import json, os, sys
from pretrain.imports import import_deepspeed, import_deepspeed_muon
import_deepspeed()
import_deepspeed_muon()
import torch
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
compiler = "torch._inductor.compile_fx" in sys.modules
compiled = torch.compile(lambda values: values + 1, backend="eager")
compiled(torch.zeros(2))
print(json.dumps({
    "compiler": compiler, "mlflow": "mlflow" in sys.modules, "variable": os.environ.get("TORCHDYNAMO_DISABLE"),
    "optimizer": issubclass(MuonWithAuxAdam, torch.optim.Optimizer),
    "compiles": bool(torch._dynamo.utils.counters["frames"]["ok"]),
}))
"""


def printed(code: str, **variables: str) -> dict:
    return json.loads(run_command(["python", "-c", code], cold=True, **variables).stdout.splitlines()[-1])


def test_transformers_lists_its_models_once_and_uses_no_scipy():
    found = printed(TRANSFORMERS)
    assert found.pop("lists") < 1.5  # twice without import_transformers
    assert found == {"losses": False, "generation": False, "same": True, "models": True}


def test_deepspeed_loads_no_mlflow_and_no_compiler_but_other_functions_are_compiled():
    assert printed(DEEPSPEED, TORCHDYNAMO_DISABLE="0") == {
        "mlflow": False,
        "compiler": False,
        "optimizer": True,
        "variable": "0",
        "compiles": True,
    }
