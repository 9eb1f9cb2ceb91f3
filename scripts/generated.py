"""Blocks of a hand-written file that a script writes: everything between two marker lines.

<!-- begin NAME: by COMMAND -->
<!-- end NAME -->
"""

from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def names(text: str) -> list[str]:
    """The blocks of a text, in order."""
    return re.findall(r"^<!-- begin ([\w .-]+): .*-->$", text, re.MULTILINE)


def block(name: str, content: str, command: str) -> str:
    """A block with its markers."""
    return f"<!-- begin {name}: by {command} -->\n\n{content.strip()}\n\n<!-- end {name} -->"


def replace(text: str, name: str, content: str, command: str) -> str:
    """The text with another content of one block.

    Raises:
        ValueError: if the text does not have the block exactly once.
    """
    pattern = re.compile(
        rf"^<!-- begin {re.escape(name)}: [^\n]*-->\n.*?^<!-- end {re.escape(name)} -->$",
        re.MULTILINE | re.DOTALL,
    )
    result, count = pattern.subn(lambda _: block(name, content, command), text)
    if count != 1:
        raise ValueError(f"the block {name!r} must be there once, and it is there {count} times")
    return result


def update(path: Path, new: str, *, check: bool, command: str) -> int:
    """Write a file, or with `check` only say how it differs; the exit status."""
    old = path.read_text(encoding="utf-8")
    if new == old:
        print(f"{path.relative_to(ROOT)} is up to date")
        return 0
    if not check:
        path.write_text(new, encoding="utf-8")
        print(f"written: {path.relative_to(ROOT)}")
        return 0
    difference = difflib.unified_diff(
        old.splitlines(), new.splitlines(), "as it is", "as it should be", n=1, lineterm=""
    )
    print("\n".join(difference), file=sys.stderr)
    print(f"{path.relative_to(ROOT)} is out of date: run `{command}`", file=sys.stderr)
    return 1
