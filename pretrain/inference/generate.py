"""The generation command: answers of a model to prompts."""

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_prep.config import task_source
from data_prep.utils.console import UserError, exit_on_user_error
from data_prep.utils.files import read_json
from pretrain.config import load_config
from pretrain.imports import libraries
from pretrain.inference.export_folder import JEPA, find_export
from pretrain.tasks.options import parse_source

logger = logging.getLogger(__name__)

PROMPT = "> "
"""Text in front of the input line of an interactive session."""
CUT_OFF = "cut off after {} tokens, or at the last position of the model"


def main() -> None:
    """Parse the command line and print the answers."""
    parser = argparse.ArgumentParser(
        description="Generate the answer of a model to each prompt. Without prompts, they are read from the terminal, "
        "or from the standard input, one per line."
    )
    parser.add_argument("model", type=Path, metavar="RUN|EXPORT", help="run directory, or folder of an export")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="text of the first view, such as a question")
    parser.add_argument(
        "--file", metavar="FILE", help="read the prompts from the rows of a file: JSON lines, CSV, Parquet ..."
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="longest answer, in tokens; default: 256"
    )
    parser.add_argument("--sample", action="store_true", help="draw each token instead of taking the most likely one")
    parser.add_argument("--temperature", type=float, default=1.0, help="temperature of --sample; default: 1.0")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="probability mass that --sample draws from; default: 1.0"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of --sample; default: 0")
    parser.add_argument("--json", action="store_true", help="print a JSON object per answer instead of its text")
    arguments = parser.parse_intermixed_args()
    exit_on_user_error(lambda: _generate(arguments), messages="stderr")  # the answers are the standard output


def _generate(arguments: argparse.Namespace) -> None:
    options = _options(arguments)
    if arguments.prompts and arguments.file:
        raise UserError("give prompts or --file, not both")
    export = find_export(arguments.model)
    interactive = not arguments.prompts and not arguments.file and sys.stdin.isatty()
    prompts = [] if interactive else _prompts(arguments, export)
    if not prompts and not interactive:
        raise UserError("there is no prompt: name one, or give a file with --file")

    with libraries():
        from transformers import set_seed

        from pretrain.evaluation.generate import AnswerWriter

    writer = AnswerWriter(export)
    set_seed(arguments.seed)
    if interactive:
        _converse(writer, arguments.max_new_tokens, options)
        return
    if len(prompts) == 1 and not arguments.json:
        _stream(writer, prompts[0], arguments.max_new_tokens, options)
        return
    answers = list(writer.answer(prompts, arguments.max_new_tokens, **options))
    for prompt, answer in zip(prompts, answers, strict=True):
        if not answer.fits:
            logger.warning(f"this prompt leaves no room for an answer in the positions of the model: {prompt[:80]!r}")
        if arguments.json:
            values = {"prompt": prompt, "answer": answer.text, "stopped": answer.stopped}
            print(json.dumps(values, ensure_ascii=False))
        else:
            print(answer.text)
    for count, what in (
        (sum(answer.fits and not answer.text for answer in answers), "empty"),
        (sum(answer.fits and not answer.stopped for answer in answers), CUT_OFF.format(arguments.max_new_tokens)),
    ):
        if count:
            logger.info(f"note: {count:,} of {len(answers):,} answers are {what}")


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of transformers' `generate`. Raises UserError for values out of range."""
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {arguments.max_new_tokens}; it must be at least 1")
    if not arguments.sample:
        if (arguments.temperature, arguments.top_p) != (1.0, 1.0):
            raise UserError("--temperature and --top-p have an effect with --sample only; add it")
        return {}
    if arguments.temperature <= 0:
        raise UserError(f"--temperature is {arguments.temperature}; it must be above 0")
    if not 0 < arguments.top_p <= 1:
        raise UserError(f"--top-p is {arguments.top_p}; it must be above 0 and at most 1")
    # top_k 0: transformers would otherwise draw from the 50 most likely tokens
    return {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": 0}


def _prompts(arguments: argparse.Namespace, export: Path) -> list[str]:
    """Return the prompts of the command line, of the file, or of the standard input."""
    if arguments.prompts:
        return list(arguments.prompts)
    if arguments.file:
        return read_views(arguments.file, arguments.model, export, "--file", view=0)
    return [line for line in sys.stdin.read().splitlines() if line.strip()]


def read_views(file: str, model: Path, export: Path, key: str, view: int) -> list[str]:
    """Return the texts of one view of the rows of a file or source. Raises UserError for a row without the view.

    `model` is the path that the user gave. For a run directory, a file may have the columns of its `data.sources`.
    """
    from data_prep.task_rows import read_rows

    views = tuple(read_json(export / JEPA)["views"])
    source = parse_source(file, key)
    if not file.startswith("{") and (model / "config.yaml").is_file():
        source = task_source(load_config(model / "config.yaml").data, file)
    rows = read_rows(source, views, key, allow_missing_views=True)
    for number, row in enumerate(rows, 1):
        if not row.views[view]:
            raise UserError(f"{file}: row {number} has no text for the view {views[view]}; add a column of that name")
    return [row.views[view] for row in rows]


def _converse(writer: Any, max_new_tokens: int, options: dict[str, Any]) -> None:
    """Answer the lines of the terminal until it is closed."""
    print("Type a prompt; Ctrl-D ends.", file=sys.stderr)
    for line in _lines_of_terminal():
        if line.strip():
            _stream(writer, line, max_new_tokens, options)


def _lines_of_terminal() -> Iterator[str]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lets `input` edit the line and recall earlier ones
    while True:
        try:
            yield input(PROMPT)
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return


def _stream(writer: Any, prompt: str, max_new_tokens: int, options: dict[str, Any]) -> None:
    """Print the answer to a prompt while it is generated."""
    printer = _TextPrinter(writer.tokenizer.decode, writer.tokenizer.eos_id)
    (answer,) = writer.answer([prompt], max_new_tokens, streamer=printer, **options)
    if not answer.fits:
        logger.warning("this prompt leaves no room for an answer in the positions of the model; use a shorter one")
        return
    print(answer.text[len(printer.printed) :], flush=True)
    if not answer.stopped:
        logger.info(f"note: the answer was {CUT_OFF.format(max_new_tokens)}")
    elif not answer.text:
        logger.info("note: the answer is empty")


class _TextPrinter:
    """A streamer for transformers' `generate` that prints the text of the tokens so far."""

    def __init__(self, decode: Callable[[list[int]], str], eos_id: int):
        self._decode, self._eos_id = decode, eos_id
        self._ids: list[int] = []
        self._is_prompt = True
        self.printed = ""

    def put(self, value: Any) -> None:
        """Print the new text after a token; the first value is the prompt."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._ids += [token for token in value.flatten().tolist() if token != self._eos_id]
        text = self._decode(self._ids)
        # the bytes of a character may be in several tokens: U+FFFD is printed once it can no longer change
        complete = text.rstrip("\ufffd")
        if complete.startswith(self.printed):
            print(complete[len(self.printed) :], end="", flush=True)
            self.printed = complete

    def end(self) -> None:
        """Do nothing; the caller prints the end of the answer."""
