"""Corpus of the checks of benchmarks/gpu.py: documents and pairs of 200 to 4,096 tokens in a large vocabulary.

python benchmarks/gpu_corpus.py FOLDER --records 4000 --words 128000 --longest 4096
"""

import argparse
import json
import math
import random
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

SPECIALS = {"pad": "<pad>", "unk": "<unk>", "bos": "<s>", "eos": "</s>", "sep": "<sep>"}
SHORTEST = 200
"""Tokens of the shortest record, or a twentieth of the positions of a row if that is fewer."""


def main() -> None:
    """Write tokenizer.json and records.jsonl into the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=int, required=True)
    parser.add_argument("--words", type=int, required=True, help="number of words in the vocabulary")
    parser.add_argument("--longest", type=int, required=True, help="number of positions of a row")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(arguments.folder / "tokenizer.json", arguments.words)
    with open(arguments.folder / "records.jsonl", "w") as file:
        for number in range(arguments.records):
            file.write(json.dumps(record(number, arguments.words, arguments.longest)) + "\n")


def write_tokenizer(path: Path, words: int) -> None:
    """Write a tokenizer with one token per word: w0, w1, and so on."""
    vocabulary = {
        token: number for number, token in enumerate([*SPECIALS.values(), *(f"w{number}" for number in range(words))])
    }
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=SPECIALS["unk"]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIALS.values()))
    tokenizer.save(str(path))


def record(number: int, words: int, longest: int) -> dict[str, str]:
    """Return a record: a document if the number is odd, else a pair of a context and every third word of the context.

    The number of tokens is log-uniform between SHORTEST and the longest text that fits in a row. Words follow
    Zipf's law, as in a natural language.
    """
    draw = random.Random(number)
    # A row holds the target of a pair twice; 8 positions are for special tokens.
    longest_text = longest - 8 if number % 2 else 3 * longest // 5 - 8
    tokens = int(math.exp(draw.uniform(math.log(min(SHORTEST, longest // 20)), math.log(longest_text))))
    drawn = [f"w{int(words ** draw.random()) - 1}" for _ in range(tokens)]
    if number % 2:
        return {"target": " ".join(drawn)}
    context = drawn[: max(3, 3 * tokens // 4)]
    return {"context": " ".join(context), "target": " ".join(context[::3])}


if __name__ == "__main__":
    main()
