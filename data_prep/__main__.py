"""`python -m data_prep CONFIG [key=value ...]`: prepare the corpus of a configuration, also under mpirun or srun.

    python -m data_prep verify PATH         check a prepared corpus

`python -m pretrain.data` shows what is in a corpus.
"""

import argparse
import sys
from pathlib import Path

from data_prep.config import DataConfig, evaluation_tests
from data_prep.executor import Executor, MpiExecutor
from data_prep.utils.config_file import load_yaml, similar_key, unknown_key, validate
from data_prep.utils.console import UserError, exit_on_user_error, show_only_errors
from data_prep.utils.launch_env import find_mpi, is_silent_rank

MOVED_SUBCOMMANDS = ("inspect", "stats")
"""Subcommands that are now in `python -m pretrain.data`."""
READ_SECTIONS = ("data", "evaluation")
"""Sections of the configuration that are read here. Training checks the names of all sections."""


def main() -> None:
    """Run a subcommand, or prepare a corpus."""
    command = sys.argv[1] if len(sys.argv) > 1 else None
    if command in MOVED_SUBCOMMANDS:
        raise UserError(f"python -m data_prep {command} has moved: run python -m pretrain.data {command} PATH")
    if command == "verify":
        run_verify(sys.argv[2:])
    elif communicator := find_mpi():
        executor = MpiExecutor(communicator)
        if not executor.is_main:
            show_only_errors()
        executor.abort_on_error(lambda: prepare_corpus(executor))
    else:
        prepare_corpus(None)


def prepare_corpus(executor: Executor | None) -> None:
    """Parse the command line and prepare the corpus of a configuration."""
    parser = argparse.ArgumentParser(
        prog=_program(),
        description="Tokenize the records of a corpus, each with its views, and write them to shards.",
        epilog=f"{_program()} verify PATH checks a prepared corpus; python -m pretrain.data shows what is in it.",
    )
    parser.add_argument(
        "config", help="YAML file of the run; only `data` and the test files of `evaluation.tasks` are read"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="overrides of the file, with dotted keys"
    )
    arguments = parser.parse_args()
    # Overrides of model.shape change a file that only training reads.
    relevant_overrides = [override for override in arguments.overrides if not override.startswith("model.shape.")]
    values = load_yaml(arguments.config, relevant_overrides)
    for key in values:
        if key not in READ_SECTIONS and similar_key(str(key), READ_SECTIONS):
            raise UserError(unknown_key(str(key), READ_SECTIONS, arguments.config))
    if "data" not in values:
        raise UserError(f"{arguments.config} has no `data` section; add one (see docs/data.md)")
    data = validate(DataConfig, values["data"], "data")
    tests = evaluation_tests(data, values.get("evaluation"))

    # Import late: pyarrow and tokenizers load slowly, and errors in the configuration should be reported first.
    from data_prep.pipeline import prepare

    prepare(data, tests, executor=executor)


def run_verify(arguments: list[str]) -> None:
    """Check the file, checksums, structure, token ids and counts of every shard. Exit with code 2 on any fault."""
    parser = argparse.ArgumentParser(prog=f"{_program()} verify", description=run_verify.__doc__)
    parser.add_argument("path", type=Path, help="folder of a prepared corpus: data.path")
    path = parser.parse_args(arguments).path

    from data_prep.tools.verify import verify  # imported late, as in prepare_corpus

    verify(path)


def _program() -> str:
    """Return how this command was called: as a module, or as the script jepa-prepare."""
    name = Path(sys.argv[0]).name
    return "python -m data_prep" if name == "__main__.py" else name


def run() -> None:
    """Run `main`, with one line and exit code 2 for an error that the user can fix."""
    exit_on_user_error(main, silent=is_silent_rank)


if __name__ == "__main__":
    run()
