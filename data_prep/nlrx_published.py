"""Counts of the published sample of NL-RX-SYNTH, which the generator imitates; see nlrx_grammar.py."""

from typing import NamedTuple


class Published(NamedTuple):
    """Counts of the NL-RX-SYNTH trees that have the same rule at the root, by their number of rules.

    Trees with two rules are counted for each position of the second rule, by that rule.
    """

    one: int
    two: tuple[dict[str, int], ...]
    three: int


_TWO_BEFORE = (
    {
        "containing": 20,
        "starting": 42,
        "ending": 41,
        "followed": 194,
        "at_least_once": 41,
        "zero_or_more": 41,
        "n_or_more": 247,
        "or": 195,
        "and": 190,
        "not": 21,
        "and3": 337,
        "or3": 310,
    },
    {
        "containing": 43,
        "ending": 45,
        "followed": 155,
        "at_least_once": 40,
        "zero_or_more": 40,
        "n_or_more": 183,
        "or": 156,
        "and": 152,
        "not": 43,
        "and3": 185,
        "or3": 167,
    },
)
_TWO_CONTAINING = {
    "ending": 7,
    "followed": 43,
    "at_least_once": 2,
    "zero_or_more": 2,
    "n_or_more": 24,
    "or": 44,
    "and": 42,
    "not": 3,
    "before": 22,
    "and3": 173,
    "or3": 175,
}
_TWO_STARTING = {"followed": 43, "at_least_once": 2, "zero_or_more": 3, "n_or_more": 22, "or": 42}
_TWO_ENDING = {"containing": 7, "followed": 43, "at_least_once": 4, "zero_or_more": 2, "n_or_more": 19, "or": 44}
_TWO_WORDS = {
    "containing": 7,
    "starting": 7,
    "ending": 7,
    "followed": 43,
    "at_least_once": 7,
    "zero_or_more": 7,
    "n_or_more": 42,
    "or": 45,
    "and": 44,
    "not": 7,
    "before": 41,
    "and3": 198,
    "or3": 191,
}
_TWO_NOT = {
    "containing": 4,
    "only": 8,
    "starting": 7,
    "ending": 7,
    "followed": 42,
    "at_least_once": 7,
    "zero_or_more": 7,
    "n_or_more": 42,
    "or": 42,
    "and": 42,
    "before": 20,
    "and3": 182,
    "or3": 177,
}
PUBLISHED = {
    "before": Published(41, _TWO_BEFORE, 705),
    "words": Published(0, (_TWO_WORDS,), 660),
    "not": Published(7, (_TWO_NOT,), 476),
    "containing": Published(7, (_TWO_CONTAINING,), 359),
    "n_or_more": Published(42, ({"containing": 17, "starting": 20, "ending": 22, "followed": 254, "or": 246},), 265),
    "and": Published(0, ({}, {}), 427),
    "ending": Published(7, (_TWO_ENDING,), 287),
    "or": Published(0, ({}, {}), 387),
    "starting": Published(7, (_TWO_STARTING,), 223),
    "zero_or_more": Published(7, ({"containing": 5, "starting": 4, "ending": 5, "followed": 44, "or": 43},), 208),
    "at_least_once": Published(7, ({"containing": 5, "starting": 5, "ending": 3, "followed": 41, "or": 44},), 183),
    "followed": Published(41, ({}, {}), 0),
    "only": Published(7, ({},), 0),
}
"""Counts by the rule at the root."""
ROOT_COUNTS = {root: p.one + sum(sum(two.values()) for two in p.two) + p.three for root, p in PUBLISHED.items()}
"""Number of trees by the rule at the root."""

PER_FORM = {1: 414, 2: 466, 3: 428, 4: 215, 5: 129}
"""Mean number of occurrences of a form with three rules, times 100, by its number of literals."""
WORDS_SMALL = {1: (857, 143), 2: (676, 299, 25), 3: (403, 490, 102, 5), 4: (73, 395, 430, 98, 4)}
"""Fractions of the trees with at most two rules of which 0, 1, ... literals are words, per mille, by their number of
literals."""
WORDS_THREE = {
    1: (757, 243),
    2: (374, 509, 117),
    3: (145, 446, 344, 65),
    4: (60, 266, 419, 225, 30),
    5: (30, 180, 380, 300, 110),
}
"""The same for trees with three rules. The fractions for five literals are smoothed, because they are from 18 trees."""
AVOIDED = (
    "starting with containing",
    "starting with ending",
    "containing starting",
    "ending with starting",
    "before starting",
)
"""Phrases that do not occur in the published descriptions."""
