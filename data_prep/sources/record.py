"""What a source yields."""

from typing import NamedTuple


class Record(NamedTuple):
    """One record, or why a line is none.

    `views` holds the text of each view in the order of `data.views`, empty where the record lacks one; None where
    the line is malformed, with the reason in `problem`. `position` counts within the unit; `Reader.where` turns
    it into a place that a person can look at.
    """

    views: tuple[str, ...] | None
    position: int
    problem: str = ""
