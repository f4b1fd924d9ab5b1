"""Parser of the regular expressions of NL-RX, whose syntax is described in regex_equality.py."""

from collections.abc import Callable
from typing import Any

MAX_ATOMS = 1_000
"""Maximum length of an expression, in atoms, with counted repeats written out."""
MAX_BOUND_DIGITS = 6
"""Maximum number of digits in a bound of a counted repeat."""
LAST_CODE_POINT = 0x10FFFF
"""Largest code point."""
Ranges = tuple[tuple[int, int], ...]
"""Set of characters as ranges of code points, both ends included."""
Tree = tuple[Any, ...]
"""Operator and operands of an expression."""


class MalformedError(ValueError):
    """Error for a text that is not an expression of this syntax."""


class TooComplexError(Exception):
    """Error for an expression or comparison that exceeds a limit."""


def parse(expression: str) -> Tree:
    """Return the tree of an expression. Raises MalformedError or TooComplexError."""
    return _Parser(expression).parse()


class _Parser:
    """Recursive descent parser."""

    def __init__(self, expression: str):
        self.text, self.at, self.size = expression, 0, 0

    def parse(self) -> Tree:
        tree = self._union()
        if self.at < len(self.text):
            raise MalformedError(f"{self.text[self.at]!r} at {self.at}")
        return tree

    def _union(self) -> Tree:
        return self._chain("|", "union", lambda: self._chain("&", "intersection", self._sequence))

    def _chain(self, operator: str, name: str, operand: Callable[[], Tree]) -> Tree:
        operands = [operand()]
        while self._take(operator):
            operands.append(operand())
        return operands[0] if len(operands) == 1 else (name, *operands)

    def _sequence(self) -> Tree:
        parts = []
        while self.at < len(self.text) and self.text[self.at] not in "|&)":
            parts.append(self._repeated())
        return ("sequence", *parts)

    def _repeated(self) -> Tree:
        size_before = self.size
        tree = self._negated()
        while self.at < len(self.text) and self.text[self.at] in "*+?{":
            low, high = self._parse_bounds()
            self._grow((self.size - size_before) * max(low, high or 0))
            required = [tree] * low
            if high is None:
                tree = ("sequence", *required, ("star", tree))
            else:
                optional: Tree = ("sequence",)
                for _ in range(high - low):
                    optional = ("union", ("sequence",), ("sequence", tree, optional))
                tree = ("sequence", *required, optional)
        return tree

    def _parse_bounds(self) -> tuple[int, int | None]:
        simple = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if (sign := self._next()) in simple:
            return simple[sign]
        inside = ""
        while (character := self._next()) != "}":
            inside += character
        low, comma, high = inside.partition(",")
        if not all(bound.isascii() and bound.isdigit() for bound in (low, high or "0")):
            raise MalformedError(f"{{{inside}}}")
        if max(len(low), len(high)) > MAX_BOUND_DIGITS:
            raise TooComplexError(f"{{{inside[:20]}}}")
        bounds = int(low), (int(high) if high else None) if comma else int(low)
        if bounds[1] is not None and bounds[0] > bounds[1]:
            raise MalformedError(f"{{{inside}}}")
        return bounds

    def _negated(self) -> Tree:
        return ("not", self._negated()) if self._take("~") else self._atom()

    def _atom(self) -> Tree:
        self._grow(1)
        character = self._next()
        if character == "(":
            tree = self._union()
            if not self._take(")"):
                raise MalformedError("unclosed (")
            return tree
        if character == "[":
            return ("class", self._class())
        if character == ".":
            return ("class", ((0, LAST_CODE_POINT),))
        if character == "\\":
            character = self._next()
            return ("boundary",) if character == "b" else ("class", ((ord(character), ord(character)),))
        if character in "*+?{}])":
            raise MalformedError(f"{character!r} at {self.at - 1}")
        return ("class", ((ord(character), ord(character)),))

    def _class(self) -> Ranges:
        negated, ranges = self._take("^"), []
        while not self._take("]"):
            first = self._member()
            last = first
            if self._take("-"):
                if self._take("]"):  # in [a-], the final - is a plain character
                    ranges += [(first, first), (ord("-"), ord("-"))]
                    break
                last = self._member()
            if last < first:
                raise MalformedError("reversed range")
            ranges.append((first, last))
        if not ranges:
            raise MalformedError("[]")
        return _complement(ranges) if negated else tuple(ranges)

    def _member(self) -> int:
        character = self._next()
        return ord(self._next() if character == "\\" else character)

    def _next(self) -> str:
        if self.at >= len(self.text):
            raise MalformedError("unexpected end")
        self.at += 1
        return self.text[self.at - 1]

    def _take(self, character: str) -> bool:
        is_next = self.text.startswith(character, self.at)
        self.at += is_next
        return is_next

    def _grow(self, atoms: int) -> None:
        self.size += atoms
        if self.size > MAX_ATOMS:
            raise TooComplexError


def _complement(ranges: list[tuple[int, int]]) -> Ranges:
    gaps: list[tuple[int, int]] = []
    after = 0
    for first, last in sorted(ranges):
        if first > after:
            gaps.append((after, first - 1))
        after = max(after, last + 1)
    return (*gaps, (after, LAST_CODE_POINT)) if after <= LAST_CODE_POINT else tuple(gaps)
