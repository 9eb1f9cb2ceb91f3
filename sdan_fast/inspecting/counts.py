"""What one launch does when its PTX is executed: instructions by unit, sectors, traffic, bank conflicts (rung 5).

The PTX interpreter lives in tests/ptxrun of a checkout. A large grid is sampled: some of its blocks run, spread over
the grid by the golden ratio, and what they did is scaled to the grid. Each block's own counts are exact.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .tools import Unavailable

SAMPLED_THREADS = 8192  # of a grid; grids up to twice as large run whole
INTERPRETER = Path(__file__).resolve().parents[2] / "tests" / "ptxrun"
PARAMETERS = 256 * 1024  # tensors below this many bytes are parameters: cached, not traffic


@functools.cache
def interpreter() -> Any:
    """The PTX interpreter's module."""
    if not (INTERPRETER / "ptxrun.py").is_file():
        raise Unavailable(
            "executing PTX needs the interpreter in tests/ptxrun, which only a checkout of the sources has"
        )
    if str(INTERPRETER) not in sys.path:
        sys.path.insert(0, str(INTERPRETER))
    return importlib.import_module("ptxrun")


@functools.cache
def interpreter_hash() -> str:
    """Of the interpreter's sources, of this file and of the model's, since a table's rows depend on them."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    model = [Path(__file__).with_name(name) for name in ("counts_table.py", "devices.py", "modelled_time.py")]
    for path in [*sorted(INTERPRETER.glob("ptx*.py")), *model]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def sample(blocks: int, threads: int) -> list[int]:
    """The blocks to run: all of a small grid, else as many as SAMPLED_THREADS allows (at least 8), evenly spread."""
    wanted = max(8, SAMPLED_THREADS // threads)
    if blocks <= 2 * wanted:
        return list(range(blocks))
    golden = (math.sqrt(5) - 1) / 2
    chosen: dict[int, None] = {}
    i = 0
    while len(chosen) < wanted:
        chosen[int(blocks * ((i * golden) % 1.0))] = None
        i += 1
    return sorted(chosen)


@dataclass
class Counts:
    """One launch's counts, scaled to its whole grid; `blocks` of `grid` blocks were executed.

    instructions: warp instructions by class (mov left out: ptxas renames registers). fma: FMA and MMA among them.
    tensors: bytes of each tensor that it touches, and how many bytes of distinct sectors its blocks read and write.
    """

    blocks: int
    grid: int
    threads: int
    shared: int
    instructions: dict[str, float] = field(default_factory=dict)
    fma: float = 0.0
    mma_flops: float = 0.0
    loads: tuple[float, float] = (0.0, 0.0)  # bytes that warps need, bytes of sectors
    stores: tuple[float, float] = (0.0, 0.0)
    best_load: float = 1.0  # sector efficiency of the best of the widest loads: the one that is not shifted
    wavefronts: float = 0.0
    conflicts: float = 0.0
    tensors: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.instructions.values())

    @property
    def fma_share(self) -> float:
        return self.fma / self.total if self.total else 0.0

    @property
    def load_efficiency(self) -> float:
        return self.loads[0] / self.loads[1] if self.loads[1] else 1.0

    @property
    def store_efficiency(self) -> float:
        return self.stores[0] / self.stores[1] if self.stores[1] else 1.0

    @property
    def conflict_share(self) -> float:
        return self.conflicts / self.wavefronts if self.wavefronts else 0.0

    @property
    def compulsory(self) -> float:
        """Bytes that the launch must move: each tensor that it reads or writes, once."""
        return sum(min(size, max(r, w)) for size, r, w in self.tensors.values())

    @property
    def moved(self) -> float:
        """Bytes that its blocks move, each block's reuse cached and nothing shared between blocks but parameters.

        A tensor that a block writes and reads back (its own part) counts once.
        """
        total = 0.0
        for size, read, written in self.tensors.values():
            moved = max(read, written) if read and written else read + written
            total += min(moved, size) if size < PARAMETERS else moved
        return total

    @property
    def traffic(self) -> float:
        return self.moved / self.compulsory if self.compulsory else 1.0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def from_json(data: Mapping[str, Any]) -> Counts:
    """The counts that `as_json` wrote."""
    fields = dict(data)
    fields["tensors"] = {k: tuple(v) for k, v in fields["tensors"].items()}
    fields["loads"], fields["stores"] = tuple(fields["loads"]), tuple(fields["stores"])
    return Counts(**fields)


def _mma_flops(opcode: str) -> int:
    """Of one warp instruction, from the shape in its name."""
    found = re.search(r"\.m(\d+)n(\d+)k(\d+)\.", opcode)
    if found is None:
        raise ValueError(f"{opcode} does not say its shape")
    return 2 * math.prod(int(n) for n in found.groups())


def count(
    ptx: str,
    entry: str | None,
    grid: Sequence[int],
    block: Sequence[int],
    values: Sequence[Any],
    shared: int,
    names: Sequence[str],
    sizes: Mapping[str, float],
    *,
    whole: bool = False,
) -> Counts:
    """Execute (a sample of) a launch; values: as ptxrun takes them; names: of arguments; sizes: bytes of tensors."""
    run = interpreter().run
    total, threads = math.prod(grid), math.prod(block)
    chosen = list(range(total)) if whole else sample(total, threads)
    st = run(
        ptx, entry, tuple(grid), tuple(block), list(values), shared, names=list(names), pad_args=True, blocks=chosen
    )  # fmt: skip
    scale = total / len(chosen)
    result = Counts(len(chosen), total, threads, st.shared_bytes)
    result.instructions = {k: n * scale for k, n in st.warp_instructions.items() if k != "mov"}
    result.fma = scale * sum(n for op, n in st.opcodes.items() if op.startswith(("fma.", "mma.")))
    result.mma_flops = scale * sum(
        _mma_flops(op) * n for op, n in st.opcodes.items() if op.startswith("mma.")
    )
    result.loads = (scale * st.global_load_unique_bytes, scale * st.global_load_sector_bytes)
    result.stores = (scale * st.global_store_unique_bytes, scale * st.global_store_sector_bytes)
    loads = [s for s in st.sites if s.space == "global" and s.kind in ("ld", "cp.async") and s.requests]
    widest = max((s.size for s in loads), default=0)  # of activations: parameters are read one by one
    result.best_load = max((s.efficiency for s in loads if s.size == widest), default=1.0)
    result.wavefronts, result.conflicts = scale * st.shared_wavefronts, scale * st.bank_conflicts
    for region, (read, written) in st.traffic.items():
        if not (read or written):
            continue
        members = [name for name in region.split("/") if name in sizes]
        size = sum(sizes[name] for name in members)
        result.tensors[region] = (size or max(read, written), read * scale, written * scale)
    return result
