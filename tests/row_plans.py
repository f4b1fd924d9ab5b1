"""Row plans of the loader, for tests that do not depend on its random numbers."""

import numpy as np

from data_prep.layout import Layout
from pretrain.data.corpus import Corpus
from pretrain.data.loader import Rows, draw_random_bits, plan_rows


def plan(corpus: Corpus, records: np.ndarray, layout: Layout, row_length: int, paired: np.ndarray) -> Rows:
    return plan_rows(corpus, records, layout, row_length, paired, draw_random_bits(records, 0, np.zeros_like(records)))
