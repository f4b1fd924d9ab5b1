"""Measure the exact search over embeddings: queries per second on one core.

python benchmarks/search.py [--texts 10000] [--width 192] [--queries 10000]
"""

import argparse
import time

import numpy as np
import torch

from pretrain.inference.search import Index, unit


def main() -> None:
    """Search random embeddings and print the speed of the fastest of three rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--top", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    draw = np.random.default_rng(0)
    texts, queries = (
        draw.standard_normal((count, arguments.width)).astype(np.float32)
        for count in (arguments.texts, arguments.queries)
    )
    index = Index([str(number) for number in range(arguments.texts)], unit(texts))
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        index.search(queries, arguments.top)
        seconds.append(time.perf_counter() - started)
    print(f"{arguments.queries / min(seconds):,.0f} queries/s against {arguments.texts:,} texts")


if __name__ == "__main__":
    main()
