"""What `make coverage` prints: how much of each package was run, and the lines that were not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from itertools import groupby
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    Files = dict[str, dict[str, Any]]
    """Of coverage's JSON: by path, `missing_lines` and a `summary`."""


def report(files: Files) -> str:
    packages: dict[str, list[str]] = defaultdict(list)
    for path in sorted(files):
        packages[package_of(path)].append(path)
    rows = [_row(package, [files[path]["summary"] for path in paths]) for package, paths in sorted(packages.items())]
    total = _row("all", [file["summary"] for file in files.values()])
    return "\n".join([*rows, total, "", *_missing(files)])


def package_of(path: str) -> str:
    """Modules at the top are one package together."""
    return ".".join(PurePath(path).parent.parts)


def _row(package: str, summaries: Iterable[dict[str, int]]) -> str:
    ran, statements = (sum(each) for each in zip(*_counts(summaries), strict=True))
    return f"{package:<30} {100 * ran / max(statements, 1):5.1f} %  {ran} of {statements} statements"


def _counts(summaries: Iterable[dict[str, int]]) -> Iterator[tuple[int, int]]:
    yield from ((summary["covered_lines"], summary["num_statements"]) for summary in summaries)


def _missing(files: Files) -> Iterator[str]:
    for path, file in sorted(files.items()):
        if file["missing_lines"]:
            yield f"{path}: {', '.join(ranges(file['missing_lines']))}"


def ranges(lines: Iterable[int]) -> Iterator[str]:
    """`3, 5-7` for 3, 5, 6 and 7."""
    for _, group in groupby(enumerate(sorted(lines)), key=lambda pair: pair[1] - pair[0]):
        first, *rest = [line for _, line in group]
        yield f"{first}-{rest[-1]}" if rest else str(first)


if __name__ == "__main__":
    command = [sys.executable, "-m", "coverage", "json", "--quiet", "-o", "-"]
    print(report(json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["files"]))
