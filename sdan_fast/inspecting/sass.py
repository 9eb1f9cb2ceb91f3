"""Reads a disassembly: what a kernel's instructions are, how wide it loads, and what its hot loop is made of.

The hot loop is the innermost loop with the most FMA and MMA instructions, or, where no innermost loop has as many as
some straight-line block, that block (an unrolled kernel). A loop is the code from the target of a backward branch to
that branch; it is innermost if it contains no other. A block runs from one label or branch to the next.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;?\s*\}?$"
)
_LABEL = re.compile(r"^(\.L_\w+|\$\w+|[\w.$]+):\s*$")
_BRANCHES = ("BRA", "BRX", "JMP", "JMX", "RET", "EXIT", "KILL")
_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256, "ENL2": 256}


@dataclass(frozen=True)
class Instruction:
    """One machine instruction; `target` is the label that a branch names."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> str | None:
        found = re.search(r"`\(([^)]+)\)", self.operands) if self.base in ("BRA", "JMP") else None
        return found[1] if found else None

    @property
    def is_fma(self) -> bool:
        """A multiply-add of floats, tensor cores' included; HFMA2 of zeros is how constants are moved."""
        if "MMA" in self.base:
            return True
        if self.base not in ("FFMA", "FFMA2", "DFMA", "HFMA2", "FFMA32I", "HFMA2_32I"):
            return False
        if self.base.startswith("HFMA2"):
            sources = [o.strip().lstrip("-") for o in self.operands.split(",")[1:3]]
            return "MMA" not in self.opcode.split(".")[1:2] and sources != ["RZ", "RZ"]
        return True

    @property
    def width(self) -> int:
        """Bits that a thread moves with this memory instruction."""
        return next((_WIDTHS[m] for m in self.opcode.split(".")[1:] if m in _WIDTHS), 32)


@dataclass(frozen=True)
class Code:
    """The instructions of one kernel, and where its labels stand (indices of instructions)."""

    instructions: Sequence[Instruction]
    labels: dict[str, int]

    @cached_property
    def opcodes(self) -> Counter[str]:
        return Counter(i.base for i in self.instructions)

    def widest(self, opcode: str) -> int:
        """Bits of the widest access with this opcode (LDG, STG), 0 without one."""
        return max((i.width for i in self.instructions if i.base == opcode), default=0)

    def share_of_width(self, opcode: str, bits: int) -> float:
        """Share of such accesses that are at least `bits` wide; 0 without one."""
        widths = [i.width for i in self.instructions if i.base == opcode]
        return sum(w >= bits for w in widths) / len(widths) if widths else 0.0

    @cached_property
    def loops(self) -> list[tuple[int, int]]:
        """(first, last) instruction of every loop; several backward branches to one target are one loop."""
        ends: dict[int, int] = {}
        for at, i in enumerate(self.instructions):
            if i.target is None or (start := self.labels.get(i.target)) is None or start > at:
                continue
            # An unconditional branch to itself closes every kernel, as a trap for the fetch unit.
            if start < at:
                ends[start] = max(at, ends.get(start, 0))
        return sorted(ends.items())

    @cached_property
    def blocks(self) -> list[tuple[int, int]]:
        """(first, last) instruction of every straight-line block."""
        starts = {0, *self.labels.values()}
        for at, i in enumerate(self.instructions):
            if i.base in _BRANCHES and not (i.base in ("EXIT", "RET") and i.predicate):
                starts.add(at + 1)
        bounds = sorted(s for s in starts if s < len(self.instructions)) + [len(self.instructions)]
        return [(a, b - 1) for a, b in pairwise(bounds)]

    @cached_property
    def hot_loop(self) -> tuple[str, Sequence[Instruction]]:
        """("loop" or "block", its instructions), as the module's head defines it."""
        loops = self.loops
        innermost = [
            (a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)
        ]

        def fmas(span: tuple[int, int]) -> int:
            return sum(i.is_fma for i in self.instructions[span[0] : span[1] + 1])

        candidates = [(fmas(s), 1, s) for s in innermost] + [(fmas(s), 0, s) for s in self.blocks]
        _, is_loop, (a, b) = max(candidates, key=lambda c: (c[0], c[1], -(c[2][1] - c[2][0])))
        return ("loop" if is_loop else "block"), self.instructions[a : b + 1]

    @property
    def hot_fma_share(self) -> float:
        """Share of FMA and MMA among the hot loop's instructions."""
        body = self.hot_loop[1]
        return sum(i.is_fma for i in body) / len(body)

    @property
    def spill_instructions(self) -> int:
        """Accesses of local memory."""
        return self.opcodes["LDL"] + self.opcodes["STL"]


def parse(text: str) -> Iterator[tuple[str, Code]]:
    """(mangled name, code) of each kernel in what `nvdisasm -c` printed.

    Helper functions that the compiler put behind a kernel (divisions, square roots) belong to that kernel.
    """
    name: str | None = None
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if line.startswith(("\t.section\t.", "//-----")):
            if name is not None and instructions:
                yield name, Code(tuple(instructions), labels)
            found = re.match(r"\t\.section\t\.text\.([^,]+),", line)
            name, instructions, labels = found[1] if found else None, [], {}
        elif name is None:
            continue
        elif found := _INSTRUCTION.match(line):
            address, predicate, opcode, operands = found.groups()
            if opcode != "NOP":
                instructions.append(
                    Instruction(int(address, 16), (predicate or "").strip(), opcode, operands)
                )
        elif found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
    if name is not None and instructions:
        yield name, Code(tuple(instructions), labels)
