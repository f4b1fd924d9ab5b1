"""The checker of regex equality, compared with brute force over all short lines, and on pairs of NL-RX-SYNTH."""

import itertools
import json
import random
import string
from pathlib import Path

import numpy as np
import pytest

from data_prep.nlrx_grammar import generate
from pretrain.tasks import regex_equality
from pretrain.tasks.regex_equality import compare, is_nontrivial

SYNTH = Path(__file__).parents[4] / "shared" / "data" / "nl-rx-synth" / "test.jsonl"
LETTERS, LONGEST = "a1-", 6
LINES = ["".join(line) for length in range(LONGEST + 1) for line in itertools.product(LETTERS, repeat=length)]


class Brute:
    """Brute-force matching by definition: whether substring [i, j) of each line matches a tree, (lines, i, j) bool."""

    def __init__(self, lines: list[str]):
        self.size = max(map(len, lines)) + 1
        self.codes = np.array([[*map(ord, line), *[-1] * (self.size - len(line))] for line in lines])
        self.length = np.array(list(map(len, lines)))
        place = np.arange(self.size)
        self.substrings = (place[:, None] <= place[None]) & (place[None] <= self.length[:, None, None])
        self.empty_substrings = self.substrings & np.eye(self.size, dtype=bool)
        word = np.vectorize(lambda code: code >= 0 and chr(code).isalnum())(self.codes)
        before = np.concatenate([np.zeros((len(lines), 1), bool), word[:, :-1]], axis=1)
        end = (place == 0) | (place[None] == self.length[:, None])
        self.boundary = end | (before != word)

    def match(self, tree) -> np.ndarray:
        match tree:
            case ("set", members):
                found = np.zeros_like(self.substrings)
                found[:, np.arange(self.size - 1), np.arange(1, self.size)] = np.isin(self.codes, [*map(ord, members)])[
                    :, :-1
                ]
                return found & self.substrings
            case ("any",):
                return self.substrings & np.eye(self.size, k=1, dtype=bool)
            case ("boundary",):
                return self.empty_substrings & self.boundary[:, :, None]
            case ("not", part):
                return self.substrings & ~self.match(part)
            case ("union", one, other):
                return self.match(one) | self.match(other)
            case ("and", one, other):
                return self.match(one) & self.match(other)
            case ("then", one, other):
                return self.match(one) @ self.match(other)
            case ("repeat", part, low, high):
                once, found = self.match(part), self.empty_substrings
                for _ in range(low):
                    found = found @ once
                total = found
                for _ in range(2 * self.size if high is None else high - low):
                    found = found @ once
                    total = total | found
                return total

    def matches(self, tree) -> np.ndarray:
        """Return whether each complete line matches, (lines,) bool."""
        return self.match(tree)[np.arange(len(self.length)), 0, self.length]


def write(tree) -> str:
    """Return the expression of a tree, with brackets only around operands."""
    match tree:
        case ("set", members):
            return members if len(members) == 1 else f"[{members}]"
        case ("any",):
            return "."
        case ("boundary",):
            return r"\b"
        case ("not", part):
            return f"~({write(part)})"
        case ("union", one, other):
            return f"({write(one)})|({write(other)})"
        case ("and", one, other):
            return f"({write(one)})&({write(other)})"
        case ("then", one, other):
            return f"({write(one)})({write(other)})"
        case ("repeat", part, low, high):
            return f"({write(part)})" + {(0, None): "*", (1, None): "+", (0, 1): "?"}.get(
                (low, high), f"{{{low},{'' if high is None else high}}}"
            )


def draw(rng: random.Random, depth: int):
    if depth == 0 or rng.random() < 0.1:
        return rng.choice(
            [("set", "a"), ("set", "1"), ("set", "-"), ("set", "a1"), ("set", "1-"), ("any",), ("boundary",)]
        )
    kind = rng.choice(["not", "union", "and", "then", "then", "repeat"])
    if kind == "repeat":
        return kind, draw(rng, depth - 1), *rng.choice([(0, None), (0, None), (1, None), (0, 1), (2, None), (1, 2)])
    return kind, *(draw(rng, depth - 1) for _ in range(1 if kind == "not" else 2))


def vary(rng: random.Random, tree):
    """Return a variant of the tree that is usually equal, and otherwise nearly equal."""
    return rng.choice(
        [
            ("not", ("not", tree)),
            ("union", tree, tree),
            ("and", tree, ("repeat", ("any",), 0, None)),
            ("repeat", ("repeat", tree, 0, None), 0, None),
            ("union", tree, ("then", tree, ("set", "a"))),
            ("not", ("and", ("not", tree), ("not", ("set", "1")))),
        ]
    )


@pytest.mark.parametrize("pairs", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_the_checker_agrees_with_brute_force_on_random_pairs(pairs):
    rng, brute, equal = random.Random(1), Brute(LINES), 0
    for number in range(pairs):
        one = draw(rng, 3)
        other = vary(rng, one) if number % 2 else draw(rng, 3)
        found = compare(write(one), write(other))
        assert found.equal is not None, (write(one), write(other))
        if found.equal:
            differing = brute.matches(one) != brute.matches(other)
            assert not differing.any(), (write(one), write(other), LINES[differing.argmax()])
            equal += 1
        else:
            line = Brute([found.witness])
            assert line.matches(one) != line.matches(other), (write(one), write(other), found.witness)
    assert 0.15 < equal / pairs < 0.85


@pytest.fixture
def machines(monkeypatch):
    """Return the list of machines that the comparisons of a test create; each counts its work."""
    made = []

    class RecordedMachine(regex_equality._Machine):
        def __post_init__(self):
            made.append(self)
            super().__post_init__()

    monkeypatch.setattr(regex_equality, "_Machine", RecordedMachine)
    return made


def test_operators_have_the_precedence_of_nl_rx():
    assert compare(r"\b(a)&(b)\b", r"(\ba)&(b\b)").equal
    assert compare("~(a)b", "(~(a))b").equal and compare("~(a)*", "(~(a))*").equal
    assert compare("ab|c&d*", "(ab)|((c)&(d*))").equal
    assert compare("[^a-c]", "~([abc])&.").equal and compare(r"\.", "[.]").equal and compare(r"\*", ".").equal is False


def test_a_malformed_expression_equals_nothing():
    for malformed in ("(a", "a)", "a{", "a{2", "a{x}", "a{3,2}", "[", "[]", "[b-a]", "*", "a|*", "~", "a\\", "]"):
        assert compare(malformed, malformed).equal is False, malformed
        assert is_nontrivial(malformed) is False


def test_exploding_expressions_are_undecided_within_bounded_work(machines):
    for expression in (
        "(a|b)*a" + "(a|b)" * 60,
        "a{999999}",
        "(" * 5000 + "a" + ")" * 5000,
        "((a{30}){30}){30}",
        "a{" + "9" * 5000 + "}",
        "~((a|b)*a(a|b){40})&~((b|a)*b.{40})",
    ):
        assert compare(expression, expression + "b").equal is not True
    assert compare("(a|b)*a(a|b){25}", "(b|a)*a(b|a){25}b?").equal is not True
    for letters in (string.ascii_lowercase[:16], string.ascii_letters):
        # An expression that requires all letters, in any order, has a state for each set of letters.
        all_letters = "&".join(f"(.*{letter}.*)" for letter in letters)
        assert compare(all_letters, all_letters.replace("a", "!")).equal is None
    assert machines and all(machine.work <= 1.01 * regex_equality.MAX_OPERATIONS for machine in machines)
    assert all(len(machine.nodes) <= regex_equality.MAX_NODES for machine in machines)


def test_proper_targets():
    assert (
        is_nontrivial("(dog).*")
        and is_nontrivial(".*") is False
        and is_nontrivial("(a)&(b)") is False
        and is_nontrivial("~(.*)|.*") is False
    )


def test_pairs_of_the_grammar_are_decided_with_little_work(machines):
    rng = random.Random(2)
    targets = [generate(0, "test", index)[1] for index in range(400)]
    check_pairs(
        [(target, rng.choice(targets)) for target in targets] + [(target, f"({target})") for target in targets],
        machines,
    )


def test_pairs_of_nl_rx_synth_are_decided_with_little_work(machines):
    if not SYNTH.exists():
        pytest.skip(f"{SYNTH} is missing")
    rng = random.Random(3)
    targets = [json.loads(line)["messages"][-1]["content"] for line in SYNTH.read_text().splitlines()]
    check_pairs([(target, rng.choice(targets)) for target in targets], machines)


def check_pairs(pairs: list[tuple[str, str]], machines: list) -> None:
    assert not [pair for pair in pairs if compare(*pair).equal is None]
    assert max(machine.work for machine in machines) < regex_equality.MAX_OPERATIONS / 40
