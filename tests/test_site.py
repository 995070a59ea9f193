"""The site has every page once, in the README's order, and no link that leads nowhere; its figures are the benchmark's.

`make docs` builds it strictly, in `.ci/run` as well. That tool wants a newer click than coord does, so the suite, which
also runs on the oldest versions, holds what it can without it; and that nothing is listed that is not there, which the
build shows as "none".
"""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING, Any

import pytest

import coord
import coord.console
import coord.http
import coord.testing
from tests import comparison
from tests.pages import prose
from tests.shop import ROOT

if TYPE_CHECKING:
    from pathlib import Path

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
BESIDE = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
NAV: list[dict[str, Any]] = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
LINK = re.compile(r"\]\(([^)#:\s]*)(?:#([^)]*))?\)")
CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def listed(nav: Any) -> list[str]:
    match nav:
        case str():
            return [nav]
        case dict():
            return [page for inner in nav.values() for page in listed(inner)]
        case _:
            return [page for inner in nav for page in listed(inner)]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_navigation_has_every_page_once_and_nothing_else() -> None:
    assert sorted(listed(NAV)) == [str(page.relative_to(DOCS)) for page in PAGES]


def test_the_readme_has_the_navigations_groups_in_its_order() -> None:
    read_next = (ROOT / "README.md").read_text().split("## Read next\n")[1].split("\n## ")[0]
    groups = re.split(r"^\*\*(.*)\*\*$", read_next, flags=re.MULTILINE)[1:]
    found = {
        title: [match.removeprefix("docs/") for match in re.findall(r"^- \[.*?\]\((.*?)\)", text, re.MULTILINE)]
        for title, text in zip(groups[::2], groups[1::2], strict=True)
    }
    parts = {title: listed(pages) for part in NAV for title, pages in part.items() if title != "Home"}
    one_each = re.compile(r"reference/|decisions/\d")
    assert found == {title: [page for page in pages if not one_each.match(page)] for title, pages in parts.items()}
    assert list(found) == list(parts)


@pytest.mark.parametrize("page", [*PAGES, *BESIDE], ids=lambda page: str(page.relative_to(ROOT)))
def test_no_link_leads_nowhere(page: Path) -> None:
    for target, anchor in LINK.findall(CODE.sub("", page.read_text())):
        path = (page.parent / target) if target else page
        assert path.exists(), target
        assert page in BESIDE or path.resolve().is_relative_to(DOCS), f"the site does not have {target}"
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def test_the_reference_has_every_public_name_once() -> None:
    text = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    named = re.findall(r"^::: (.*)$", text, re.MULTILINE)
    assert len(named) == len(set(named))
    for package in (coord, coord.http, coord.console, coord.testing):
        expected = {f"{package.__name__}.{name}" for name in package.__all__}
        assert expected <= set(named), expected - set(named)


def test_the_figures_of_the_comparison_are_the_round_trips() -> None:
    message = "the round trip was measured again: python -m tests.comparison --write"
    assert comparison.PAGE.read_text() == comparison.written(), message


def test_the_costs_that_sizes_are_reckoned_with_are_those_of_the_scaling_page() -> None:
    scaling = prose(DOCS / "scaling.md")
    costs = re.findall(r"(\d+\.\d+) ms", prose(DOCS / "sizing.md"))
    assert costs
    assert [cost for cost in costs if f"{cost} ms" not in scaling] == []
    for rate in re.findall(r"is (\d+) requests a second for a worker and (\d+)", prose(DOCS / "sizing.md"))[0]:
        assert f"| {rate} |" in scaling
