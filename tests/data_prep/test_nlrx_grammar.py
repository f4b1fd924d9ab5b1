"""The NL-RX grammar, compared with the published pairs, and the generator.

The parser below is an independent implementation of the grammar's table. It finds every tree that could have produced
a regex, and shares no code with the rules of the module.
"""

import collections
import functools
import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.nlrx_grammar import (
    CLASSES,
    SPLITS,
    TERMINALS,
    Tree,
    depth,
    description,
    forms,
    generate,
    regex,
    split_of,
    walk,
    within_limits,
)
from data_prep.nlrx_published import ROOT_COUNTS

REPO_ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = REPO_ROOT.parent / "shared" / "data" / "nl-rx-synth"
ROWS = 6000
"""Number of generated rows of each split that are checked."""


# The parser returns every tree that could have produced a regex.


def closing_brackets(text: str) -> dict[int, int] | None:
    """Return the position of the closing bracket of each opening bracket, or None if the brackets do not match."""
    opened, closing = [], {}
    for position, character in enumerate(text):
        if character == "(":
            opened.append(position)
        elif character == ")":
            if not opened:
                return None
            closing[opened.pop()] = position
    return None if opened else closing


def split_top_level(text: str) -> list[str]:
    """Split ``(a)&(b)&(c)`` into [a, &, b, &, c]: the top-level groups, and the text between and after them."""
    closing = closing_brackets(text)
    parts = []
    start = 0
    while start < len(text):
        if text[start] == "(":
            parts.append(text[start + 1 : closing[start]])
            start = closing[start] + 1
        else:
            end = text.find("(", start)
            end = len(text) if end < 0 else end
            parts.append(text[start:end])
            start = end
    return parts


@functools.cache
def parse(text: str) -> tuple[Tree, ...]:
    if text in TERMINALS:
        leaf = Tree("terminal", (), text)
        return leaf, Tree("only", (leaf,))
    if not text or closing_brackets(text) is None:
        return ()
    return tuple(itertools.chain(parse_unbracketed(text), parse_bracketed(text) if text[0] == "(" else ()))


def build_trees(rule: str, *arguments: str, value: str = ""):
    for children in itertools.product(*map(parse, arguments)):
        yield Tree(rule, children, value)


def parse_unbracketed(text: str):
    if text.startswith(".*") and text.endswith(".*"):
        yield from build_trees("containing", text[2:-2])
    if text.startswith("\\b") and text.endswith("\\b"):
        yield from build_trees("words", text[2:-2])
    if text.startswith("~(") and text.endswith(")") and closing_brackets(text)[1] == len(text) - 1:
        yield from build_trees("not", text[2:-1])
    for first, second in itertools.permutations(TERMINALS, 2):
        if text == f"{first}.*{second}.*":
            yield Tree("followed", (Tree("terminal", (), first), Tree("terminal", (), second)))


def parse_bracketed(text: str):
    match split_top_level(text):
        case [".*", inner] if text.endswith(")"):
            yield from build_trees("ending", inner)
        case [inner, ".*"] if text.endswith("(.*)"):
            yield from build_trees("starting", inner)
        case [inner, "+"]:
            yield from build_trees("at_least_once", inner)
        case [inner, "*"]:
            yield from build_trees("zero_or_more", inner)
        case [inner, repeat] if re.fullmatch(r"\{\d,\}", repeat):
            yield from build_trees("n_or_more", inner, value=repeat[1])
        case [first, ".*", second, ".*"]:
            yield from build_trees("before", first, second)
        case [first, "&", second]:
            yield from build_trees("and", first, second)
        case [first, "|", second]:
            yield from build_trees("or", first, second)
        case [first, "&", second, "&", third]:
            yield from build_trees("and3", first, second, third)
        case [first, "|", second, "|", third]:
            yield from build_trees("or3", first, second, third)


def derivations(english: str, target: str) -> list[Tree]:
    return [tree for tree in parse(target) if description(tree) == english]


def form_of(tree: Tree) -> Tree:
    if tree.rule == "terminal":
        return Tree("terminal", (), "%s")
    return Tree(tree.rule, tuple(map(form_of, tree.children)), "#" if tree.value else "")


@pytest.fixture(scope="module")
def published() -> list[tuple[str, str]]:
    if not PUBLISHED.is_dir():
        pytest.skip(f"the published NL-RX-SYNTH pairs are not at {PUBLISHED}")
    pairs = []
    for name in ("train", "test"):
        with open(PUBLISHED / f"{name}.jsonl", encoding="utf-8") as lines:
            for line in lines:
                content = {message["role"]: message["content"] for message in json.loads(line)["messages"]}
                pairs.append((content["user"], content["assistant"]))
    return pairs


@pytest.fixture(scope="module")
def generated() -> dict[str, list[tuple[str, str]]]:
    return {split: [generate(3, split, index) for index in range(ROWS)] for split in SPLITS}


# Comparisons with the published pairs.


def test_every_published_pair_has_one_derivation_within_the_limits(published):
    assert len(published) == 10_000
    for english, target in published:
        trees = derivations(english, target)
        assert len(trees) == 1, f"{english!r} for {target!r}: {len(trees)} trees"
        assert regex(trees[0]) == target
        assert within_limits(trees[0]), f"{english!r} for {target!r} exceeds the limits"


def test_root_counts_match_the_published_pairs(published):
    assert collections.Counter(derivations(*pair)[0].rule for pair in published) == ROOT_COUNTS


def test_every_published_form_can_be_generated(published):
    possible = {form for root in ROOT_COUNTS for form, _ in forms(root)}
    assert {form_of(derivations(*pair)[0]) for pair in published} <= possible


def test_generated_texts_are_as_long_as_published_ones(published, generated):
    """Allow 2%, a few standard errors, for the mean characters of descriptions and of regexes."""
    for rows in generated.values():
        for side in (0, 1):
            expected = sum(len(pair[side]) for pair in published) / len(published)
            assert sum(len(row[side]) for row in rows) / len(rows) == pytest.approx(expected, rel=0.02)


# Tests of the generator.


def test_every_generated_pair_is_in_the_grammar_and_within_the_limits(generated):
    for english, target in itertools.chain(*generated.values()):
        trees = derivations(english, target)
        assert trees, f"no tree produces both {english!r} and {target!r}"
        assert any(map(within_limits, trees)), f"{english!r} for {target!r} exceeds the limits"
        words = [node.value for node in walk(trees[0]) if node.rule == "terminal" and node.value not in CLASSES]
        assert words == ["dog", "truck", "ring", "lake"][: len(words)]


def test_splits_are_disjoint_by_target_and_do_not_depend_on_the_seed(generated):
    targets = {split: {target for _, target in rows} for split, rows in generated.items()}
    for first, second in itertools.combinations(SPLITS, 2):
        assert not targets[first] & targets[second]
    for split in SPLITS:
        assert {split_of(generate(seed, split, 0)[1]) for seed in range(200)} == {split}


def test_each_split_has_its_fraction_of_the_targets():
    counts = collections.Counter(split_of(f"(dog){{{count},}}") for count in range(20_000))
    for split, fraction in zip(SPLITS, (0.7, 0.1, 0.1, 0.1), strict=True):
        assert counts[split] / 20_000 == pytest.approx(fraction, abs=0.015)


def test_root_frequencies_match_the_published_pairs_in_every_split(generated):
    """Allow 4.5 standard errors of a binomial count: with 52 comparisons, one run in 3,000 fails by chance."""
    total = sum(ROOT_COUNTS.values())
    for split, rows in generated.items():
        counts = collections.Counter(derivations(*row)[0].rule for row in rows)
        assert set(counts) <= set(ROOT_COUNTS)
        for root, published_count in ROOT_COUNTS.items():
            expected = len(rows) * published_count / total
            error = (expected * (1 - published_count / total)) ** 0.5
            assert abs(counts[root] - expected) <= 4.5 * error, f"{root} in {split}: {counts[root]}, not {expected}"


def test_every_split_has_targets_for_every_root():
    for root in ROOT_COUNTS:
        small = [form for form, _ in forms(root) if depth(form) < 3 and regex(form).count("%s") < 3]
        targets = {
            regex(form).replace("#", "2") % literals
            for form in small
            for literals in itertools.permutations([*CLASSES, "dog"], regex(form).count("%s"))
        }
        assert {split_of(target) for target in targets} == set(SPLITS), root


def test_rows_do_not_depend_on_the_order_or_range_of_requests(generated):
    order = list(range(300))
    random.Random(0).shuffle(order)
    for split in SPLITS:
        shuffled = {index: generate(3, split, index) for index in order}
        assert [shuffled[index] for index in range(300)] == generated[split][:300]
        assert [generate(3, split, index) for index in range(120, 180)] == generated[split][120:180]


def test_seeds_and_splits_give_different_rows():
    rows = {(seed, split): tuple(generate(seed, split, i) for i in range(50)) for seed in (0, 1) for split in SPLITS}
    assert len(set(rows.values())) == len(rows)


def test_rows_are_the_same_in_processes_with_different_hash_seeds():
    program = (
        "from data_prep.nlrx_grammar import SPLITS, generate\n"
        "print([generate(11, split, i) for split in SPLITS for i in (0, 1, 2**40, 7)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=REPO_ROOT,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("0", "1", "4321")
    }
    expected = [generate(11, split, index) for split in SPLITS for index in (0, 1, 2**40, 7)]
    assert outputs == {f"{expected}\n"}


def test_rows_are_pinned():
    """Pin the rows: only the seed identifies a corpus, so a change would alter every recorded run."""
    assert [generate(0, split, 0) for split in SPLITS] == [
        ("lines with a vowel or not a capital letter, 3 or more times", "(([AEIOUaeiou])|(~([A-Z]))){3,}"),
        ("lines not having the string 'dog' or the string 'truck' at least once", "(~(dog))|((truck)+)"),
        ("lines with a letter, 3 or more times before the string 'dog'", "(([A-Za-z]){3,}).*(dog).*"),
        (
            "lines starting with a vowel or the string 'dog' followed by the string 'truck'",
            "(([AEIOUaeiou])|(dog.*truck.*))(.*)",
        ),
    ]


def test_an_unknown_split_is_an_error_that_names_the_splits():
    with pytest.raises(ValueError, match=r"'dev'.*train, validation, test, finetune"):
        generate(0, "dev", 0)


# Descriptions and regexes of single trees.


def leaf(literal: str) -> Tree:
    return Tree("terminal", (), literal)


@pytest.mark.parametrize(
    ("tree", "english", "target"),
    [
        (Tree("not", (leaf("dog"),)), "lines not having the string 'dog'", "~(dog)"),
        (Tree("words", (Tree("not", (leaf("."),)),)), "lines with words that don't have a character", r"\b~(.)\b"),
        (Tree("words", (Tree("not", (leaf("dog"),)),)), "lines with words that don't the string 'dog'", r"\b~(dog)\b"),
        (Tree("containing", (Tree("not", (leaf("[0-9]"),)),)), "lines not containing a number", ".*~([0-9]).*"),
        (
            Tree("not", (Tree("and", (leaf("dog"), leaf("truck"))),)),
            "lines not having the string 'dog' and not the string 'truck'",
            "~((dog)&(truck))",
        ),
        (
            Tree("before", (Tree("or3", (leaf("dog"), leaf("."), leaf("[a-z]"))), leaf("[A-Z]"))),
            "lines having either the string 'dog', a character, or a lower-case letter before a capital letter",
            "((dog)|(.)|([a-z])).*([A-Z]).*",
        ),
    ],
)
def test_descriptions_and_regexes_of_trees(tree, english, target):
    assert (description(tree), regex(tree)) == (english, target)


def test_trees_beyond_the_limits_are_rejected():
    twice = Tree("containing", (Tree("ending", (Tree("containing", (leaf("dog"),)),)),))
    modifiers = Tree("zero_or_more", (Tree("at_least_once", (leaf("dog"),)),))
    same_class = Tree("before", (leaf("."), leaf(".")))
    deep = Tree("not", (Tree("containing", (Tree("ending", (Tree("words", (leaf("dog"),)),)),)),))
    for tree in (leaf("dog"), twice, modifiers, same_class, deep):
        assert not within_limits(tree), description(tree)
    assert within_limits(Tree("before", (leaf("dog"), leaf("truck"))))
