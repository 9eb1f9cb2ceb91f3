"""Comparing a table with the committed one: a regression, an improvement and other toolchains are told apart."""

from __future__ import annotations

import dataclasses

import pytest

from sdan_fast.inspecting import committed
from sdan_fast.inspecting.table import Table, compare, differing_tools, number, read, verdict

COLUMNS = ("kernel", "target", "registers", "spills", "occupancy", "hot_fma", "traffic", "key")
TOOLS = {"triton": "3.8.0", "ptxas": "13.1.80"}
ROW = {
    "kernel": "strip", "target": "sm_80", "registers": 64, "spills": 0, "occupancy": 0.5, "hot_fma": 0.4,
    "traffic": 1.05, "key": "a",
}  # fmt: skip


def table(*rows, tools=TOOLS):
    made = Table(("kernel", "target"), COLUMNS, dict(tools))
    for row in rows:
        made.add(row)
    return made


def changed(**values):
    return table(ROW | values)


def test_written_and_read_back(tmp_path):
    path = tmp_path / "t.csv"
    table(ROW, ROW | {"target": "sm_90", "registers": 72}).write(path, ["What this is."])
    assert path.read_text().splitlines()[0] == "# What this is."
    again = read(path, ("kernel", "target"))
    assert again.toolchain == TOOLS and again.rows["strip", "sm_90"]["registers"] == "72"
    assert compare(again, table(ROW, ROW | {"target": "sm_90", "registers": 72})) == []
    path.write_text("kernel,target\n")
    with pytest.raises(ValueError, match="toolchain"):
        read(path, ("kernel", "target"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"spills": 8}, "regression"),
        ({"occupancy": 0.375}, "regression"),
        ({"occupancy": 0.75}, "improvement"),
        ({"hot_fma": 0.39}, "regression"),
        ({"hot_fma": 0.41}, "improvement"),
        ({"traffic": 1.2}, "regression"),
        ({"traffic": 1.0}, "improvement"),
        ({"registers": 66}, "change"),
        ({"occupancy": ""}, "change"),
    ],
)
def test_verdicts(values, expected):
    (change,) = compare(table(ROW), changed(**values))
    assert change.verdict == expected
    said = verdict([change], "sdan-fast inspect triton --update")
    assert said is not None and "sdan-fast inspect triton --update" in said
    assert ("regressions" in said, "improvements" in said) == (
        expected == "regression",
        expected == "improvement",
    )


def test_equal_tables_and_keys():
    """The source's hash says what to compile again, and is no difference by itself."""
    assert compare(table(ROW), changed(key="b")) == [] and verdict([], "") is None


def test_rows_that_come_and_go():
    both = table(ROW, ROW | {"target": "sm_90"})
    (new,) = compare(table(ROW), both)
    (gone,) = compare(both, table(ROW))
    assert (new.new, gone.old) == ("new", "there")
    assert compare(both, table(ROW), complete=False) == []


def test_other_tools():
    assert differing_tools(table(ROW), TOOLS) == []
    (said,) = differing_tools(table(ROW), TOOLS | {"ptxas": "13.2.0"})
    assert "ptxas here is 13.2.0, the committed table is of 13.1.80" in said


def test_what_a_part_says(tmp_path):
    """A regression fails; an improvement asks; with other tools only hard limits count; the command is named."""
    part = committed.Part(tmp_path / "t.csv", table(ROW), (), 0, "the command")
    assert "no t.csv yet" in str(committed.problem(part)) and "the command" in str(committed.problem(part))
    part.table.write(part.path, [])
    assert committed.problem(part) is None
    worse = dataclasses.replace(part, table=changed(occupancy=0.25))
    assert "regression" in str(committed.problem(worse))
    elsewhere = dataclasses.replace(
        part, table=table(ROW | {"occupancy": 0.25}, tools=TOOLS | {"triton": "3.9.0"})
    )
    assert committed.problem(elsewhere) is None and committed.other_tools(elsewhere)


def test_two_rows_of_one_identity():
    made = table(ROW)
    made.add(ROW)
    with pytest.raises(ValueError, match="two different rows"):
        made.add(ROW | {"registers": 1})


@pytest.mark.parametrize(("value", "text"), [(0.5, "0.5"), (1 / 3, "0.333"), (12345.6, "12346"), (1.0, "1")])
def test_numbers(value, text):
    assert number(value, 3) == text
