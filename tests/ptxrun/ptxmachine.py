"""Memory spaces, race checks, and the machine that executes a batch of thread blocks in lock step."""

from __future__ import annotations

import ctypes

import numpy as np

from ptxparse import U1, U4, U8, UINT, MemoryFault, PTXError, RaceError, Unsupported

WARP = 32
SHARED_WINDOW = 1 << 60  # where generic addresses see the shared and the local window
LOCAL_WINDOW = 1 << 61
REGION_STRIDE = 1 << 36  # distance between two global regions: the guard zones are gigabytes wide
POISON = 0xFF  # uninitialised registers and memory: all ones, a NaN in every float format


class Region:
    """A piece of global (or constant) memory: `buf` is a byte view of the caller's array."""

    def __init__(self, base, buf, name, writeable):
        self.base, self.buf, self.name, self.writeable, self.nbytes = base, buf, name, writeable, buf.size
        self.views = {s: buf[: buf.size // s * s].view(UINT[s]) for s in (1, 2, 4, 8)}
        self.read = np.zeros(buf.size // 32 + 2, bool)
        self.written = np.zeros(buf.size // 32 + 2, bool)
        self.owner = {}  # element size -> last block that stored each element
        self.sectors = buf.size // 32 + 2
        self.block_read = self.block_written = (
            0  # distinct sectors of each block, summed over the blocks so far
        )


class GlobalMemory:
    """A flat address space. Arrays that overlap share a region, so that in-place kernels see their own writes."""

    def __init__(self, named_arrays):
        self.regions, self.at = [], []
        spans = sorted(
            ((*np.lib.array_utils.byte_bounds(a), n, a) for n, a in named_arrays if a.size),
            key=lambda s: s[:2],
        )
        while spans:
            lo, hi, name, array = spans.pop(0)
            writeable = array.flags.writeable
            while spans and spans[0][0] < hi:
                _, h, n, a = spans.pop(0)
                hi, writeable, name = (
                    max(hi, h),
                    writeable or a.flags.writeable,
                    name if n in name.split("/") else f"{name}/{n}",
                )
            owner = array
            while isinstance(owner.base, np.ndarray):
                owner = owner.base
            buf = np.frombuffer((ctypes.c_uint8 * (hi - lo)).from_address(lo), U1)
            skew = (lo - owner.ctypes.data) % 256  # allocations start at multiples of 256, views need not
            self.add(buf, name, writeable, skew)
            self.at.append((lo, hi, self.regions[-1].base))

    def add(self, buf, name, writeable=True, skew=0):
        self.regions.append(Region((len(self.regions) + 1) * REGION_STRIDE + skew, buf, name, writeable))
        return self.regions[-1].base

    def address(self, array):
        lo = np.lib.array_utils.byte_bounds(array)[0]
        return next((base + lo - a for a, b, base in self.at if a <= lo < b), 0)

    def where(self, addr):
        """Words for an address: which region it is in or next to."""
        best = min(
            self.regions, key=lambda r: max(r.base - addr, addr - (r.base + r.nbytes - 1), 0), default=None
        )
        if best is None:
            return "there is no global memory"
        if addr < best.base:
            return f"{best.base - addr} bytes before the start of {best.name} ({best.nbytes} bytes)"
        if addr >= best.base + best.nbytes:
            return f"{addr - best.base - best.nbytes} bytes past the end of {best.name} ({best.nbytes} bytes)"
        return f"byte {addr - best.base} of {best.name} ({best.nbytes} bytes)"

    def find(self, addr, nbytes):
        """[(region, selection or None)] for an address array; raises _Bad with the index of a bad lane."""
        lo, hi = int(addr.min()), int(addr.max())
        i = lo // REGION_STRIDE - 1
        if 0 <= i < len(self.regions):
            r = self.regions[i]
            if r.base <= lo and hi + nbytes <= r.base + r.nbytes:
                return [(r, None)]
        which = (addr // np.uint64(REGION_STRIDE)).astype(np.int64) - 1
        out = []
        for i in np.unique(which):
            sel = np.flatnonzero(which == i)
            if not 0 <= i < len(self.regions):
                raise _Bad(sel[0])
            r, a = self.regions[i], addr[sel]
            bad = (a < np.uint64(r.base)) | (a + np.uint64(nbytes) > np.uint64(r.base + r.nbytes))
            if bad.any():
                raise _Bad(sel[np.flatnonzero(bad)[0]])
            out.append((r, sel))
        return out


class _Bad(Exception):
    """Index of the lane (within the accessed lanes) whose address is bad."""


class RaceCheck:
    """Per granule of shared memory: who last wrote and read it, and in which barrier epoch."""

    def __init__(self, nbytes, granule):
        n, self.granule = nbytes // granule, granule
        self.w_epoch, self.r_epoch = np.full(n, -1, "i4"), np.full(n, -1, "i4")
        self.w_warp, self.r_warp = np.full(n, -1, "i2"), np.full(n, -1, "i2")

    def read(self, g, epoch, warp):
        bad = (self.w_epoch[g] == epoch) & (self.w_warp[g] != warp)
        mine = np.where((self.r_epoch[g] == epoch) & (self.r_warp[g] != warp), -2, warp).astype("i2")
        self.r_epoch[g] = epoch
        self.r_warp[g] = mine
        many = self.r_warp[g] != mine  # two warps of this very access
        self.r_warp[g[many]] = -2
        return bad

    def write(self, g, epoch, warp, changes, lost):
        """changes: the store alters the data. lost: another lane of this very store won; within a warp that is allowed."""
        bad = (self.r_epoch[g] == epoch) & (self.r_warp[g] != warp)
        bad |= (self.w_epoch[g] == epoch) & (self.w_warp[g] != warp) & changes
        self.w_epoch[g] = epoch
        self.w_warp[g] = warp
        return bad | lost & (self.w_warp[g] != warp)


class Machine:
    """A batch of thread blocks in lock step. R: one array per register, of length 1 (uniform) or of one value a lane."""

    def __init__(self, kernel, launch, blocks):
        self.k, self.launch, self.gmem, self.stats = kernel, launch, launch.gmem, launch.stats
        bx, by, bz = launch.block
        self.threads = bx * by * bz
        self.T = -(-self.threads // WARP) * WARP
        self.nblk, self.L = len(blocks), len(blocks) * self.T
        self.W = self.L // WARP
        t = np.arange(self.T)
        live = np.tile(t < self.threads, self.nblk)
        self.live = live
        self.blocks, self.block_ids = blocks, np.repeat(np.asarray(blocks, "i4"), self.T)
        self.block_of = np.repeat(np.arange(self.nblk), self.T)
        self.warp_of = np.tile((t // WARP).astype("i2"), self.nblk)
        lane = np.tile(t, self.nblk).astype(U4)
        gx, gy, _ = launch.grid
        b = np.repeat(np.asarray(blocks), self.T)
        u = lambda v: np.array([v], U4)
        zero, one = u(0), u(1)
        self.special = {
            "tid.x": lane % U4.type(bx),
            "tid.y": lane // U4.type(bx) % U4.type(by),
            "tid.z": lane // U4.type(bx * by),
            "ctaid.x": (b % gx).astype(U4),
            "ctaid.y": (b // gx % gy).astype(U4),
            "ctaid.z": (b // (gx * gy)).astype(U4),
            "laneid": lane % U4.type(WARP),
            "warpid": lane // U4.type(WARP),
            "nwarpid": u(self.T // WARP),
            "smid": zero,
            "nsmid": one,
            "gridid": zero,
            "clock": zero,
            "clock_hi": zero,
            "clock64": np.zeros(1, U8),
            "globaltimer": np.zeros(1, U8),
            "WARP_SZ": u(WARP),
            "dynamic_smem_size": u(launch.dynamic_shared),
            "total_smem_size": u(launch.shared_bytes),
            "lanemask_eq": one << (lane % 32),
            "lanemask_lt": (one << (lane % 32)) - one,
            "lanemask_le": (one << (lane % 32)) * U4.type(2) - one,
            "lanemask_gt": ~((one << (lane % 32)) * U4.type(2) - one),
            "lanemask_ge": ~((one << (lane % 32)) - one),
            "cluster_ctarank": zero,
            "cluster_nctarank": one,
            "is_explicit_cluster": np.zeros(1, bool),
        }
        for i, d in enumerate("xyz"):
            self.special["ntid." + d], self.special["nctaid." + d] = u(launch.block[i]), u(launch.grid[i])
            self.special["cluster_ctaid." + d], self.special["cluster_nctaid." + d] = zero, one
            self.special["clusterid." + d], self.special["nclusterid." + d] = (
                self.special["ctaid." + d],
                self.special["nctaid." + d],
            )
        if self.nblk == 1:
            for d in "xyz":
                self.special["ctaid." + d] = self.special["ctaid." + d][:1]
        self.R = [
            np.zeros(1, bool) if n == 1 else np.full(1, (1 << n) - 1, UINT[n // 8]) for n in kernel.reg_bits
        ]
        self.S = launch.shared_bytes
        self.stride = -(-max(self.S, 1) // 16) * 16
        self.smem = np.full(self.nblk * self.stride, POISON, U1)
        self.sviews = {s: self.smem.view(UINT[s]) for s in (1, 2, 4, 8)}
        for v in kernel.vars.values():
            if v.space == "shared" and v.init:
                raise Unsupported("initialised shared variable")
        self.LB = -(-launch.local_bytes // 16) * 16
        self.lmem = np.full(self.L * self.LB, POISON, U1)
        self.lviews = {s: self.lmem.view(UINT[s]) for s in (1, 2, 4, 8)}
        self.race = (
            RaceCheck(self.smem.size, launch.granule) if launch.races != "off" and launch.granule else None
        )
        self.epoch = np.zeros(self.nblk, "i4")
        self.pending, self.group = [], np.zeros(self.L, "i8")  # cp.async
        self.touched = {}  # (region, "read" or "written") -> one flag for each block and sector
        self.amask = self.wmask = None  # active lanes; lanes to write (None: all)
        self.ins = None

    # registers
    def put(self, slot, raw):
        w = self.wmask
        self.R[slot] = raw if w is None else np.where(w, raw, self.R[slot])

    def full(self, raw):
        return raw if raw.size == self.L else np.repeat(raw, self.L)

    def active(self):
        return np.ones(self.L, bool) if self.amask is None else self.amask

    def set_mask(self, mask):
        self.amask = None if mask.all() else mask
        self.wmask = None if self.amask is None or np.array_equal(mask, self.live) else mask

    # errors
    def thread(self, lane):
        t, blk = int(lane) % self.T, self.blocks[int(lane) // self.T]
        bx, by, _ = self.launch.block
        gx, gy, _ = self.launch.grid
        return (
            f"block ({blk % gx}, {blk // gx % gy}, {blk // (gx * gy)}), "
            f"thread ({t % bx}, {t // bx % by}, {t // (bx * by)})"
        )

    def fault(self, what, lane, cls=MemoryFault):
        i = self.ins
        at = f", {i.loc}" if i.loc else ""
        raise cls(
            f"{self.k.name}: {what}\n  instruction: {i.text} (PTX line {i.line}{at})\n  {self.thread(lane)}"
        )

    # memory: `addr` holds the addresses of the lanes `idx` (all lanes: None); one address and idx None means uniform
    def _lane(self, idx, i):
        return int(i) if idx is None else int(idx[i])

    def check_align(self, addr, nbytes, idx):
        if nbytes > 1 and int(np.bitwise_or.reduce(addr)) & (nbytes - 1):
            i = np.flatnonzero(addr & addr.dtype.type(nbytes - 1))[0]
            self.fault(f"misaligned {nbytes}-byte access at {int(addr[i]):#x}", self._lane(idx, i))

    def gfind(self, addr, nbytes, idx):
        self.check_align(addr, nbytes, idx)
        try:
            return self.gmem.find(addr, nbytes)
        except _Bad as e:
            a = int(addr[e.args[0]])
            self.fault(
                f"out-of-bounds {nbytes}-byte global access at {a:#x}, {self.gmem.where(a)}",
                self._lane(idx, e.args[0]),
            )

    def touch(self, r, how, sector, idx, sel):
        """Note which blocks access which sectors of a region; `sector` has the lanes idx[sel], one value if uniform."""
        flags = self.touched.get((r, how))
        if flags is None:  # pages that no block touches cost nothing
            flags = self.touched[r, how] = np.zeros((self.nblk, r.sectors), bool)
        if idx is None and sector.size == 1:
            blocks = slice(None) if self.amask is None else self.amask.reshape(self.nblk, self.T).any(1)
            flags[blocks, int(sector[0])] = True
            return
        blocks = self.block_of if idx is None else self.block_of[idx]
        flags.reshape(-1)[(blocks if sel is None else blocks[sel]) * r.sectors + sector] = True

    def close(self):
        """Add what this batch's blocks touched to the regions' sums."""
        for (r, how), flags in self.touched.items():
            setattr(r, "block_" + how, getattr(r, "block_" + how) + int(np.count_nonzero(flags)))
        self.touched = {}

    def gload(self, addr, size, n, idx, sh=None):
        out = None
        for r, sel in self.gfind(addr, size * n, idx):
            a = addr if sel is None else addr[sel]
            off = (a - np.uint64(r.base)).astype(np.int64)
            r.read[off >> 5] = True
            self.touch(r, "read", off >> 5, idx, sel)
            view, j = self._view(r, off, size)
            got = [view.take(j + i) for i in range(n)]
            if sel is None:
                return got
            out = out or [np.zeros(addr.size, UINT[size]) for _ in range(n)]
            for o, g in zip(out, got):
                o[sel] = g
        return out

    def gstore(self, addr, values, size, idx):
        n = len(values)
        for r, sel in self.gfind(addr, size * n, idx):
            if not r.writeable:
                self.fault(f"store to read-only {r.name}", self._lane(idx, 0 if sel is None else sel[0]))
            a = addr if sel is None else addr[sel]
            off = (a - np.uint64(r.base)).astype(np.int64)
            r.written[off >> 5] = True
            self.touch(r, "written", off >> 5, idx, sel)
            view, j = self._view(r, off, size)
            for i, v in enumerate(values):
                v = v if sel is None or v.size == 1 else v[sel]
                self.check_global_race(
                    r, view, j + i, v, size, idx if sel is None else idx[sel] if idx is not None else sel
                )

    def check_global_race(self, r, view, j, v, size, idx):
        """Store; two threads at once, or two blocks, must not leave different values at one address."""
        if self.launch.races == "off":
            view[j] = v
            return
        owner = r.owner.setdefault(size, np.full(view.size, -1, "i4"))
        blk = self.block_ids if idx is None else self.block_ids[idx]
        bad = (owner[j] >= 0) & (owner[j] != blk) & (view[j] != v)
        view[j], owner[j] = v, blk
        bad |= view[j] != v
        if bad.any():
            i = np.flatnonzero(bad)[0]
            self.report_race(
                f"threads or blocks store different values to byte {int(j[i]) * size} of {r.name}",
                self._lane(idx, i),
            )

    def report_race(self, what, lane):
        if self.launch.races == "raise":
            self.fault(what, lane, RaceError)
        self.stats.races.append(f"{what}; {self.ins.text} (PTX line {self.ins.line})")

    @staticmethod
    def _view(r, off, size):
        return r.views[size], off >> (size.bit_length() - 1)

    def sflat(self, addr, nbytes, idx, stride, limit, name):
        """Byte index into the batch's shared or local memory."""
        self.check_align(addr, nbytes, idx)
        a = addr.astype(np.int64)
        if a.size and (int(a.max()) + nbytes > limit or int(a.min()) < 0):
            i = np.flatnonzero((a + nbytes > limit) | (a < 0))[0]
            self.fault(
                f"out-of-bounds {nbytes}-byte {name} access at {int(addr[i]):#x}; the block has {limit} bytes",
                self._lane(idx, i),
            )
        owner = self.block_of if name == "shared" else np.arange(self.L)
        return a + (owner if idx is None else owner[idx]) * stride

    def check_race(self, flat, nbytes, idx, write, changes=True, lost=False):
        if self.race is None:
            return
        g, blk, warp = self.race.granule, self.block_of, self.warp_of
        if idx is not None:
            blk, warp = blk[idx], warp[idx]
        ep = self.epoch[blk]
        for i in range(max(nbytes // g, 1)):
            f = (flat + i * g) // g
            bad = self.race.write(f, ep, warp, changes, lost) if write else self.race.read(f, ep, warp)
            if bad.any():
                j = np.flatnonzero(bad)[0]
                what = (
                    f"shared-memory race: {'write to' if write else 'read of'} byte {int(flat[j]) % self.stride} that "
                    f"another warp touched since the last barrier"
                )
                return self.report_race(what, self._lane(idx, j))

    def sload(self, addr, size, n, idx):
        flat = self.sflat(addr, size * n, idx, self.stride, self.S, "shared")
        self.check_race(flat, size * n, idx, False)
        j = flat >> (size.bit_length() - 1)
        return [self.sviews[size].take(j + i) for i in range(n)]

    def sstore(self, addr, values, size, idx):
        flat = self.sflat(addr, size * len(values), idx, self.stride, self.S, "shared")
        j, view = flat >> (size.bit_length() - 1), self.sviews[size]
        changes, lost = np.zeros(flat.size, bool), np.zeros(flat.size, bool)
        for i, v in enumerate(values):
            if self.race is not None:
                changes |= view[j + i] != v
            view[j + i] = v
            if self.race is not None:
                lost |= view[j + i] != v
        self.check_race(flat, size * len(values), idx, True, changes, lost)

    def lflat(self, addr, nbytes, idx):
        return self.sflat(addr, nbytes, idx, self.LB, self.launch.local_bytes, "local")

    # statistics of one access (addr: uniform, or one per lane of the whole batch)
    def count_global(self, site, addr):
        act = self.amask
        if addr.size == 1:
            warps = self.W if act is None else int(np.count_nonzero(act.reshape(-1, WARP).any(1)))
            site.requests += warps
            site.lanes += self.L if act is None else int(np.count_nonzero(act))
            site.unique += warps * site.size
            site.sectors += warps
            return
        a = addr.reshape(-1, WARP)
        if act is None:
            site.lanes += self.L
        else:
            m = act.reshape(-1, WARP)
            rows = m.any(1)
            m, a = m[rows], a[rows]
            site.lanes += int(np.count_nonzero(m))
            a = np.where(m, a, np.where(m, a, a.dtype.type(0)).max(1)[:, None])
        if a.size and not (a[:, 1:] >= a[:, :-1]).all():
            a = np.sort(a, axis=1)
        site.requests += len(a)
        site.unique += (len(a) + int(np.count_nonzero(a[:, 1:] != a[:, :-1]))) * site.size
        s = a >> a.dtype.type(5)
        site.sectors += len(a) + int(np.count_nonzero(s[:, 1:] != s[:, :-1]))

    def count_shared(self, site, addr, width=None):
        """Bank conflicts: 32 four-byte banks; 8-byte accesses go by half warps and 16-byte ones by quarter warps."""
        size = width or site.size
        act = self.active()
        phase = WARP if size <= 4 else WARP * 4 // size
        m = act.reshape(-1, phase)
        rows = m.any(1)
        site.requests += int(np.count_nonzero(act.reshape(-1, WARP).any(1)))
        site.lanes += int(np.count_nonzero(act))
        m = m[rows]
        w = (self.full(addr).astype(np.int64) >> 2).reshape(-1, phase)[rows]
        w = np.where(m, w, np.where(m, w, 0).max(1)[:, None])
        site.ideal += len(w)
        site.unique += int(np.count_nonzero(m)) * size
        wide = (w.max(1) - w.min(1) + max(size // 4, 1)) > WARP
        site.wavefronts += int(np.count_nonzero(~wide))
        if wide.any():
            w = w[wide]
            w = (w[:, :, None] + np.arange(max(size // 4, 1))).reshape(len(w), -1)
            w.sort(axis=1)
            new = np.ones(w.shape, bool)
            new[:, 1:] = w[:, 1:] != w[:, :-1]
            key = (np.arange(len(w))[:, None] * 32 + (w & 31))[new]
            site.wavefronts += int(np.bincount(key, minlength=len(w) * 32).reshape(-1, 32).max(1).sum())

    # cp.async: data is held back until the issuing thread waits; the destination reads as poison meanwhile
    def async_copy(self, flat, data, idx):
        lanes = np.arange(self.L) if idx is None else idx
        self.pending.append((lanes, self.group[lanes].copy(), flat, data))
        self.smem[flat[:, None] + np.arange(data.shape[1])] = POISON

    def async_wait(self, keep):
        """Complete this thread's copies; keep: number of most recent groups that may stay in flight (None: none)."""
        act, rest = self.active(), []
        for lanes, gid, flat, data in self.pending:
            done = act[lanes]
            if keep is not None:
                done = done & (gid < self.group[lanes] - keep)
            if done.any():
                f = flat[done]
                self.smem[f[:, None] + np.arange(data.shape[1])] = data[done]
                self.check_race(f, data.shape[1], lanes[done], True)
            if not done.all():
                rest.append((lanes[~done], gid[~done], flat[~done], data[~done]))
        self.pending = rest

    # ------------------------------------------------------------------------------------------------------ schedule
    def execute(self):
        code, launch = self.k.code, self.launch
        ready = {0: self.live.copy()}
        parked, barred = {}, np.zeros(self.L, bool)
        bar_pc, bar_id, bar_need = np.zeros(self.L, "i8"), np.zeros(self.L, "i8"), np.zeros(self.L, "i8")
        bar_pred = np.zeros(self.L, bool)

        def add(where, pc, mask):
            where[pc] = where[pc] | mask if pc in where else mask

        def width(mask):
            return int(np.count_nonzero(mask.reshape(-1, WARP).any(1))), int(np.count_nonzero(mask))

        def tally(start, pc, warps, threads):
            launch.wcount[start:pc] += warps
            launch.tcount[start:pc] += threads
            launch.steps += pc - start
            if launch.steps > launch.max_steps:
                raise PTXError(
                    f"{self.k.name}: more than {launch.max_steps} interpreted steps; an endless loop? "
                    f"At: {self.ins.text}"
                )

        def release():
            """Let go every block whose live threads (or the given number of them) stand at one barrier."""
            b, lv = barred.reshape(self.nblk, self.T), self.live.reshape(self.nblk, self.T)
            ids, need = bar_id.reshape(b.shape), bar_need.reshape(b.shape)
            go = np.zeros(self.L, bool)
            for i in np.unique(bar_id[barred]):
                at = b & (ids == i)
                want = np.where(
                    need.max(1, where=at, initial=0) > 0, need.max(1, where=at, initial=0), lv.sum(1)
                )
                hit = at.any(1) & (at.sum(1) >= want)
                for blk in np.flatnonzero(hit):  # barrier.red: combine the predicates
                    lanes = np.flatnonzero(at[blk]) + blk * self.T
                    ins = code[bar_pc[lanes[0]] - 1]
                    if ins.target is not None:
                        ins.target(self, lanes, bar_pred[lanes])
                self.epoch[hit] += 1
                go |= (at & hit[:, None]).reshape(-1)
            barred[go] = False
            for pc in np.unique(bar_pc[go]):
                add(ready, int(pc), go & (bar_pc == pc))

        while True:
            if not ready:
                if barred.any():
                    release()
                if not ready:
                    if barred.any() or parked:
                        lane = np.flatnonzero(barred if barred.any() else next(iter(parked.values())))[0]
                        self.ins = code[bar_pc[lane] - 1] if barred.any() else code[next(iter(parked))]
                        self.fault(
                            "deadlock: not all threads reach this barrier or warp-synchronous instruction",
                            lane,
                            PTXError,
                        )
                    return
            pc = min(ready)
            mask = ready.pop(pc)
            limit = min(ready, default=len(code) + 1)
            while mask is not None:
                self.set_mask(mask)
                start = pc
                nw, nt = width(mask)
                jump = None
                while True:
                    if pc >= limit:
                        add(ready, pc, mask)
                        mask = None
                        break
                    ins = self.ins = code[pc]
                    if not ins.kind:
                        ins.run(self)
                        pc += 1
                        continue
                    if ins.kind == "sync":
                        if pc in parked or not np.array_equal(mask, self.live):
                            tally(start, pc, nw, nt)
                            start, mask = pc, mask | parked.pop(pc) if pc in parked else mask
                            short = self.missing(ins, mask)
                            if short is not None:
                                add(parked, pc, mask & short)
                                mask = mask & ~short
                            if not mask.any():
                                mask = None
                                break
                            self.set_mask(mask)
                            nw, nt = width(mask)
                        ins.run(self)
                        pc += 1
                        continue
                    pc += 1
                    p = self.guard(ins, mask)
                    if ins.kind == "bar":
                        if ins.run is not None:
                            bar_need[mask], bar_id[mask], pred = ins.run(self, mask)
                            bar_pred[mask] = pred
                        if (
                            not ready
                            and not parked
                            and ins.target is None
                            and bool(p.all())
                            and not bar_need[mask].any()
                            and np.array_equal(mask, self.live)
                        ):
                            self.epoch += 1
                            continue
                        barred |= p
                        bar_pc[p] = pc
                        mask = mask & ~p
                        release()
                        mask = mask if mask.any() else None
                        jump = pc
                        if mask is not None:
                            limit = min(ready, default=len(code) + 1)
                        break
                    if ins.kind == "exit":
                        self.live = self.live & ~p
                        mask = mask & ~p
                        if barred.any():
                            release()
                        for at, lanes in parked.items():
                            add(ready, at, lanes)
                        parked = {}
                        mask = mask if mask.any() else None
                        jump = pc
                        limit = min(ready, default=len(code) + 1)
                        break
                    if ins.kind == "brx":
                        index = self.full(ins.run(self))
                        for i in np.unique(index[mask]):
                            add(ready, ins.target[int(i)], mask & (index == i))
                        mask = None
                        break
                    if np.array_equal(p, mask):  # taken by all
                        jump = ins.target
                        break
                    if not p.any():
                        continue
                    add(ready, ins.target, p)
                    mask = mask & ~p
                    jump = pc
                    limit = min(limit, ins.target)
                    break
                tally(start, pc, nw, nt)
                if mask is not None:
                    pc = jump

    def guard(self, ins, mask):
        if ins.guard is None:
            return mask
        p = self.R[ins.guard[0]]
        return mask & (~p if ins.guard[1] else p)

    def missing(self, ins, mask):
        """Lanes of warps where a .sync instruction's member mask names live lanes that are not here yet; None if none."""
        if np.array_equal(mask, self.live):
            return None
        need = self.live.reshape(-1, WARP)
        if ins.target is not None:
            member = self.full(ins.target(self)).reshape(-1, WARP)
            need = need & ((member >> np.arange(WARP, dtype=U4)) & np.uint32(1)).astype(bool)
        lack = (need & ~mask.reshape(-1, WARP)).any(1)
        lack &= mask.reshape(-1, WARP).any(1)
        return np.repeat(lack, WARP) if lack.any() else None
