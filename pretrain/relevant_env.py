"""The environment variables that should be the same on all nodes of a run, and secrets that must not be shown."""

import re
from collections.abc import Mapping

RELEVANT_NAMES = (
    "DS_ACCELERATOR",
    "DEEPSPEED_",
    "OMP_",
    "MKL_",
    "KMP_",
    "GLOO_",
    "NCCL_",
    "TORCH_",
    "PYTORCH_",
    "TORCHINDUCTOR_",
    "TRITON_",
    "CUDA_",
    "HF_",
    "TRANSFORMERS_",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "CC",
    "CXX",
    "FI_",
    "XDG_CACHE_HOME",
)
"""Variables that affect how ranks compute, connect or find files; a name that ends in `_` is a prefix."""
PER_RANK_NAMES = ("CUDA_VISIBLE_DEVICES",)
"""Variables that the launcher sets for each rank."""
OWN_NAMES = ("TRANSFORMERS_VERBOSITY",)
"""Variables that the commands set for themselves."""
SECRET_WORDS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL")
"""Words in the names of variables whose values must not be shown or sent."""


LOGIN = re.compile(r"//[^\s'\"<>]*@")
"""User and password of an address. A password may contain a slash, so this ends at the last @ of the address."""
SECRET_OPTION = re.compile(
    r"([?&;][^=&;\s]*(?:token|key|secret|password|passwd|pwd|credential)[^=&;\s]*=)[^&;\s'\"<>]+", re.IGNORECASE
)
"""A secret among the options of an address."""
HUB_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{8,}")
"""A token of the Hugging Face Hub."""


def redact(text: str, environment: Mapping[str, str]) -> str:
    """Return a text without tokens, secrets in addresses, and the values of secret environment variables."""
    for name, value in environment.items():
        if len(value) >= 4 and any(word in name.upper() for word in SECRET_WORDS):
            text = text.replace(value, "***")
    return HUB_TOKEN.sub("***", SECRET_OPTION.sub(r"\1***", LOGIN.sub("//***@", text)))


def relevant_env(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of this environment that all nodes should share, sorted by name and without secrets."""

    def is_relevant(name: str) -> bool:
        matches = any(name == entry or (entry.endswith("_") and name.startswith(entry)) for entry in RELEVANT_NAMES)
        excluded = name in PER_RANK_NAMES + OWN_NAMES or any(word in name.upper() for word in SECRET_WORDS)
        return matches and not excluded

    return {name: value for name, value in sorted(environment.items()) if is_relevant(name)}
