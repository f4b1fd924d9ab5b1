"""Helpers that render reports and parse their tables and pages."""

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

from pretrain.report.arms import read_comparison
from pretrain.report.page import html, markdown
from pretrain.report.summary import summarize

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """The elements of a page. `open` is empty if all elements were closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.found, self.ids, self.text = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.text.append(data)


def assert_self_contained(text: str) -> Page:
    """Return the parsed page; fail unless it is complete and has no scripts, addresses or external references."""
    page = Page(text)
    assert page.open == [] and len(page.ids) == len(set(page.ids))
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.found}
    references = [
        value
        for _, attributes in page.found
        for name, value in attributes.items()
        if name.endswith(("href", "src", "srcset"))
    ]
    references += re.findall(r"url\(([^)]*)\)", text)
    assert references and all(reference.startswith("#") and reference[1:] in page.ids for reference in references)
    assert "@import" not in text and not re.search(r"https?:", re.sub(r">[^<]*<", "><", text))
    return page


def render_report(study: Path, *, page: bool = True, **choices) -> tuple[str, str]:
    """Return the Markdown and the page of a report, rendered in this process."""
    summaries = summarize(read_comparison([study], choices.get("baseline"), choices.get("metric")))
    return markdown(summaries), html(summaries) if page else ""


def parse_table(text: str) -> dict[str, dict[str, str]]:
    """Return the rows of the first Markdown table in the text, by arm."""
    lines = itertools.takewhile(
        lambda line: line.startswith("|"), itertools.dropwhile(lambda line: not line.startswith("|"), text.splitlines())
    )
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert len({len(row) for row in rows}) == 1 and set(rows[1]) == {"---"}
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
