"""What the pages name in backticks and link to is there: files and folders, tests, options of commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
FOLDERS = ("benchmarks", "build_tools", "csrc", "docs", "kernels", "scripts", "sdan_fast", "tests")
FOUND = [*ROOT.iterdir(), *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*"))]
PATHS = "\n".join(f"/{p.relative_to(ROOT)}{'/' * p.is_dir()}" for p in FOUND) + "\n"
CODE = "\n".join(p.read_text(encoding="utf-8") for p in FOUND if p.suffix == ".py")
NAMED = re.compile(r"([\w./-]*\w\.(?:py|h|cpp|cuh?|csv|md)|[\w./-]+/)|(test_\w+)|(--[a-z-]+)")
# Of torch and of a build, and what typer adds; docs/adding-an-op.md adds an op of this name.
ELSEWHERE = ("include/", "lib/", "build/", "version.py", "--install-completion", "scale_shift")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    gone = [link for link in re.findall(r"\]\(([^)#\s:]+)\)", text) if not (page.parent / link).exists()]
    for span in re.findall(r"`([^`\n]+)`", text):
        for word in re.split(r"[\s,;:='\"()|]+", span):
            named = NAMED.fullmatch(word)
            if named is None or any(name in word for name in ELSEWHERE):
                continue
            path, test, option = named.groups()
            there = f"/{path}\n" in PATHS if path else test in CODE if test else f'"{option}' in CODE
            if not there:
                gone.append(word)
    assert not gone, f"{page.name} names {gone}"
