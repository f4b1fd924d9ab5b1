"""Imports of large packages without the parts of them that this project does not use.

Most of the start of a process that plans, trains or evaluates is imports. None of this changes what a package computes.
A command imports torch, transformers, DeepSpeed and the modules that need them inside `libraries`.
"""

import gc
import hashlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from pretrain.compiler_stand_in import replace_compiler
from pretrain.user_cache import read_cached, write_cached

LISTING_MODULE = "transformers.utils.import_utils"
"""Module with the function that lists the models of transformers."""
LISTING = "transformers-models.json"
"""File with this list in the user's cache."""


@contextmanager
def libraries(compiles: bool = False) -> Iterator[None]:
    """Prepare torch and transformers, and import in the body the modules that need them or DeepSpeed.

    `compiles` is whether the process compiles models on CPU; with a GPU, torch's compiler is always available.

    Garbage collection pauses, because imports create many objects and no garbage, and each collection visits all of
    them. Later collections skip what has been imported.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    gc.disable()
    try:
        # DeepSpeed's autotuner imports mlflow, which takes seconds and sends usage statistics
        with hidden("mlflow"):
            _import_torch(compiles)
            _import_transformers()
            yield
    finally:
        gc.freeze()
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


def _import_torch(compiles: bool) -> None:
    """Import torch, without its compiler if the process compiles nothing."""
    import torch

    if not compiles and not torch.cuda.is_available():
        replace_compiler()


def _import_transformers() -> None:
    """Import transformers without scipy, scikit-learn and torch.distributed, if it is not imported yet.

    With any model, transformers would import scipy for the losses of object detection, scikit-learn for assisted
    generation, and the tensors, checkpoints and FSDP of torch.distributed for its own parallelism. The first check
    whether they are available is cached, so it is made here.
    """
    if "transformers" in sys.modules:
        return
    from unittest import mock  # imported late because it imports asyncio

    import torch.distributed

    with _cached_listings(), hidden("scipy", "sklearn"):
        from transformers.utils import import_utils

        import_utils.is_scipy_available()
        import_utils.is_sklearn_available()
        with mock.patch.object(torch.distributed, "is_available", return_value=False):
            import_utils.is_torch_distributed_available()
        import transformers.models
        import transformers.processing_utils  # noqa: F401  # makes the lists once more
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


@contextmanager
def _cached_listings() -> Iterator[None]:
    """Read the lists of the models of transformers from the user's cache.

    `import transformers` would read 2,500 files to list its models, and its subpackage of models would read them again.
    The lists are made anew if a folder of a model has changed.
    """
    finder = _ListingFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        module = sys.modules.get(LISTING_MODULE)
        if finder.define is not None and module is not None:
            module.define_import_structure = finder.define  # type: ignore[attr-defined]


class _ListingFinder(MetaPathFinder):
    """A finder of LISTING_MODULE that replaces its function `define_import_structure`, which it keeps in `define`."""

    define: Any = None

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != LISTING_MODULE or (spec := PathFinder.find_spec(name, path)) is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_replace(module: Any) -> None:
            execute(module)
            self.define = module.define_import_structure
            module.define_import_structure = self.define_from_cache

        loader.exec_module = execute_and_replace
        return spec

    def define_from_cache(self, module_path: Any, prefix: str | None = None) -> dict[frozenset[str], Any]:
        """Return the names in each module by the packages that they need, from the cache if the folder has all models.

        The names of the modules begin with `prefix`.
        """
        models = Path(module_path) if Path(module_path).is_dir() else Path(module_path).parent
        if models.name != "models":
            return self.define(module_path, prefix)
        folders = sorted((str(one), one.stat().st_mtime_ns) for one in (models, *models.iterdir()))
        key = hashlib.sha256(repr(folders).encode()).hexdigest()
        listing = read_cached(LISTING, key)
        if listing is None:
            listing = [
                (sorted(packages), {module: sorted(names) for module, names in found.items()})
                for packages, found in self.define(models).items()
            ]
            write_cached(LISTING, key, listing)
        before = f"{prefix}." if prefix else ""
        return {
            frozenset(packages): {before + module: set(names) for module, names in found.items()}
            for packages, found in listing
        }


def import_deepspeed_muon() -> None:
    """Import DeepSpeed's Muon without compiling its functions, which would import torch's compiler.

    An engine imports this optimizer only to compare it with its own one. This project has a different Muon.
    """
    from unittest import mock

    import torch

    with mock.patch.object(torch, "compile", lambda function: function):
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
