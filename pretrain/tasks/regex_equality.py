r"""Equivalence check: whether two NL-RX regular expressions match the same lines.

Syntax, from the weakest operator to the strongest: `|`, `&` (and), concatenation, repeats `* + ? {n} {n,} {n,m}`, `~`
(not), atoms. Atoms are a character, `.`, `[..]`, `[^..]`, `(..)`, `\x` (the character x) and `\b`. `\b` matches between
a letter or digit and any other character, and always at both ends of a line. Published libraries read `&` and `~` as
plain characters or lack `\b`, so this module has its own checker.

Method: derivatives of regular expressions (Brzozowski, "Derivatives of Regular Expressions", 1964) in normal form, with
`.*` as a separate node. Characters that neither expression distinguishes form one class. Pairs of derivatives are
merged as in Hopcroft and Karp, "A linear algorithm for testing equivalence of finite automata" (1971). `\b` depends on
the class of the previous character, which is a part of the state, and on the class of the next one.
"""

from collections import deque
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pretrain.tasks.regex_parser import LAST_CODE_POINT, MalformedError, Ranges, TooComplexError, Tree, parse

MAX_STATE_PAIRS = 20_000
"""Maximum number of pairs of states to compare."""
MAX_NODES = 100_000
"""Maximum number of nodes."""
MAX_OPERATIONS = 4_000_000
"""Maximum number of operands to process, a few seconds of work. A time limit would depend on the machine."""
WORD = ((48, 57), (65, 90), (97, 122))
"""Ranges of the letters and digits."""
START, WORDLIKE, OTHER = range(3)
"""Contexts on one side of a position: an end of the line (START at both), a letter or digit, another character."""


@dataclass(frozen=True)
class Comparison:
    """Result of comparing two expressions."""

    equal: bool | None
    """Whether they match the same lines; None if undecided within the limits."""
    witness: str | None = None
    """A line that only one of them matches; None if they are equal, undecided, or one is malformed."""


def compare(first: str, second: str) -> Comparison:
    """Compare the lines that two expressions match. A malformed expression is not equal to any, not even to itself."""
    try:
        trees = [parse(expression) for expression in (first, second)]
        return _Machine(trees).compare()
    except MalformedError:
        return Comparison(False)
    except (TooComplexError, RecursionError):
        return Comparison(None)


def is_nontrivial(expression: str) -> bool | None:
    """Return whether an expression matches some lines but not all; None if undecided, False if malformed."""
    equals_trivial = [compare(expression, trivial).equal for trivial in (".*", "~(.*)")]
    if compare(expression, expression).equal is False or True in equals_trivial:
        return False
    return None if None in equals_trivial else True


def _classes(tree: Tree) -> set[Ranges]:
    if tree[0] == "class":
        return {tree[1]}
    classes: set[Ranges] = set()
    return classes.union(*map(_classes, tree[1:]))


@dataclass
class _Machine:
    """Nodes in normal form for two trees.

    A node is a number, and `nodes` has its operator and its operands, which are numbers of nodes. Equal numbers mean
    equal expressions, but equal expressions may have different numbers.
    """

    trees: list[Tree]
    nodes: list[Tree] = field(default_factory=list)
    numbers: dict[Tree, int] = field(default_factory=dict)
    derivatives: dict[tuple[int, int, int], int] = field(default_factory=dict)
    work: int = 0

    def __post_init__(self) -> None:
        self.samples, self.masks = self._letters()
        self.wordlike = [any(low <= ord(sample) <= high for low, high in WORD) for sample in self.samples]
        self.nothing = self._node("class", 0)
        self.empty = self._node("sequence")
        self.all = self._node("not", self.nothing)

    def _letters(self) -> tuple[list[str], dict[Ranges, int]]:
        """Return a sample of each class of indistinguishable characters, and each character set as a mask.

        Bit i of a mask stands for the class of sample i.
        """
        sets = list(set().union(*map(_classes, self.trees)) | {WORD, ((10, 10),)})
        bounds = sorted({bound for ranges in sets for low, high in ranges for bound in (low, high + 1)} | {0})
        class_samples: dict[tuple[bool, ...], int] = {}
        for bound in bounds:
            if bound <= LAST_CODE_POINT:
                class_samples.setdefault(
                    tuple(any(low <= bound <= high for low, high in ranges) for ranges in sets), bound
                )
        newline = sets.index(((10, 10),))
        letters = [
            (kind, bound) for kind, bound in class_samples.items() if not kind[newline]
        ]  # a line contains no newline
        masks = {
            ranges: sum(1 << number for number, (kind, _) in enumerate(letters) if kind[place])
            for place, ranges in enumerate(sets)
        }
        return [chr(bound) for _, bound in letters], masks

    @cached_property
    def any(self) -> int:
        """Mask of all characters."""
        return (1 << len(self.samples)) - 1

    def _node(self, *parts: Any) -> int:
        number = self.numbers.setdefault(parts, len(self.nodes))
        if number == len(self.nodes):
            if number >= MAX_NODES:
                raise TooComplexError
            self.nodes.append(parts)
        return number

    def _spend(self, operands: int) -> None:
        self.work += operands
        if self.work > MAX_OPERATIONS:
            raise TooComplexError

    def build(self, tree: Tree) -> int:
        """Return the node of a tree."""
        name, *parts = tree
        if name == "class":
            return self._node("class", self.masks[parts[0]])
        operands = [self.build(part) for part in parts]
        match name:
            case "boundary":
                return self._node("boundary")
            case "not":
                return self.negation(operands[0])
            case "star":
                return self.star(operands[0])
            case "sequence":
                node = self.empty
                for operand in reversed(operands):
                    node = self.sequence(operand, node)
                return node
            case _:
                return self.join(name, operands)

    def negation(self, node: int) -> int:
        kind, *parts = self.nodes[node]
        return parts[0] if kind == "not" else self._node("not", node)

    def star(self, node: int) -> int:
        if node in (self.nothing, self.empty):
            return self.empty
        if node == self.all or self.nodes[node] == ("class", self.any):
            return self.all
        return node if self.nodes[node][0] == "star" else self._node("star", node)

    def sequence(self, first: int, rest: int) -> int:
        """Concatenate two nodes, nested to the right: the first part of a sequence is never a sequence."""
        if self.nothing in (first, rest):
            return self.nothing
        if first == self.empty or rest == self.empty:
            return rest if first == self.empty else first
        kind, *parts = self.nodes[first]
        if kind == "sequence":
            return self.sequence(parts[0], self.sequence(parts[1], rest))
        if first == self.all and (rest == self.all or self.nodes[rest][:2] == ("sequence", self.all)):
            return rest
        return self._node("sequence", first, rest)

    def join(self, name: str, operands: list[int]) -> int:
        """Build a union or intersection: flat, sorted, without duplicates, with its character classes merged."""
        self._spend(sum(len(self.nodes[operand]) for operand in operands))
        absorbing, neutral = (self.all, self.nothing) if name == "union" else (self.nothing, self.all)
        members: set[int] = set()
        for operand in operands:
            members.update(self.nodes[operand][1:] if self.nodes[operand][0] == name else (operand,))
        members.discard(neutral)
        classes = [node for node in members if self.nodes[node][0] == "class"]
        if len(classes) > 1:
            members.difference_update(classes)
            mask = self.nodes[classes[0]][1]
            for node in classes[1:]:
                mask = mask | self.nodes[node][1] if name == "union" else mask & self.nodes[node][1]
            members.add(self._node("class", mask))
        if absorbing in members or any(
            self.nodes[node][0] == "not" and self.nodes[node][1] in members for node in members
        ):
            return absorbing
        if len(members) < 2:
            return members.pop() if members else neutral
        return self._node(name, *sorted(members))

    def matches_empty(self, node: int, before: int, after: int) -> bool:
        """Return whether the node matches the empty text between the contexts `before` and `after`."""
        kind, *parts = self.nodes[node]
        self._spend(1)
        match kind:
            case "class":
                return False
            case "boundary":
                return START in (before, after) or before != after
            case "star":
                return True
            case "not":
                return not self.matches_empty(parts[0], before, after)
            case "union":
                return any(self.matches_empty(part, before, after) for part in parts)
            case _:  # intersection, sequence
                return all(self.matches_empty(part, before, after) for part in parts)

    def derivative(self, node: int, before: int, letter: int) -> int:
        """Return the node of the texts that may follow `letter` in a match of `node`.

        `before` is the context in front of the letter.
        """
        key = node, before, letter
        if key not in self.derivatives:
            self.derivatives[key] = self._derive(node, before, letter)
        return self.derivatives[key]

    def _derive(self, node: int, before: int, letter: int) -> int:
        kind, *parts = self.nodes[node]
        self._spend(1)
        match kind:
            case "class":
                return self.empty if parts[0] >> letter & 1 else self.nothing
            case "boundary":
                return self.nothing
            case "star":
                return self.sequence(self.derivative(parts[0], before, letter), node)
            case "not":
                return self.negation(self.derivative(parts[0], before, letter))
            case "union" | "intersection":
                return self.join(kind, [self.derivative(part, before, letter) for part in parts])
        if not parts:
            return self.nothing
        derived = self.sequence(self.derivative(parts[0], before, letter), parts[1])
        if self.matches_empty(parts[0], before, WORDLIKE if self.wordlike[letter] else OTHER):
            derived = self.join("union", [derived, self.derivative(parts[1], before, letter)])
        return derived

    def compare(self) -> Comparison:
        """Visit pairs of states that the same line reaches in both expressions, until a line distinguishes them."""
        first, second = map(self.build, self.trees)
        parents: dict[tuple[int, int], tuple[int, int]] = {}

        def representative(state: tuple[int, int]) -> tuple[int, int]:
            while (parent := parents.get(state, state)) != state:
                parents[state] = parents.get(parent, parent)
                state = parent
            return state

        waiting = deque([(first, second, START, "")])
        states = 0
        while waiting:
            one, other, before, line = waiting.popleft()
            roots = representative((one, before)), representative((other, before))
            if roots[0] == roots[1]:
                continue
            if self.matches_empty(one, before, START) != self.matches_empty(other, before, START):
                return Comparison(False, line)
            states += 1
            if states > MAX_STATE_PAIRS:
                raise TooComplexError
            parents[roots[0]] = roots[1]
            for letter, sample in enumerate(self.samples):
                waiting.append(
                    (
                        self.derivative(one, before, letter),
                        self.derivative(other, before, letter),
                        WORDLIKE if self.wordlike[letter] else OTHER,
                        line + sample,
                    )
                )
        return Comparison(True)
