"""Show what is in a prepared corpus.

Subcommands:

    python -m pretrain.data inspect PATH [N]    show some of its records and a picture of a packed row
    python -m pretrain.data stats PATH          show the lengths of its views and the fill rate of packed rows
"""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

from data_prep.utils.console import UserError, exit_on_user_error


def main() -> None:
    """Parse the command line and run the subcommand."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.data",
        description="Show what is in a prepared corpus.",
        epilog="To check a corpus, run python -m data_prep verify PATH.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    inspect = _add_command(commands, "inspect", run_inspect)
    inspect.add_argument(
        "records", nargs="?", type=int, default=3, metavar="N", help="number of records to show; default: 3"
    )
    inspect.add_argument("--split", default="train", help="train, validation or test; default: train")
    inspect.add_argument("--record", type=int, default=0, metavar="I", help="number of the first record; default: 0")
    inspect.add_argument(
        "--layout", choices=("joint", "independent"), default="joint", help="layout of the row; default: joint"
    )
    inspect.add_argument(
        "--predictor-tokens", type=int, default=1, metavar="K", help="predictor tokens per context; default: 1"
    )
    inspect.add_argument(
        "--row-length", type=int, metavar="L", help="positions of the row; default: data.sequence_length of the corpus"
    )
    _add_command(commands, "stats", run_stats)
    arguments = parser.parse_args()
    arguments.run(arguments)


def _add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], None],
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, description=run.__doc__, help=run.__doc__)
    parser.add_argument("path", type=Path, help="folder of a prepared corpus (its data.path)")
    parser.set_defaults(run=run)
    return parser


def run_inspect(arguments: argparse.Namespace) -> None:
    """Show records with their tokens, and the packed row that holds the first of them."""
    from data_prep.shards import read_manifest

    read_manifest(arguments.path)  # reports a missing corpus before the slow import of torch
    from data_prep.tools.show import show_record
    from pretrain.data.corpus import Corpus
    from pretrain.data.row_drawing import draw_row

    corpus = Corpus(arguments.path, arguments.split)
    row_length = arguments.row_length or corpus.manifest["settings"]["data"]["sequence_length"]
    if arguments.records < 0 or arguments.predictor_tokens < 0 or row_length < 1:
        raise UserError("N and --predictor-tokens must be 0 or more, and --row-length must be 1 or more")
    if not 0 <= arguments.record < len(corpus):
        raise UserError(
            f"--record {arguments.record}: the {arguments.split} split has the records 0 to {len(corpus) - 1:,}"
        )
    width = max(80, shutil.get_terminal_size((110, 24)).columns)
    for record in range(arguments.record, min(arguments.record + arguments.records, len(corpus))):
        print(show_record(corpus.tokenizer, record, corpus.tokens_by_view(record), width), end="\n\n")
    try:
        print(draw_row(corpus, arguments.record, arguments.layout, arguments.predictor_tokens, row_length, width))
    except ValueError as error:
        raise UserError(f"cannot draw the row: {error}; choose another --record or --row-length") from None


def run_stats(arguments: argparse.Namespace) -> None:
    """Show the lengths of the views, the tokens of each source, and the fill rate of packed rows of several lengths."""
    from data_prep.shards import read_manifest
    from data_prep.tools.stats import stats
    from pretrain.data.corpus import Corpus
    from pretrain.data.efficiency import efficiency_table

    for split in read_manifest(arguments.path)["splits"]:
        for text in stats(arguments.path, split):
            print(text + "\n")
        table = efficiency_table(Corpus(arguments.path, split))
        print("\n".join([f"{split}: how full packed rows are", *table]) + "\n")


if __name__ == "__main__":
    exit_on_user_error(main)
