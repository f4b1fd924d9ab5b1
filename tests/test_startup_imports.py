"""The packages that each command loads at startup, and the packages that a rank ever loads.

Each command runs in a separate process that writes the names of its loaded modules to a file. A failure means that a
command loads a new package at startup. If the command needs the package at startup, add it to the lists below.
Otherwise import the package later or elsewhere.
"""

import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, run_command, tiny_config, write_config

RECORDER = """
import atexit, runpy, sys
output, kind, command = sys.argv[1:4]
before = set(sys.modules)
sys.argv = sys.argv[3:]
def write():
    loaded = [name for name, module in sys.modules.items() if name not in before and getattr(module, "__spec__", None)]
    open(output, "w").write("\\n".join(loaded))
atexit.register(write)
if kind == "-m":
    runpy.run_module(command, run_name="__main__", alter_sys=True)
else:
    runpy.run_path(command, run_name="__main__")
"""
CONFIGURATION = {
    "annotated_types",
    "numpy",
    "pydantic",
    "pydantic_core",
    "typing_extensions",
    "typing_inspection",
    "yaml",
}
"""Third-party packages for reading a configuration."""
PYARROW = {"cloudpickle", "pyarrow"}
"""pyarrow, and the package that it loads if it is installed, for example by mlflow."""
STARTUP_PACKAGES = {
    "launcher/run.py --help": CONFIGURATION,
    "launcher/run.py configs/demo.yaml train.stepz=3": CONFIGURATION,
    "launcher/run.py configs/demo.yaml data.path=nowhere": CONFIGURATION | PYARROW,
    "launcher/evaluate.py --help": CONFIGURATION,
    "launcher/evaluate.py nowhere": CONFIGURATION,
    "launcher/evaluate.py nowhere --embed pairs.jsonl": CONFIGURATION,
    "launcher/evaluate.py nowhere --sentence-transformers folders": CONFIGURATION,
    "launcher/supervise.py --help": CONFIGURATION | {"psutil"},
    "launcher/supervise.py -- python launcher/run.py configs/demo.yaml train.stepz=3": CONFIGURATION | {"psutil"},
    "launcher/study.py --help": CONFIGURATION,
    "launcher/study.py nowhere.yaml": CONFIGURATION,
    "launcher/report.py --help": CONFIGURATION,
    "launcher/report.py nowhere": CONFIGURATION,
    "launcher/generate.py --help": CONFIGURATION,
    "launcher/generate.py nowhere": CONFIGURATION,
    "launcher/search.py nowhere --index nowhere": CONFIGURATION,
    "launcher/status.py nowhere": CONFIGURATION,
    "launcher/init.py --help": CONFIGURATION - {"numpy"},
    "launcher/init.py pairs.jsonl -o configs/demo.yaml": CONFIGURATION - {"numpy"},
    "launcher/doctor.py --help": CONFIGURATION | {"psutil"},
    "launcher/doctor.py configs/demo.yaml train.stepz=3": CONFIGURATION | {"psutil"},
    "launcher/demo.py --help": CONFIGURATION,
    "-m data_prep --help": CONFIGURATION - {"numpy"},
    "-m data_prep configs/demo.yaml data.pathh=3": CONFIGURATION - {"numpy"},
    "-m data_prep verify --help": CONFIGURATION - {"numpy"},
    "-m data_prep verify nowhere": CONFIGURATION | PYARROW | {"sentencepiece", "google", "tokenizers", "tqdm"},
    "-m pretrain.data --help": set(),
    "-m pretrain.data inspect nowhere": CONFIGURATION | PYARROW,
    "-m pretrain.data stats nowhere": CONFIGURATION | PYARROW | {"sentencepiece", "google", "tokenizers", "tqdm"},
}
"""Third-party packages that each command may load at startup."""
PREPARATION = CONFIGURATION | PYARROW | {"google", "sentencepiece", "tokenizers", "tqdm"}
"""Third-party packages for preparing and verifying a corpus."""
TORCH = {"dill", "functorch", "mpmath", "sympy", "torch", "torchgen", "triton"}
"""torch, and the packages that it loads if parameters are initialised on the meta device."""
DEEPSPEED = {"deepspeed", "einops", "hjson", "msgpack", "packaging", "psutil", "tqdm"}
TRANSFORMERS = {
    "PIL",
    "accelerate",
    "anyio",
    "charset_normalizer",
    "colorama",
    "filelock",
    "h11",
    "httpcore2",
    "httpx2",
    "huggingface_hub",
    "idna",
    "jinja2",
    "markupsafe",
    "regex",
    "safetensors",
    "sniffio",
    "tabulate",
    "tokenizers",
    "transformers",
    "truststore",
}
"""transformers, the client of its hub, and the optional packages that they and torch load if installed.

PIL and jinja2 come with chat templates, colorama and tabulate with tables.
"""
TENSORBOARD = {"absl", "fsspec", "google", "tensorboard"}
RANK = CONFIGURATION | PYARROW | {"sentencepiece", "tokenizers"} | TORCH | DEEPSPEED | TRANSFORMERS | TENSORBOARD
PLAN = RANK - TENSORBOARD - {"mpmath", "sympy"} | {"google"}
"""Third-party packages of a dry run."""
UNNEEDED = {
    "mlflow",
    "networkx",
    "pandas",
    "scipy",
    "sklearn",
    "torch._dynamo.convert_frame",
    "torch._inductor",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
}
"""Large modules that DeepSpeed, transformers and torch's optimizers would load on CPU, where nothing is compiled."""
RANK_UNITS = {
    "compiler_stand_in",
    "config",
    "data",
    "deepspeed_options",
    "imports",
    "local_gpu",
    "models",
    "objectives",
    "planning",
    "relevant_env",
    "revision",
    "run_folder",
    "sections",
    "tasks",
    "training",
    "user_cache",
}
"""Units of pretrain that a rank may load."""


def modules_after(folder: Path, *command: str, code: int = 0) -> set[str]:
    """Run a command until it exits, assert that its exit code is `code`, and return the modules that it loaded."""
    output = folder / "modules.txt"
    words = command if command[0] == "-m" else ("script", *command)
    completed = run_command(["python", "-c", RECORDER, str(output), *words], check=False, cold=True)
    assert completed.returncode == code, completed.stderr[-4000:]
    return set(output.read_text().split())


def packages(modules: set[str]) -> set[str]:
    """Return the third-party packages of these modules."""
    names = {name.split(".")[0] for name in modules} - sys.stdlib_module_names - {"data_prep", "launcher", "pretrain"}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("command", STARTUP_PACKAGES)
def test_a_command_loads_no_unneeded_package_at_startup(command, tmp_path):
    words = command.split()
    loaded = packages(modules_after(tmp_path, *words, code=0 if words[-1] == "--help" else 2))
    assert loaded <= STARTUP_PACKAGES[command], (
        f"{command} loads {', '.join(sorted(loaded - STARTUP_PACKAGES[command]))}"
    )


def test_a_run_loads_no_unneeded_package(tmp_path):
    """The preparation and its tools do not load torch. The rank trains gemma2 and loads no other transformers model."""
    config = write_config(
        tmp_path, tiny_config(tmp_path, model__family="gemma2", train__steps=1, monitor__validate_every=1)
    )
    corpus = str(tmp_path / "corpus")
    for command in (
        ["-m", "data_prep", str(config)],
        ["-m", "data_prep", "verify", corpus],
        ["-m", "pretrain.data", "stats", corpus],
    ):
        loaded = packages(modules_after(tmp_path, *command))
        assert loaded <= PREPARATION, f"{' '.join(command[:3])} loads {', '.join(sorted(loaded - PREPARATION))}"
    modules = modules_after(tmp_path, "launcher/run.py", str(config))
    assert (tmp_path / "runs" / "run" / "metrics.jsonl").exists()
    assert packages(modules) <= RANK, f"a rank loads {', '.join(sorted(packages(modules) - RANK))}"
    assert {name.split(".")[1] for name in modules if name.startswith("pretrain.")} <= RANK_UNITS
    models = {name.split(".")[2] for name in modules if name.startswith("transformers.models.")}
    assert models == {"auto", "gemma2"}
    assert {"pretrain.models.openelm", "pretrain.training.dry_run"}.isdisjoint(modules)
    assert UNNEEDED.isdisjoint(modules)

    modules = modules_after(tmp_path, "launcher/run.py", str(config), "--dry-run")
    assert packages(modules) <= PLAN, f"a dry run loads {', '.join(sorted(packages(modules) - PLAN))}"
    assert UNNEEDED.isdisjoint(modules)
    run = str(tmp_path / "runs" / "run")
    modules = modules_after(tmp_path, "launcher/evaluate.py", run, "--export", str(tmp_path / "export"))
    assert {"deepspeed", "transformers"} <= modules
    # accelerate imports FSDP to save a model
    assert {name for name in UNNEEDED if not name.startswith("torch.distributed.")}.isdisjoint(modules)
    modules = modules_after(
        tmp_path, "launcher/generate.py", str(tmp_path / "export"), "a word", "--max-new-tokens", "2"
    )
    assert UNNEEDED.isdisjoint(modules)


def test_no_module_of_data_prep_loads_torch(tmp_path):
    """This includes the datasets package, which data_prep imports only when it needs it."""
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "data_prep").rglob("*.py")]
    imports = "\n".join(f"import {name}" for name in [*names, "datasets"])
    (tmp_path / "everything.py").write_text(imports)
    assert {"deepspeed", "torch", "transformers"}.isdisjoint(
        packages(modules_after(tmp_path, str(tmp_path / "everything.py")))
    )
