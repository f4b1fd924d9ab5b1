"""The NL-RX grammar: trees that yield a description and its regular expression, and a generator of such pairs.

The language is that of NL-RX-SYNTH (Locascio et al., "Neural Generation of Regular Expressions from Natural
Language with Minimal Domain Knowledge", EMNLP 2016): every rule of a synchronous grammar writes a
piece of a regular expression and the piece of English that describes it. ``regex`` and ``description`` read a
tree; each of the 10,000 published pairs is what both say of exactly one tree.

``generate`` imitates the published sample, which turned out to have a plain structure: most targets of at most two
rules are in it, and nearly every form of three rules (a tree without its literals) a few times. So a tree is drawn
as root, then form, then literals.

Matched to the published pairs: the shares of the roots (in every split, but for chance); below each root the shares of
its forms of one and two rules, and of all its forms of three; the number of literal words, given the number of
literals. The forms of three rules are equally likely but for a factor that falls with the number of literals. All
1,052 published forms can be drawn, and 55 more that were only missed by chance.

Not matched: published pairs were drawn almost without replacement, while a row here depends on its index alone and
may repeat another; nor are the shares of single rules inside the forms of three. Over 10,000 rows, published against
generated (seed 0): 9,648 distinct targets against 7,156 (train) and 3,400 (a split of 10%); mean characters of a
description 66.7 against 66.6, of a regex 26.0 against 26.0; a rule below the root is in at most 2 rows of 100 more
or less than published (followed: 16.1% against 14.2%).

The language is finite: 381,723 targets can be drawn, and the 9,988 of them with at most two rules make
58% of the rows. Splits are disjoint as strings; two splits may hold different spellings of one regular language.
"""

import functools
import hashlib
import itertools
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

SPLITS = ("train", "validation", "test", "finetune")

# Limits of the published sample. Depth is the number of rules on the longest path from the root to a literal, size
# the number of nodes below the root; a modifier is a repetition, and And3 and Or3 count as And and Or.
MAX_DEPTH = 3
MAX_RULES = 3
MAX_SIZE = 7
MAX_AND_OR = 2
MAX_MODIFIERS = 1

CLASSES = {
    "[0-9]": "a number",
    "[A-Z]": "a capital letter",
    "[a-z]": "a lower-case letter",
    "[A-Za-z]": "a letter",
    "[AEIOUaeiou]": "a vowel",
    ".": "a character",
}
WORDS = ("dog", "truck", "ring", "lake")
REPEATS = ("2", "3", "4", "5", "6", "7")  # N of "N or more times"
TERMINALS = CLASSES | {word: f"the string '{word}'" for word in WORDS}


class Tree(NamedTuple):
    """A derivation: a rule, its arguments, and the literal (rule "terminal") or N (rule "n_or_more") it writes."""

    rule: str
    children: tuple["Tree", ...] = ()
    value: str = ""


class Rule(NamedTuple):
    """What a rule writes around its arguments; ``negated`` is the text below a Not where that differs."""

    arity: int
    regex: str
    text: str
    negated: str = ""


RULES = {
    "containing": Rule(1, ".*%s.*", "containing %s"),
    "only": Rule(1, "%s", "containing only %s"),
    "starting": Rule(1, "(%s)(.*)", "starting with %s"),
    "ending": Rule(1, "(.*)(%s)", "ending with %s"),
    "words": Rule(1, r"\b%s\b", "words with %s"),
    "followed": Rule(2, "%s.*%s.*", "%s followed by %s"),
    "at_least_once": Rule(1, "(%s)+", "%s at least once"),
    "zero_or_more": Rule(1, "(%s)*", "%s, zero or more times"),
    "n_or_more": Rule(1, "(%s){%s,}", "%s, %s or more times"),
    "or": Rule(2, "(%s)|(%s)", "%s or %s"),
    "and": Rule(2, "(%s)&(%s)", "%s and %s", "%s and not %s"),
    "not": Rule(1, "~(%s)", "not %s"),
    "before": Rule(2, "(%s).*(%s).*", "%s before %s"),
    "and3": Rule(3, "(%s)&(%s)&(%s)", "having %s, %s, and %s", "%s, not %s, and not %s"),
    "or3": Rule(3, "(%s)|(%s)|(%s)", "having either %s, %s, or %s", "%s, %s, or %s"),
}
MODIFIERS = ("at_least_once", "zero_or_more", "n_or_more")
AND_OR = ("and", "or", "and3", "or3")
_TERMINALS_ONLY = ("only", "followed", "and3", "or3")
_NO_CONNECTIVES = ("starting", "ending", *MODIFIERS)


class Published(NamedTuple):
    """Counts in NL-RX-SYNTH of the trees with one root: of one rule, of two (an argument each), and of three."""

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
ROOT_COUNTS = {root: p.one + sum(sum(two.values()) for two in p.two) + p.three for root, p in PUBLISHED.items()}

# Published occurrences of a form of three rules, in hundredths, by its number of literals.
_PER_FORM = {1: 414, 2: 466, 3: 428, 4: 215, 5: 129}
# Per mille of the published trees with 0, 1, ... literal words, by number of literals: at most two rules, and three.
_WORDS_SMALL = {1: (857, 143), 2: (676, 299, 25), 3: (403, 490, 102, 5), 4: (73, 395, 430, 98, 4)}
_WORDS_THREE = {
    1: (757, 243),
    2: (374, 509, 117),
    3: (145, 446, 344, 65),
    4: (60, 266, 419, 225, 30),
    5: (30, 180, 380, 300, 110),
}  # five literals: smoothed, only 18 published

# Readings that the published sample leaves out.
_AVOIDED = (
    "starting with containing",
    "starting with ending",
    "containing starting",
    "ending with starting",
    "before starting",
)


def regex(tree: Tree) -> str:
    """The regular expression of a tree, in the notation of NL-RX (``&`` and, ``~`` not)."""
    if tree.rule == "terminal":
        return tree.value
    parts = tuple(map(regex, tree.children))
    return RULES[tree.rule].regex % (parts + (tree.value,) if tree.value else parts)


def description(tree: Tree) -> str:
    """The English of a tree, with the fix-ups of NL-RX that turn the rules' texts into one reading.

    Raises ``KeyError`` for a literal that is not in ``TERMINALS``.
    """
    text = _text(tree, negated=False)
    leads_with_three = text.startswith("having ")
    text = text.replace("having ", "")
    text = text.replace("containing not ", "not containing ").replace("words with containing ", "words that contain ")
    if leads_with_three:
        text = "having " + text
    elif text.startswith(("not a ", "not the ")):
        text = "not having " + text.removeprefix("not ")
    elif text.startswith("words with not "):
        text = "with words that don't " + text.removeprefix("words with not ")
        text = text.replace("don't a ", "don't have a ")
    elif text.startswith(("a ", "the ", "words ")):
        text = "with " + text
    return "lines " + text


def _text(tree: Tree, negated: bool) -> str:
    if tree.rule == "terminal":
        return TERMINALS[tree.value]
    rule = RULES[tree.rule]
    below = negated or tree.rule == "not"
    parts = tuple(_text(child, below) for child in tree.children)
    form = rule.negated if negated and rule.negated else rule.text
    return form % (parts + (tree.value,) if tree.value else parts)


def walk(tree: Tree) -> Iterator[Tree]:
    """The nodes of a tree, each before its arguments, left to right."""
    yield tree
    for child in tree.children:
        yield from walk(child)


def depth(tree: Tree) -> int:
    """Rules on the longest path from the root to a literal; a literal alone has depth 0."""
    return 0 if tree.rule == "terminal" else 1 + max(map(depth, tree.children))


def within_limits(tree: Tree) -> bool:
    """Whether a tree keeps the default limits: those on its size, and no rule or class of characters twice."""
    nodes = list(walk(tree))
    rules = [node.rule for node in nodes if node.rule != "terminal"]
    classes = [node.value for node in nodes if node.value in CLASSES]
    return (
        1 <= depth(tree) <= MAX_DEPTH
        and len(rules) <= MAX_RULES
        and len(nodes) - 1 <= MAX_SIZE
        and sum(rule in AND_OR for rule in rules) <= MAX_AND_OR
        and sum(rule in MODIFIERS for rule in rules) <= MAX_MODIFIERS
        and len(set(rules)) == len(rules)
        and len(set(classes)) == len(classes)
    )


def takes(rule: str, argument: str) -> bool:
    """Whether ``rule`` takes ``argument``, a rule's name or "terminal", as an argument."""
    if rule in _TERMINALS_ONLY:
        return argument == "terminal"
    if rule in _NO_CONNECTIVES:
        return argument not in ("not", "before", "and", "and3", "or3")
    if rule in ("and", "or"):
        return argument != "words"
    return rule != "words" or argument != "terminal"


# A form is a tree with "%s" for every literal and "#" for N, so that its regex is a template of its targets.
_LEAF = Tree("terminal", (), "%s")
_SCALE = 1000  # of a published tree, so that weights are whole numbers


@functools.cache
def forms(root: str) -> tuple[tuple[Tree, int], ...]:
    """The forms that ``generate`` draws below ``root``, with their weights (whole numbers, relative to the root).

    A form is a tree whose literals are "%s" and whose N is "#".
    """
    published = PUBLISHED[root]
    occurring = [form for form in _forms(root, MAX_RULES) if within_limits(form) and _occurs(form)]
    per_three = sum(_PER_FORM[_literals(form)] for form in occurring if _rules(form) == 3)
    weighted = []
    for form in occurring:
        if _rules(form) == 1:
            weight = published.one * _SCALE
        elif _rules(form) == 2:
            position, child = next((i, c) for i, c in enumerate(form.children) if c.rule != "terminal")
            weight = published.two[position].get(child.rule, 0) * _SCALE
        else:
            weight = published.three * _SCALE * _PER_FORM[_literals(form)] // per_three
        if weight:
            weighted.append((form, weight))
    return tuple(weighted)


def _rules(tree: Tree) -> int:
    return sum(node.rule != "terminal" for node in walk(tree))


def _literals(tree: Tree) -> int:
    return sum(node.rule == "terminal" for node in walk(tree))


def _forms(rule: str, budget: int) -> Iterator[Tree]:
    """Every form with ``rule`` at the root and at most ``budget`` rules in all."""
    if budget > 0:
        for arguments in _argument_forms(rule, RULES[rule].arity, budget - 1):
            yield Tree(rule, arguments, "#" if rule == "n_or_more" else "")


def _argument_forms(rule: str, arity: int, budget: int) -> Iterator[tuple[Tree, ...]]:
    if arity == 0:
        yield ()
        return
    leaves = [_LEAF] if takes(rule, "terminal") else []
    subtrees = (form for child in RULES if takes(rule, child) for form in _forms(child, budget))
    for first in itertools.chain(leaves, subtrees):
        for rest in _argument_forms(rule, arity - 1, budget - _rules(first)):
            yield (first, *rest)


def _occurs(form: Tree) -> bool:
    """Whether the published sample has such forms: what it leaves out beyond the limits, read off the data."""
    first_last = form.children[0].rule, form.children[-1].rule
    if form.rule in ("and", "or") and ("terminal" in first_last or first_last[0] in AND_OR):
        return False
    if form.rule == "before":
        if first_last[0] in ("and3", "or3") and first_last[1] != "terminal":
            return False
        if any(child.rule in ("and", "or") and _rules(child) > 1 for child in form.children):
            return False
    # Elsewhere Only is the third rule on its path: right below the root, its regex would repeat that of a shorter tree.
    if form.rule != "not" and any(child.rule == "only" for child in form.children):
        return False
    sample = description(_fill(form, iter(["."] * _literals(form)), "2"))
    return not any(reading in sample for reading in _AVOIDED)


def _fill(form: Tree, literals: Iterator[str], repeats: str) -> Tree:
    if form.rule == "terminal":
        return Tree("terminal", (), next(literals))
    children = tuple(_fill(child, literals, repeats) for child in form.children)
    return Tree(form.rule, children, repeats if form.value else "")


class _Digits:
    """Draws from one hash as the digits of a 512-bit number in mixed radix: the same on every platform."""

    def __init__(self, key: str):
        self.value = int.from_bytes(hashlib.blake2b(key.encode()).digest(), "big")

    def below(self, count: int) -> int:
        self.value, digit = divmod(self.value, count)
        return digit

    def weighted(self, cumulative: tuple[int, ...]) -> int:
        return bisect_right(cumulative, self.below(cumulative[-1]))

    def sample(self, items: list[str], count: int) -> list[str]:
        """``count`` of the items, in a random order."""
        items = items.copy()
        return [items.pop(self.below(len(items))) for _ in range(count)]


class _Template(NamedTuple):
    """A form ready to be filled: its regex with "%s" and "#", and cumulative weights of its number of words."""

    form: Tree
    regex: str
    literals: int
    words: tuple[int, ...]


@functools.cache
def _templates(root: str) -> tuple[tuple[_Template, ...], tuple[int, ...]]:
    templates, weights = [], []
    for form, weight in forms(root):
        literals = _literals(form)
        words = (_WORDS_THREE if _rules(form) == 3 else _WORDS_SMALL)[literals]
        templates.append(_Template(form, regex(form), literals, tuple(itertools.accumulate(words))))
        weights.append(weight)
    return tuple(templates), tuple(itertools.accumulate(weights))


_ROOTS = tuple(ROOT_COUNTS)
_ROOTS_CUMULATIVE = tuple(itertools.accumulate(ROOT_COUNTS.values()))


_CLASSES = list(CLASSES)


def _draw_literals(digits: _Digits, template: _Template) -> list[str]:
    words = digits.weighted(template.words)
    literals = digits.sample(_CLASSES, template.literals - words)
    if words:
        in_order = iter(WORDS)
        literals = [literal or next(in_order) for literal in digits.sample(literals + [""] * words, template.literals)]
    return literals


def split_of(target: str) -> str:
    """The split, one of ``SPLITS``, that a regex belongs to: 70% are train, 10% each of the others.

    It depends on the string alone, so no seed moves a target from one split to another.
    """
    # Of the keys tried, this is the first that gives every split a target of the smallest root, Only, which has 7.
    key = hashlib.blake2b(f"nlrx split 10: {target}".encode(), digest_size=8).digest()
    return SPLITS[max(0, int.from_bytes(key, "big") % 10 - 6)]


def generate(seed: int, split: str, index: int) -> tuple[str, str]:
    """Row ``index`` of a split: a (description, regex) pair, the same wherever and in whatever order it is asked for.

    The root is drawn first; what is below it is drawn again until the regex belongs to the split, so that the roots
    keep their published shares in every split. Raises ``ValueError`` for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown NL-RX split {split!r}: choose one of {', '.join(SPLITS)}")
    root = _ROOTS[_Digits(f"{seed}/{split}/{index}").weighted(_ROOTS_CUMULATIVE)]
    templates, cumulative = _templates(root)
    for attempt in itertools.count():
        digits = _Digits(f"{seed}/{split}/{index}/{attempt}")
        template = templates[digits.weighted(cumulative)]
        literals = _draw_literals(digits, template)
        repeats = REPEATS[digits.below(len(REPEATS))]
        target = (template.regex % tuple(literals)).replace("#", repeats)
        if split_of(target) == split:
            return description(_fill(template.form, iter(literals), repeats)), target
    raise AssertionError("unreachable: the attempts do not end")
