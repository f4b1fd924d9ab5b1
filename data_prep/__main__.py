"""`python -m data_prep CONFIG [key=value ...]`: prepare the corpus of a configuration, also under mpirun or srun; and look at it.

    python -m data_prep verify PATH         whether a prepared corpus is whole
    python -m data_prep inspect PATH [N]    some of its records, and a picture of a packed row
    python -m data_prep stats PATH          how long its views are, and how full packed rows
"""

import argparse
import shutil
import sys
from pathlib import Path

from data_prep.config import DataConfig, evaluation_tests
from data_prep.config_file import load_yaml, validate
from data_prep.console import UserError, exit_on_user_error, print_now
from data_prep.crew import Crew, Mpi
from data_prep.launched import another_process_speaks, find_mpi
from data_prep.pipeline import prepare
from data_prep.shards import read_manifest
from data_prep.tools.show import show_record
from data_prep.tools.stats import stats
from data_prep.tools.verify import verify


def main() -> None:
    tool = TOOLS.get(sys.argv[1]) if len(sys.argv) > 1 else None
    if tool is not None:
        parser = argparse.ArgumentParser(prog=f"python -m data_prep {sys.argv[1]}", description=tool.__doc__)
        parser.add_argument("path", type=Path, help="folder of a prepared corpus: data.path")
        tool(parser, sys.argv[2:])
    elif communicator := find_mpi():
        crew = Mpi(communicator)
        crew.guard(lambda: prepare_corpus(crew))
    else:
        prepare_corpus(None)


def prepare_corpus(crew: Crew | None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep", description="Turn a corpus into paired-view token shards.",
                                     epilog="python -m data_prep verify, inspect or stats PATH look at a prepared corpus.")
    parser.add_argument("config", help="YAML file of the run; its `data` section is used, and the test files of `evaluation.tasks`")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys of the YAML file")
    given = parser.parse_args()
    values = load_yaml(given.config, given.overrides)
    if "data" not in values:
        raise UserError(f"{given.config} has no `data` section")
    data = validate(DataConfig, values["data"], "data")
    prepare(data, evaluation_tests(values.get("evaluation")), crew=crew)


def run_verify(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Look at every shard: files, checksums, structure, token ids and counts. Exit code 2 where anything is wrong."""
    verify(parser.parse_args(arguments).path, print_now)


def run_inspect(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Show records with their pieces, and the packed row that the first of them stands in."""
    parser.add_argument("records", nargs="?", type=int, default=3, metavar="N", help="records shown (3)")
    parser.add_argument("--split", default="train", help="train, validation or test (train)")
    parser.add_argument("--record", type=int, default=0, metavar="I", help="number of the first one (0)")
    parser.add_argument("--layout", choices=("joint", "independent"), default="joint")
    parser.add_argument("--predictor-tokens", type=int, default=1, metavar="K", help="k (1)")
    parser.add_argument("--row-length", type=int, metavar="L", help="positions of the row (the corpus' data.sequence_length)")
    given = parser.parse_args(arguments)
    # The row is that of training, not one like it: this entry point alone looks from data_prep into pretrain.
    from pretrain.data.corpus import Corpus
    from pretrain.data.picture import picture

    corpus = Corpus(given.path, given.split)
    row_length = given.row_length or corpus.manifest["settings"]["data"]["sequence_length"]
    if given.records < 0 or given.predictor_tokens < 0 or row_length < 1:
        raise UserError("N, --predictor-tokens and --row-length cannot be negative")
    if not 0 <= given.record < len(corpus):
        raise UserError(f"--record {given.record}: {given.split} holds the records 0 to {len(corpus) - 1:,}")
    width = max(80, shutil.get_terminal_size((110, 24)).columns)
    for record in range(given.record, min(given.record + given.records, len(corpus))):
        print(show_record(corpus.tokenizer, record, corpus.by_view(record), width), end="\n\n")
    try:
        print(picture(corpus, given.record, given.layout, given.predictor_tokens, row_length, width))
    except ValueError as error:
        raise UserError(f"no picture: {error}; give another --record or --row-length") from None


def run_stats(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Lengths of the views, tokens by source, and how full rows of several lengths are."""
    path = parser.parse_args(arguments).path
    # Rows are packed as in training, see run_inspect.
    from pretrain.data.corpus import Corpus
    from pretrain.data.efficiency import efficiency

    for split in read_manifest(path)["splits"]:
        for text in stats(path, split):
            print_now(text + "\n")
        print_now("\n".join([f"{split}: how full packed rows are", *efficiency(Corpus(path, split))]) + "\n")


TOOLS = {"verify": run_verify, "inspect": run_inspect, "stats": run_stats}


if __name__ == "__main__":
    exit_on_user_error(main, silent=another_process_speaks)
