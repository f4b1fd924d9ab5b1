"""Imports of large packages without the parts of them that this project does not use.

Most of the start of a process that plans, trains or evaluates is imports. None of this changes what a package computes.
"""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DISABLE_COMPILER = "TORCHDYNAMO_DISABLE"
"""Environment variable with which torch.compile returns functions unchanged if it is 1."""


@contextmanager
def fast_imports() -> Iterator[None]:
    """Pause garbage collection: imports create many objects and no garbage, and each collection visits all of them."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """Make packages appear not to be installed, except for the ones that are already imported."""
    names = [name for name in packages if name not in sys.modules]
    for name in names:
        sys.modules[name] = None  # type: ignore[assignment]  # makes the import fail
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def import_deepspeed() -> None:
    """Import DeepSpeed without mlflow, if it is not imported yet.

    If mlflow is installed, DeepSpeed's autotuner, which this project does not use, would import it. That takes seconds,
    and mlflow would send usage statistics.
    """
    with hidden("mlflow"):
        import deepspeed  # noqa: F401


def import_transformers() -> None:
    """Import transformers without scipy and scikit-learn, and list its models once, if it is not imported yet.

    With any model, transformers would import scipy for the losses of object detection, and scikit-learn for assisted
    generation. The first check whether they are installed is cached, so it is made here.
    """
    if "transformers" in sys.modules:
        return
    with hidden("scipy", "sklearn"):
        from transformers.utils import import_utils

        for is_available in (import_utils.is_scipy_available, import_utils.is_sklearn_available):
            is_available()
    # `import transformers` has read 3,000 files to list the models. Its subpackage of models would read them again,
    # because it passes the folder in another form and misses the cache of this function.
    list_models = import_utils.create_import_structure_from_path
    models = Path(import_utils.__file__).parents[1] / "models"
    import_utils.create_import_structure_from_path = lambda path: list_models(models)  # type: ignore[assignment]
    try:
        import transformers.models  # noqa: F401
    finally:
        import_utils.create_import_structure_from_path = list_models


def import_deepspeed_muon() -> None:
    """Import DeepSpeed's Muon without compiling its functions, which would import torch's compiler, torch._inductor.

    An engine imports this optimizer only to compare it with its own one. This project has a different Muon.
    """
    before = os.environ.get(DISABLE_COMPILER)
    os.environ[DISABLE_COMPILER] = "1"
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        del os.environ[DISABLE_COMPILER]
        if before is not None:
            os.environ[DISABLE_COMPILER] = before
