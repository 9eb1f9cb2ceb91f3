"""What a launch did: instructions by class, global sectors, shared-memory wavefronts, per memory instruction."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Site:
    """Traffic of one memory instruction, summed over the launch.

    requests: warp-level accesses. lanes: active threads. size: bytes per thread. unique: bytes after merging equal
    addresses within a warp. sectors: 32-byte sectors per warp access (global). wavefronts / ideal: shared-memory passes
    taken, and passes without any bank conflict.
    """

    pc: int
    text: str
    line: int
    loc: str
    space: str
    kind: str
    size: int
    requests: int = 0
    lanes: int = 0
    unique: int = 0
    sectors: int = 0
    wavefronts: int = 0
    ideal: int = 0

    def clear(self):
        self.requests = self.lanes = self.unique = self.sectors = self.wavefronts = self.ideal = 0

    @property
    def bytes(self):
        return self.lanes * self.size

    @property
    def efficiency(self):
        """Unique useful bytes over the bytes of the sectors that carry them; 1 is perfectly coalesced."""
        return self.unique / (32 * self.sectors) if self.sectors else 1.0

    @property
    def conflicts(self):
        return self.wavefronts - self.ideal


@dataclass
class Stats:
    kernel: str
    grid: tuple
    block: tuple
    shared_bytes: int
    local_bytes: int
    warp_instructions: Counter = field(default_factory=Counter)  # by class
    thread_instructions: Counter = field(default_factory=Counter)
    opcodes: Counter = field(default_factory=Counter)  # warp-level, by full opcode
    flops: int = 0  # fma = 2, mma = 2 m n k
    sites: list = field(default_factory=list)
    footprint: dict = field(default_factory=dict)  # region -> (bytes read, written), by touched sector
    traffic: dict = field(default_factory=dict)  # the same, a sector once for each block that touches it
    blocks: int = 0  # executed
    races: list = field(default_factory=list)
    seconds: float = 0.0

    def _sum(self, what, space, kind):
        return sum(getattr(s, what) for s in self.sites if s.space == space and s.kind in kind)

    # useful: bytes that threads asked for; unique: the same after merging equal addresses in a warp; sector: moved
    global_load_bytes = property(lambda s: s._sum("bytes", "global", ("ld", "cp.async")))
    global_load_unique_bytes = property(lambda s: s._sum("unique", "global", ("ld", "cp.async")))
    global_load_sector_bytes = property(lambda s: 32 * s._sum("sectors", "global", ("ld", "cp.async")))
    global_store_bytes = property(lambda s: s._sum("bytes", "global", ("st",)))
    global_store_unique_bytes = property(lambda s: s._sum("unique", "global", ("st",)))
    global_store_sector_bytes = property(lambda s: 32 * s._sum("sectors", "global", ("st",)))
    shared_accesses = property(lambda s: s._sum("requests", "shared", ("ld", "st", "ldmatrix", "cp.async")))
    shared_wavefronts = property(
        lambda s: s._sum("wavefronts", "shared", ("ld", "st", "ldmatrix", "cp.async"))
    )
    bank_conflicts = property(lambda s: s._sum("conflicts", "shared", ("ld", "st", "ldmatrix", "cp.async")))

    @staticmethod
    def _ratio(a, b):
        return a / b if b else 1.0

    @property
    def load_efficiency(self):
        return self._ratio(self.global_load_unique_bytes, self.global_load_sector_bytes)

    @property
    def store_efficiency(self):
        return self._ratio(self.global_store_unique_bytes, self.global_store_sector_bytes)

    @property
    def total_warp_instructions(self):
        return sum(self.warp_instructions.values())

    @property
    def lane_efficiency(self):
        """Active threads per issued warp instruction, over 32 (1 without divergence and partial warps)."""
        return self._ratio(sum(self.thread_instructions.values()), 32 * self.total_warp_instructions)

    def hot(self, n=10):
        """The n memory sites with the most traffic (sectors, or shared wavefronts)."""
        return sorted((s for s in self.sites if s.requests), key=lambda s: -(s.sectors + s.wavefronts))[:n]

    def as_dict(self):
        names = (
            "global_load_bytes",
            "global_load_unique_bytes",
            "global_load_sector_bytes",
            "load_efficiency",
            "global_store_bytes",
            "global_store_unique_bytes",
            "global_store_sector_bytes",
            "store_efficiency",
            "shared_accesses",
            "shared_wavefronts",
            "bank_conflicts",
            "total_warp_instructions",
            "lane_efficiency",
            "flops",
            "shared_bytes",
            "local_bytes",
            "seconds",
        )
        return {
            "kernel": self.kernel,
            "grid": self.grid,
            "block": self.block,
            **{n: getattr(self, n) for n in names},
            "warp_instructions": dict(self.warp_instructions),
            "footprint": dict(self.footprint),
            "traffic": dict(self.traffic),
            "blocks": self.blocks,
        }

    def report(self, n=8):
        out = [
            f"{self.kernel}: grid {self.grid}, block {self.block}, shared {self.shared_bytes} B, "
            f"local {self.local_bytes} B/thread, interpreted in {self.seconds:.2f} s",
            f"  warp instructions {self.total_warp_instructions:,} (lanes active {self.lane_efficiency:.1%}); "
            f"flops {self.flops:,}",
            "  " + ", ".join(f"{c} {v:,}" for c, v in self.warp_instructions.most_common()),
        ]
        for way in ("load", "store"):
            useful, unique, moved = (
                getattr(self, f"global_{way}_{b}bytes") for b in ("", "unique_", "sector_")
            )
            if useful:
                out.append(
                    f"  global {way}s: {useful:,} B asked for, {unique:,} B unique per warp, {moved:,} B in sectors: "
                    f"efficiency {getattr(self, way + '_efficiency'):.1%}"
                )
        if self.footprint:
            out.append(
                "  touched once: " + ", ".join(f"{k} r {r:,} w {w:,}" for k, (r, w) in self.footprint.items())
            )
        if self.traffic:
            out.append(
                f"  once per block, {self.blocks:,} blocks: "
                + ", ".join(f"{k} r {r:,} w {w:,}" for k, (r, w) in self.traffic.items())
            )
        if self.shared_accesses:
            out.append(
                f"  shared: {self.shared_accesses:,} warp accesses, {self.shared_wavefronts:,} wavefronts, "
                f"{self.bank_conflicts:,} from bank conflicts"
            )
        for s in self.hot(n):
            what = (
                f"{s.sectors:,} sectors, efficiency {s.efficiency:.0%}"
                if s.space == "global"
                else f"{s.wavefronts:,} wavefronts, {s.conflicts:,} conflicts"
            )
            out.append(f"    {what}: {s.text}  ({s.loc or 'PTX line'} {'' if s.loc else s.line})")
        if self.races:
            out.append(f"  shared-memory races: {len(self.races)}; first: {self.races[0]}")
        return "\n".join(out)
