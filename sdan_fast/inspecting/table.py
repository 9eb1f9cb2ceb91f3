"""The committed tables: a CSV that names its toolchain, and a comparison that tells a regression from an improvement.

The first lines of a file are comments; one holds the toolchain as JSON. Where the toolchain at hand is another, numbers
cannot be compared, and only the hard limits (no spill, shared memory within the architecture's) are.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Row = dict[str, str]

# Columns where more is better (1), less is better (-1); in every other column a change is only a change.
BETTER = {
    "spills": -1, "occupancy": 1, "load_bits": 1, "store_bits": 1, "wide_loads": 1, "hot_fma": 1, "executed_fma": 1,
    "load_sectors": 1, "store_sectors": 1, "traffic": -1, "bank_conflicts": -1, "A100_us": -1, "H100_us": -1,
}  # fmt: skip


def number(value: float, digits: int = 4) -> str:
    """A number as the tables print it: `digits` significant ones, without a tail of zeros."""
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"


@dataclass
class Table:
    """Rows by identity (the values of the `identity` columns), and what made them."""

    identity: tuple[str, ...]
    columns: tuple[str, ...]
    toolchain: dict[str, str]
    rows: dict[tuple[str, ...], Row] = field(default_factory=dict)

    def add(self, row: Mapping[str, object]) -> None:
        """Add a row; values become strings. A row that is there already must be the same."""
        text = {c: str(row.get(c, "")) for c in self.columns}
        at = tuple(text[c] for c in self.identity)
        if self.rows.setdefault(at, text) != text:
            raise ValueError(f"two different rows for {at}")

    def write(self, path: Path, head: Sequence[str]) -> None:
        """Write the CSV; `head`: what it says about itself, line by line."""
        out = io.StringIO()
        for line in head:
            out.write(f"# {line}\n")
        out.write(f"# toolchain: {json.dumps(self.toolchain, sort_keys=True)}\n")
        writer = csv.DictWriter(out, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows.values())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(out.getvalue(), encoding="utf-8")


def read(path: Path, identity: tuple[str, ...]) -> Table:
    """Read a committed table. FileNotFoundError, ValueError if it is none."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = [line for line in lines if line.startswith("#")]
    toolchain = next((line for line in head if line.startswith("# toolchain: ")), None)
    if toolchain is None:
        raise ValueError(f"{path} does not say which toolchain made it")
    reader = csv.DictReader(lines[len(head) :])
    table = Table(identity, tuple(reader.fieldnames or ()), json.loads(toolchain.partition(": ")[2]))
    for row in reader:
        table.add(row)
    return table


@dataclass(frozen=True)
class Change:
    """One difference. verdict: "regression", "improvement", or "change" where neither can be said."""

    row: tuple[str, ...]
    column: str
    old: str
    new: str
    verdict: str

    def __str__(self) -> str:
        return f"{self.verdict}: {' | '.join(self.row)}: {self.column} {self.old or 'none'} -> {self.new or 'none'}"


def compare(committed: Table, computed: Table, *, complete: bool = True) -> list[Change]:
    """What differs between the committed table and computed rows; complete: rows that were not computed are gone.

    The key of a row (a hash of its kernel's source) does not count: what counts is what it led to.
    """
    changes = []
    for at, new in computed.rows.items():
        old = committed.rows.get(at)
        if old is None:
            changes.append(Change(at, "row", "", "new", "change"))
            continue
        for column in computed.columns:
            a, b = old.get(column, ""), new[column]
            if a != b and column != "key":
                changes.append(Change(at, column, a, b, _verdict(column, a, b)))
    if complete:
        changes += [
            Change(at, "row", "there", "", "change") for at in committed.rows if at not in computed.rows
        ]
    return changes


def _verdict(column: str, old: str, new: str) -> str:
    sign = BETTER.get(column)
    try:
        difference = float(new) - float(old)
    except ValueError:
        return "change"
    if sign is None or difference == 0:
        return "change"
    return "improvement" if difference * sign > 0 else "regression"


def differing_tools(committed: Table, here: Mapping[str, str]) -> list[str]:
    """Sentences about tools whose versions are not those of the committed table."""
    return [
        f"{name} here is {here.get(name, 'missing')}, the committed table is of {version}"
        for name, version in sorted(committed.toolchain.items())
        if here.get(name) != version
    ]


def verdict(changes: Sequence[Change], command: str) -> str | None:
    """What to tell whoever runs the comparison: None if nothing differs."""
    if not changes:
        return None
    bad = [c for c in changes if c.verdict == "regression"]
    good = [c for c in changes if c.verdict == "improvement"]
    lines = []
    if bad:
        lines.append(
            f"{len(bad)} regressions against the committed table; mend them, or accept them in a commit:"
        )
    elif good:
        lines.append(f"{len(good)} improvements that the committed table does not have yet; commit them:")
    else:
        lines.append(f"{len(changes)} differences from the committed table; commit it anew:")
    shown = sorted(changes, key=lambda c: ("regression", "improvement", "change").index(c.verdict))
    lines += [f"  {c}" for c in shown[:40]] + ([f"  and {len(shown) - 40} more"] if len(shown) > 40 else [])
    lines.append(f"The table is rewritten by: {command}")
    return "\n".join(lines)
