"""Environment variables of ranks on other nodes: forwarded by DeepSpeed's launcher, or set in `.deepspeed_env`.

Source: deepspeed/launcher/runner.py (0.19.8). The pdsh launcher forwards names that begin with one of
FORWARDED_PREFIXES. If its accelerator is CUDA, it also forwards names that begin with NCCL. Then it reads
`.deepspeed_env`, or the file that DS_ENV_FILE names, in the home folder and in the working folder. The last value of a
variable wins.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from data_prep.utils.console import UserError
from data_prep.utils.files import write_text
from pretrain.relevant_env import relevant_env

FORWARDED_PREFIXES = ("MLFLOW", "PYTHON", "MV2", "UCX")
FORWARDED_FROM_CUDA = "NCCL"


def env_files() -> list[Path]:
    """Return the existing environment files that DeepSpeed reads, in the order in which it reads them."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    paths = dict.fromkeys([Path.home() / name, Path(name)])
    return [path for path in paths if path.is_file()]


def invalid_lines(path: Path) -> list[str]:
    """Return a description of each line that DeepSpeed cannot read, and of each value that the shell would change."""
    faults = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        name, equals, value = line.partition("=")
        if not equals:
            faults.append(f"line {number}: {line!r} has no =")
        elif not re.fullmatch(r"\s*[A-Za-z_]\w*\s*", name):
            faults.append(f"line {number}: {name!r} is not a variable name")
        elif not _is_forwardable(value):
            faults.append(f'line {number}: the shell would change the value of {name.strip()} (", $, ` or \\)')
    return faults


def read_env_files() -> dict[str, str]:
    """Return the variables of all environment files, without the lines that cannot be read."""
    values: dict[str, str] = {}
    for path in env_files():
        values |= _read(path)
    return values


def forwarded_variables(environment: Mapping[str, str], cuda: bool) -> dict[str, str]:
    """Return the variables of this shell that the launcher forwards, except PYTHONPATH, which the agents already have.

    `cuda` means that the launcher's accelerator is CUDA.
    """
    prefixes = (*FORWARDED_PREFIXES, *([FORWARDED_FROM_CUDA] if cuda else []))
    return {name: value for name, value in environment.items() if name.startswith(prefixes) and name != "PYTHONPATH"}


def write_env_file(environment: Mapping[str, str]) -> tuple[Path, list[str]]:
    """Update the environment file of the working folder with the relevant variables of this shell.

    Returns the path of the file and the names of the skipped variables. A variable is skipped if its value would not
    reach the nodes unchanged. Raises UserError if the file cannot be written.
    """
    path = Path(os.environ.get("DS_ENV_FILE", ".deepspeed_env"))
    local_env = relevant_env(environment)
    skipped = [name for name, value in local_env.items() if not _is_forwardable(value) or "\n" in value]
    try:
        values = (_read(path) if path.is_file() else {}) | {
            name: value for name, value in local_env.items() if name not in skipped
        }
        write_text(path, "".join(f"{name}={value}\n" for name, value in values.items()))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return path, skipped


def _read(path: Path) -> dict[str, str]:
    pairs = (line.partition("=") for line in path.read_text().splitlines())
    return {
        name.strip(): value.strip()
        for name, equals, value in pairs
        if equals and re.fullmatch(r"\s*[A-Za-z_]\w*\s*", name)
    }


def _is_forwardable(value: str) -> bool:
    """Return whether the value stays unchanged in the double quotes that DeepSpeed puts around it."""
    return not re.search(r'["$`\\]', value)
