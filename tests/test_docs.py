"""README and docs name files, make targets and links that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "cluster" / "README.md",
    ROOT / "shortv" / "tiny" / "README.md",
]
SOURCES = r"(?:shortv|jobs|tests|reports|cluster|docs)"
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`]+`", re.DOTALL)
FILE = re.compile(rf"(?<![\w./-]){SOURCES}/[\w./-]+\.(?:py|md|toml|yaml|json|svg|png|parquet)\b")
TARGET = re.compile(r"\bmake ([a-z][a-z-]*)")
MADE_BY_USERS = {"cluster/serve.yaml", "shortv/plans/NAME.json"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    missing = [
        link
        for link in LINK.findall(text)
        if not re.match(r"[a-z]+:|#", link) and not (page.parent / link.partition("#")[0]).exists()
    ]
    code = "\n".join(CODE.findall(text))
    missing += [name for name in FILE.findall(code) if not (ROOT / name).exists()]
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    missing += [f"make {name}" for name in TARGET.findall(code) if name not in targets]
    assert not missing


def test_headings_that_links_name_exist() -> None:
    def anchor(heading: str) -> str:
        return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")

    for page in PAGES:
        for link in LINK.findall(page.read_text()):
            path, _, name = link.partition("#")
            target = page.parent / path if path else page
            if name and target.suffix == ".md" and ":" not in path:
                lines = re.sub(r"```.*?```", "", target.read_text(), flags=re.DOTALL).splitlines()
                anchors = {anchor(line.lstrip("#").strip()) for line in lines if line.startswith("#")}
                assert name in anchors, f"{page.name} links to {link}"


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
