"""A stand-in for torch's compiler in processes that compile nothing.

DeepSpeed, transformers and torch's optimizers import `torch._dynamo` to mark functions that the compiler must treat
differently. The import takes as much time as the rest of torch. The marks mean nothing in a process without a compiler,
so the stand-in returns the functions unchanged. Whatever else is requested from it comes from the real module, which
then replaces it.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
INDEPENDENT = f"{COMPILER}._trace_wrapped_higher_order_op"
"""Module of the compiler's package that FlexAttention and the masks of transformers import. It uses no other one."""


def replace_compiler() -> None:
    """Make `import torch._dynamo` return a stand-in, unless the real module is imported already."""
    import torch

    if COMPILER not in sys.modules:
        sys.modules[COMPILER] = torch._dynamo = StandIn(COMPILER)
        _import_independent(Path(torch.__file__).parent / "_dynamo")


def _import_independent(folder: Path) -> None:
    """Import the module INDEPENDENT without its package."""
    spec = importlib.util.spec_from_file_location(INDEPENDENT, folder / f"{INDEPENDENT.rpartition('.')[2]}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[INDEPENDENT] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


class Part:
    """A stand-in for a module of the compiler, with some of its attributes. The real module has all of them."""

    def __init__(self, name: str, **attributes: Any):
        self._name = name
        vars(self).update(attributes)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the real module."""
        return getattr(getattr(_import_compiler(), self._name), name)


class CompiledModule:
    """The type of compiled modules, of which there is none."""


class StandIn(ModuleType):
    """A module whose marks return functions unchanged, and which imports the real module for everything else."""

    @staticmethod
    def disable(fn: Any = None, recursive: bool = True, *, reason: str | None = None, wrapping: bool = True) -> Any:
        """Return the function, or a decorator that does."""
        return fn if fn is not None else _unchanged

    @staticmethod
    def allow_in_graph(fn: Any) -> Any:
        """Return the function."""
        return fn

    assume_constant_result = allow_in_graph
    trace_rules = Part("trace_rules", clear_lru_cache=lambda: None)  # for init_process_group
    eval_frame = Part("eval_frame", OptimizedModule=CompiledModule)  # for save_pretrained

    @staticmethod
    def graph_break(msg: str = "") -> None:
        """Do nothing."""

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the real module. Its submodules are found in the same way, with `__path__`."""
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        return getattr(_import_compiler(), name)


def _import_compiler() -> ModuleType:
    """Import the real module in place of the stand-in."""
    import torch

    if isinstance(sys.modules.get(COMPILER), StandIn):
        del sys.modules[COMPILER], torch._dynamo
    return importlib.import_module(COMPILER)


def _unchanged(function: Any) -> Any:
    return function
