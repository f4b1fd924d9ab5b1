"""Command line of the report."""

import argparse
import logging
from pathlib import Path

from data_prep.utils.console import UserError, exit_on_user_error
from data_prep.utils.files import write_text
from pretrain.report.arms import read_comparison
from pretrain.report.live import HOST, PORT, REFRESH_SECONDS, serve

logger = logging.getLogger(__name__)


def main() -> None:
    """Parse the command line and write the report."""
    parser = argparse.ArgumentParser(description="Compare runs; write an HTML page and a Markdown report.")
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="RUN_DIR|STUDY", help="run directories, or one study folder"
    )
    parser.add_argument(
        "--baseline",
        metavar="ARM",
        help="arm that the other arms are compared with; default: the study's baseline, or the arm with next_token",
    )
    parser.add_argument(
        "--metric",
        metavar="TASK/NAME",
        help="metric that decides the verdict, such as nl_rx/exact or validation/loss/lm; "
        "TASK/NAME:higher or TASK/NAME:lower for a metric that declares no direction",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="folder for report.html and REPORT.md; "
        "default: the run directory or study folder; for several runs, the parent folder of the first one",
    )
    parser.add_argument(
        "--live",
        nargs="?",
        type=int,
        const=PORT,
        metavar="PORT",
        help=f"serve the page at http://{HOST}:PORT instead; it refreshes itself while the runs train; default: {PORT}",
    )
    arguments = parser.parse_intermixed_args()
    exit_on_user_error(lambda: _report(arguments), messages="stderr")  # the table is the standard output


def _report(arguments: argparse.Namespace) -> None:
    if arguments.live is not None:
        _serve(arguments)
        return
    comparison = read_comparison(arguments.paths, arguments.baseline, arguments.metric)
    from pretrain.report.page import html, markdown
    from pretrain.report.summary import summarize

    first = arguments.paths[0]
    folder = arguments.output or (first if len(arguments.paths) == 1 else first.resolve().parent)
    logger.info("counting FLOPs")
    summaries = summarize(comparison)
    table, page = markdown(summaries), html(summaries)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "REPORT.md", table)
        write_text(folder / "report.html", page)
    except OSError as error:
        raise UserError(
            f"cannot write the report to {folder}: {error.strerror}; choose a different folder with --output"
        ) from None
    print(table)
    logger.info(f"report written to {folder / 'report.html'} and {folder / 'REPORT.md'}")


def _serve(arguments: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    for path in arguments.paths:
        if not path.is_dir():
            raise UserError(f"there is no folder {path}; pass run directories, or one study folder")

    def render() -> str:
        from pretrain.report.page import html  # imported late, because the address is shown first
        from pretrain.report.summary import summarize

        comparison = read_comparison(arguments.paths, arguments.baseline, arguments.metric)
        return html(summarize(comparison), REFRESH_SECONDS)

    serve(arguments.paths, render, arguments.live)
