"""`pretrain/imports.py` relies on details of the pinned libraries: they still hold, and nothing is changed for good."""

import json

import pytest

from tests.commands import run_command

TRANSFORMERS = """
import json
from pathlib import Path
from pretrain.imports import libraries
with libraries():
    import transformers
import transformers.processing_utils
from transformers.utils import import_utils as utils
function = utils.create_import_structure_from_path
misses = function.cache_info().misses
models = Path(utils.__file__).parents[1] / "models"
folders = sum((folder / "__init__.py").exists() for folder in models.iterdir() if folder.is_dir())
import torch, transformers.models
print(json.dumps({
    "available": [utils.is_scipy_available(), utils.is_sklearn_available(), utils.is_torch_distributed_available()],
    "distributed": torch.distributed.is_available(), "lists": misses / folders,
    "own function": utils.define_import_structure.__module__,
    "models": {"LlamaForCausalLM", "Gemma2Config", "llama", "gemma2"} <= set(dir(transformers.models)),
    "names": sorted(dir(transformers)),
}))
"""
PLAIN = "import json, transformers; print(json.dumps(sorted(dir(transformers))))"
DEEPSPEED = """
import json, sys
from pretrain.imports import import_deepspeed_muon, libraries
with libraries(compiles={compiles}):
    import deepspeed
import_deepspeed_muon()
import torch
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
found = {{name: name in sys.modules for name in ("mlflow", "torch._dynamo.convert_frame", "torch._inductor")}}
compiled = torch.compile(lambda values: values + 1, backend="eager")
compiled(torch.zeros(2))
print(json.dumps(found | {{
    "optimizer": issubclass(MuonWithAuxAdam, torch.optim.Optimizer),
    "compiles": bool(torch._dynamo.utils.counters["frames"]["ok"]),
    "same": torch._dynamo is sys.modules["torch._dynamo"] and hasattr(torch._dynamo, "__file__"),
}}))
"""


def printed(code: str, **variables: str):
    return json.loads(run_command(["python", "-c", code], cold=True, **variables).stdout.splitlines()[-1])


def test_transformers_lists_its_models_once_and_later_reads_the_list_from_the_cache(tmp_path):
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    first, second = printed(TRANSFORMERS, **cache), printed(TRANSFORMERS, **cache)
    assert [path.name for path in tmp_path.glob("*/*")] == ["transformers-models.json"]
    assert first.pop("lists") < 1.5  # twice without the cache
    assert second.pop("lists") < 0.5
    assert first == second
    assert first.pop("names") == printed(PLAIN)
    assert first == {
        "available": [False, False, False],
        "distributed": True,
        "own function": "transformers.utils.import_utils",
        "models": True,
    }


@pytest.mark.parametrize("damaged", ['{"key": "half', '{"key": "an older folder", "value": []}'])
def test_a_list_in_the_cache_that_is_corrupt_or_out_of_date_is_made_again(damaged, tmp_path):
    file = tmp_path / "jepa-pretrain" / "transformers-models.json"
    file.parent.mkdir()
    file.write_text(damaged)
    assert printed(TRANSFORMERS, XDG_CACHE_HOME=str(tmp_path))["lists"] > 0.5
    assert len(json.loads(file.read_text())["value"]) > 1


def test_libraries_work_without_a_cache_folder(tmp_path):
    (tmp_path / "file").touch()
    assert printed(TRANSFORMERS, XDG_CACHE_HOME=str(tmp_path / "file"))["models"]


def test_deepspeed_loads_no_mlflow_and_no_compiler_until_a_function_is_compiled():
    """With `compiles` the compiler itself is imported, as without this project."""
    expected = {"mlflow": False, "optimizer": True, "compiles": True, "same": True}
    without = {"torch._dynamo.convert_frame": False, "torch._inductor": False}
    assert printed(DEEPSPEED.format(compiles=False)) == expected | without
    found = printed(DEEPSPEED.format(compiles=True))
    assert {name: found[name] for name in expected} == expected
