"""The instructions: each one is decoded once, into a closure over register slots that runs on whole arrays of lanes."""

from __future__ import annotations

import re

import numpy as np

from ptxmachine import LOCAL_WINDOW, SHARED_WINDOW, WARP
from ptxparse import (
    F4,
    F8,
    U1,
    U2,
    U4,
    U8,
    UINT,
    PTXError,
    Unsupported,
    imm_bits,
    int_dtype,
    is_float,
    is_type,
    narrow,
    reader,
    type_bits,
    writer,
)
from ptxstats import Site

DECODERS = {}


def op(*names):
    def register(f):
        DECODERS.update(dict.fromkeys(names, f))
        return f

    return register


class Decoder:
    """Turns the instructions of a kernel into closures over register slots, which hold nothing of a launch."""

    def __init__(self, kernel, approx):
        self.k, self.approx = kernel, approx

    def decode(self):
        bad = {}
        for i in self.k.code:
            self.i = i
            try:
                if i.op not in DECODERS:
                    self.no()
                DECODERS[i.op](self, i)
                if i.guard is not None and i.kind in ("", "sync"):
                    i.run = _guarded(i.run, *i.guard)
            except Unsupported as e:
                bad.setdefault(".".join([i.op, *i.mods]), e)
            except (IndexError, ValueError, KeyError, TypeError, StopIteration) as e:
                raise Unsupported(
                    f"cannot decode: {i.text} (PTX line {i.line}): {type(e).__name__}: {e}"
                ) from e
        if bad:
            first = next(iter(bad.values()))
            raise Unsupported(
                f"{first}" + (f"\n  all that is missing: {', '.join(bad)}" if len(bad) > 1 else "")
            )

    def no(self, why=""):
        raise Unsupported(
            f"unsupported instruction {'.'.join([self.i.op, *self.i.mods])}{': ' + why if why else ''}\n"
            f"  in {self.k.name}: {self.i.text} (PTX line {self.i.line})"
        )

    def types(self, *allowed):
        """The instruction's types, in order; its other modifiers must be among the allowed ones."""
        t = [m for m in self.i.mods if is_type(m)]
        for m in self.i.mods:
            if m not in allowed and m not in t:
                self.no(f"modifier .{m}")
        return t

    def src(self, o, t):
        """Operand -> function of the machine that returns values of type t."""
        rd = reader(t)
        if o[0] == "r":
            slot = o[1]
            return lambda m: rd(m.R[slot])
        if o[0] == "!":
            f = self.src(o[1], t)
            return lambda m: ~f(m)
        if o[0] == "sp":
            name = o[1]
            if name not in _SPECIAL:
                self.no(f"special register %{name}")
            return lambda m: rd(m.special[name])
        if o[0] == "i":
            if t == "pred":
                raw = np.array([int(o[1], 0) != 0])
            else:
                raw = np.array([imm_bits(o[1], type_bits(t))], UINT[type_bits(t) // 8])
        elif o[0] == "sym":
            raw = np.array([self.address(o[1])], U8)
        elif o[0] == "v":
            return self.pack(o[1], t)
        else:
            self.no(f"operand {o}")
        value = rd(raw)
        return lambda m: value

    def pack(self, parts, t):
        """{a, b} as one wider value, lowest part first."""
        n, bits = len(parts), type_bits(t)
        small, wide = UINT[bits // n // 8], UINT[bits // 8]
        fs = [self.src(p, f"b{bits // n}") for p in parts]

        def get(m):
            vs = np.broadcast_arrays(*[narrow(f(m), small) for f in fs])
            return np.ascontiguousarray(np.stack(vs, -1)).view(wide).reshape(-1)

        return get

    def dst(self, o, t):
        """Operand -> function (machine, values of type t) that writes it, widened to the register where needed."""
        if o[0] == "_":
            return lambda m, v: None
        if o[0] != "r":
            self.no(f"destination {o}")
        wr, slot, bits = writer(t), o[1], self.k.reg_bits[o[1]]
        if bits == type_bits(t):
            return lambda m, v: m.put(slot, wr(v))
        if bits < type_bits(t) or t == "pred" or bits == 1:
            self.no("register narrower than the type")
        sd, ud = np.dtype(f"i{bits // 8}"), UINT[bits // 8]
        if t[0] == "s":
            it = int_dtype(t)
            return lambda m, v: m.put(slot, wr(v).view(it).astype(sd).view(ud))
        return lambda m, v: m.put(slot, wr(v).astype(ud))

    def address(self, name):
        v = self.k.vars.get(name)
        if v is not None:
            return v.addr
        for n, off, *_ in self.k.params:
            if n == name:
                return off
        self.no(f"unknown symbol {name}")

    def addr(self, o):
        """Memory operand -> function that returns unsigned 64-bit addresses."""
        if o[0] != "m":
            self.no(f"address operand {o}")
        base, off = o[1], o[2]
        if base[0] in ("sym", "i"):
            a = self.address(base[1]) if base[0] == "sym" else int(base[1], 0)
            value = np.array([(a + off) & (2**64 - 1)], U8)
            return lambda m: value
        if base[0] != "r":
            self.no(f"address {o}")
        slot, short = base[1], self.k.reg_bits[base[1]] == 32
        delta = U4.type(off & 0xFFFFFFFF) if short else U8.type(off & (2**64 - 1))
        if not off:
            return lambda m: narrow(m.R[slot], U8)
        return lambda m: narrow(m.R[slot] + delta, U8)

    def alu(self, i, fn, out_t, in_ts, cls):
        fs = [self.src(o, t) for o, t in zip(i.ops[1:], in_ts, strict=True)]
        put = self.dst(i.ops[0], out_t)
        if len(fs) == 1:
            (a,) = fs
            i.run = lambda m: put(m, fn(a(m)))
        elif len(fs) == 2:
            a, b = fs
            i.run = lambda m: put(m, fn(a(m), b(m)))
        else:
            i.run = lambda m: put(m, fn(*[f(m) for f in fs]))
        i.cls = cls

    def site(self, i, space, kind, size):
        s = Site(i.pc, i.text, i.line, i.loc, space, kind, size)
        self.k.sites.append(s)
        return s


def _guarded(run, slot, neg):
    def ex(m):
        p = m.R[slot]
        p = ~p if neg else p
        if p.size == 1:
            if p[0]:
                run(m)
            return
        a, w = m.amask, m.wmask
        if a is None and p.all():
            run(m)
            return
        m.amask = p if a is None else a & p
        m.wmask = p if w is None else w & p
        if m.amask.any():
            run(m)
        m.amask, m.wmask = a, w

    return ex


_SPECIAL = {
    *(
        f"{n}.{d}"
        for n in (
            "tid",
            "ntid",
            "ctaid",
            "nctaid",
            "cluster_ctaid",
            "cluster_nctaid",
            "clusterid",
            "nclusterid",
        )
        for d in "xyz"
    ),
    "laneid",
    "warpid",
    "nwarpid",
    "smid",
    "nsmid",
    "gridid",
    "clock",
    "clock_hi",
    "clock64",
    "globaltimer",
    "WARP_SZ",
    "dynamic_smem_size",
    "total_smem_size",
    "lanemask_eq",
    "lanemask_lt",
    "lanemask_le",
    "lanemask_gt",
    "lanemask_ge",
    "cluster_ctarank",
    "cluster_nctarank",
    "is_explicit_cluster",
}


# arithmetic ---------------------------------------------------------------------------------------------------------


def _flush(x):
    """Subnormal float32 to zero of the same sign (.ftz)."""
    small = (np.abs(x) < np.float32(1.1754944e-38)) & (x != 0)
    return np.where(small, np.copysign(x.dtype.type(0), x), x) if small.any() else x


def _directed(x, mode):
    """float64 to float32 in a directed rounding mode (rm, rp, rz)."""
    t = x.astype(F4)
    if mode == "rn":
        return t
    wrong = {"rm": t > x, "rp": t < x, "rz": np.abs(t) > np.abs(x)}[mode]
    toward = {"rm": F4.type(-np.inf), "rp": F4.type(np.inf), "rz": F4.type(0)}[mode]
    return np.where(wrong, np.nextafter(t, toward), t)


def _fma(a, b, c):
    """Fused multiply-add of float32 or narrower values: the product is exact in float64, the sum is rounded there."""
    return np.multiply(a, b, dtype=F8) + c


def _fma64(a, b, c):
    return (a.astype(np.longdouble) * b + c).astype(F8)


def _post(fn, t, mods, f32_rounding=True):
    """Wrap a float function with the instruction's rounding mode, .ftz, .sat and .relu."""
    mode = next((m for m in mods if m in ("rm", "rp", "rz")), None)
    out = fn
    if mode and t == "f32" and f32_rounding:
        out = lambda *a: _directed(fn(*[v.astype(F8) for v in a]), mode)
    elif mode and t != "f32":
        raise Unsupported(f"rounding .{mode} for .{t}")
    if "ftz" in mods and t == "f32":
        inner = out
        out = lambda *a: _flush(inner(*[_flush(v) for v in a]).astype(F4, copy=False))
    if "sat" in mods:
        inner2 = out
        out = lambda *a: np.nan_to_num(np.clip(inner2(*a), 0, 1), nan=0.0)
    if "relu" in mods:
        inner3 = out
        out = lambda *a: (lambda r: np.where(np.isnan(r), r, np.maximum(r, 0)))(inner3(*a))
    return out


def _int_div(a, b):
    d = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        q = a // d
    else:
        q = a // d
        q = q + ((a - q * d != 0) & ((a < 0) != (d < 0))).astype(a.dtype)
    return np.where(
        b == 0, a.dtype.type(-1) if a.dtype.kind == "i" else a.dtype.type(2 ** (8 * a.dtype.itemsize) - 1), q
    )


def _mul_hi(a, b):
    size = a.dtype.itemsize
    if size < 8:
        wide = np.dtype(a.dtype.kind + str(2 * size))
        return (a.astype(wide) * b.astype(wide) >> wide.type(8 * size)).astype(a.dtype)
    ua, ub = a.view(U8), b.view(U8)
    m32, s32 = U8.type(0xFFFFFFFF), U8.type(32)
    al, ah, bl, bh = ua & m32, ua >> s32, ub & m32, ub >> s32
    mid = (al * bl >> s32) + (ah * bl & m32) + (al * bh & m32)
    hi = ah * bh + (ah * bl >> s32) + (al * bh >> s32) + (mid >> s32)
    if a.dtype.kind == "i":
        hi = hi - np.where(a < 0, ub, U8.type(0)) - np.where(b < 0, ua, U8.type(0))
    return hi.view(a.dtype)


def _mul_wide(a, b):
    wide = np.dtype(a.dtype.kind + str(2 * a.dtype.itemsize))
    return a.astype(wide) * b.astype(wide)


def _fmin(nan):
    return np.minimum if nan else np.fmin


def _fmax(nan):
    return np.maximum if nan else np.fmax


_FCLS = {"f32": "fp32", "tf32": "fp32", "f64": "fp64"}
_FLOAT = {
    "add": (np.add, 2, 1),
    "sub": (np.subtract, 2, 1),
    "mul": (np.multiply, 2, 1),
    "div": (np.divide, 2, 1),
    "neg": (np.negative, 1, 0),
    "abs": (np.abs, 1, 0),
    "copysign": (lambda a, b: np.copysign(b, a), 2, 0),
}
_INT = {
    "add": (np.add, 2),
    "sub": (np.subtract, 2),
    "min": (np.minimum, 2),
    "max": (np.maximum, 2),
    "div": (_int_div, 2),
    "rem": (lambda a, b: np.where(b == 0, a, a - _int_div(a, b) * b), 2),
    "neg": (np.negative, 1),
    "abs": (np.abs, 1),
}


def _carry(d, i):
    """add.cc, addc, sub.cc, subc, mad.cc, madc: extended-precision integers through a carry flag."""
    t = "u" + d.types("cc", "lo", "hi")[-1][1:]
    if not hasattr(d, "cc"):
        d.cc = len(d.k.reg_bits)
        d.k.reg_bits.append(1)
    use, keep, cc = i.op.endswith("c"), "cc" in i.mods, d.cc
    fs, put = [d.src(o, t) for o in i.ops[1:]], d.dst(i.ops[0], t)
    mul = d.src(i.ops[1], i.mods[-1]), d.src(i.ops[2], i.mods[-1])
    wide = _mul_hi if "hi" in i.mods else np.multiply

    def ex(m):
        c = m.R[cc] if use else np.zeros(1, bool)
        a, b = (
            (wide(mul[0](m), mul[1](m)).astype(int_dtype(t)), fs[2](m))
            if len(fs) == 3
            else (fs[0](m), fs[1](m))
        )
        r = a - b - c if i.op[:3] == "sub" else a + b + c
        put(m, r)
        if keep:
            m.put(cc, (a < b) | (c & (a == b)) if i.op[:3] == "sub" else (r < a) | (c & (r == a)))

    i.run, i.cls = ex, "int"


@op(
    "add",
    "sub",
    "mul",
    "div",
    "neg",
    "abs",
    "copysign",
    "min",
    "max",
    "rem",
    "fma",
    "mad",
    "addc",
    "subc",
    "madc",
)
def _(d, i):
    if "cc" in i.mods or i.op in ("addc", "subc", "madc"):
        return _carry(d, i)
    t = d.types("rn", "rz", "rm", "rp", "ftz", "sat", "relu", "approx", "full", "lo", "hi", "wide", "NaN")[-1]
    if not is_float(t):
        return _integer(d, i, t)
    lanes = 2 if t.endswith("x2") else 1
    if i.op in ("fma", "mad"):
        fn, n, flops = (_fma64 if t == "f64" else _fma), 3, 2
    elif i.op in ("min", "max"):
        fn, n, flops = (_fmin if i.op == "min" else _fmax)("NaN" in i.mods), 2, 0
    else:
        fn, n, flops = _FLOAT[i.op]
    i.flops = flops * lanes
    fn = _approximate(d, i, t, fn)
    d.alu(i, _post(fn, t, i.mods), t, [t] * n, "sfu" if i.op == "div" else _FCLS.get(t, "fp16"))


def _integer(d, i, t):
    wide = int_dtype(t[0] + str(2 * type_bits(t))) if "wide" in i.mods else None
    if (
        "ftz" in i.mods
        or "relu" in i.mods
        or ("sat" in i.mods and (t != "s32" or i.op not in ("add", "sub")))
    ):
        d.no()
    if i.op in ("mul", "mad"):
        if wide is not None:
            mul, out = _mul_wide, t[0] + str(2 * type_bits(t))
        else:
            mul, out = (_mul_hi if "hi" in i.mods else np.multiply), t
        fn, ins = (mul, [t, t]) if i.op == "mul" else ((lambda a, b, c: mul(a, b) + c), [t, t, out])
        return d.alu(i, fn, out, ins, "int")
    fn, n = _INT[i.op]
    if "sat" in i.mods:
        exact = fn
        fn = lambda a, b: np.clip(exact(a.astype("i8"), b.astype("i8")), -(2**31), 2**31 - 1).astype("i4")
    d.alu(i, fn, t, [t] * n, "int")


_SFU = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: 1 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}
# Largest error of the .approx forms in the PTX manual: relative; absolute for sin, cos, lg2 near 1, and the 16-bit tanh.
_ERROR = {
    "ex2": 2**-22,
    "lg2": 2**-22,
    "rcp": 2**-23,
    "sqrt": 2**-23,
    "rsqrt": 2**-22.9,
    "tanh": 2**-11,
    "div": 2**-22,
    "ex2.f16": 2**-9.9,
    "ex2.bf16": 2**-7,
    "tanh.f16": 2**-10.987,
    "tanh.bf16": 2**-8,
}


def _approximate(d, i, t, fn):
    """With approx="worst", push the results of approximate instructions off by their documented error, either way."""
    if d.approx == "exact" or not {"approx", "full"} & set(i.mods):
        return fn
    key = f"{i.op}.{t.removesuffix('x2')}"

    def bound(a, r):
        if i.op in ("sin", "cos"):
            return np.where(np.abs(a) <= 2 * np.pi, 2**-20.5, 2**-14.7)
        err = _ERROR.get(key, _ERROR[i.op])
        return err * (
            np.maximum(np.abs(r), 1)
            if i.op == "lg2"
            else 1
            if key in ("tanh.f16", "tanh.bf16")
            else np.abs(r)
        )

    def off(*a):
        r = np.asarray(fn(*a), F8)
        side = 1.0 - 2.0 * (
            np.ascontiguousarray(a[-1].astype(F4)).view(U4) * U4.type(2654435761) >> U4.type(31)
        )
        return np.where(np.isfinite(r), r + side * bound(a[-1], r), r)

    return off


@op(*_SFU)
def _(d, i):
    t = d.types("approx", "ftz", "rn", "rz", "rm", "rp")[-1]
    f = _SFU[i.op]  # in float64, then rounded: more exact than the hardware's approximations
    fn = _approximate(d, i, t, (lambda x: f(x)) if t == "f64" else (lambda x: f(x.astype(F8))))
    mode = next((m for m in i.mods if m in ("rm", "rp", "rz")), "rn")
    rounded = (lambda x: _directed(fn(x), mode)) if t == "f32" else fn
    d.alu(i, _post(rounded, t, [m for m in i.mods if m == "ftz"]), t, [t], "sfu")


_BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@op("and", "or", "xor", "not", "cnot")
def _(d, i):
    t = d.types()[-1]
    fn = {**_BITWISE, "not": np.invert, "cnot": lambda a: (a == 0).astype(a.dtype)}[i.op]
    d.alu(i, fn, t, [t] * (len(i.ops) - 1), "pred" if t == "pred" else "int")


@op("shl", "shr")
def _(d, i):
    t = d.types()[-1]
    bits, dt = type_bits(t), int_dtype(t)

    def shift(a, n):
        if i.op == "shl":
            return np.where(n < bits, a << (n % bits).astype(dt), dt.type(0))
        n = np.minimum(n, bits - 1) if t[0] == "s" else n
        return np.where(n < bits, a >> (n % bits).astype(dt), dt.type(0))

    d.alu(i, shift, t, [t, "u32"], "int")


@op("shf")
def _(d, i):
    d.types("l", "r", "wrap", "clamp")
    cap = 31 if "wrap" in i.mods else 32

    def funnel(lo, hi, n):
        n = (n & np.uint32(31) if cap == 31 else np.minimum(n, 32)).astype(U8)
        both = (hi.astype(U8) << U8.type(32)) | lo
        return (both << n >> U8.type(32) if "l" in i.mods else both >> n).astype(U4)

    d.alu(i, funnel, "b32", ["b32", "b32", "u32"], "int")


@op("lop3")
def _(d, i):
    d.types()
    table = int(i.ops.pop()[1], 0)

    def lop(a, b, c):
        r = np.zeros(1, U4)
        for n in range(8):
            if table >> n & 1:
                r = r | ((a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c))
        return r

    d.alu(i, lop, "b32", ["b32"] * 3, "int")


@op("prmt")
def _(d, i):
    d.types()  # the default mode only

    def prmt(a, b, sel):
        both = (b.astype(U8) << U8.type(32)) | a
        r = np.zeros(1, U4)
        for n in range(4):
            s = sel >> U4.type(4 * n)
            byte = (both >> ((s & U4.type(7)) * U4.type(8)).astype(U8)).astype(U4) & U4.type(255)
            byte = np.where(s & U4.type(8), np.where(byte & U4.type(128), U4.type(255), U4.type(0)), byte)
            r = r | byte << U4.type(8 * n)
        return r

    d.alu(i, prmt, "b32", ["b32"] * 3, "int")


@op("bfe", "bfi", "bfind", "popc", "clz", "brev", "sad", "dp4a")
def _(d, i):
    t = d.types("shiftamt")[0]
    bits, dt, ut = type_bits(t), int_dtype(t), f"u{type_bits(t)}"
    ud = int_dtype(ut)
    one = ud.type(1)

    def ones(n):
        n = np.minimum(n, bits)
        return np.where(n >= bits, ud.type(2**bits - 1), (one << (n % bits).astype(ud)) - one)

    def bfe(a, pos, n):
        pos, n = pos & U4.type(255), n & U4.type(255)
        p, w = np.minimum(pos, bits - 1).astype(dt), np.minimum(n, bits)
        field_ = np.where(pos < bits, (a >> p), (a >> dt.type(bits - 1)) if t[0] == "s" else dt.type(0)).view(
            ud
        ) & ones(w)
        if t[0] == "s":
            top = np.minimum(pos + np.maximum(w, 1) - U4.type(1), bits - 1).astype(dt)
            sign = ((a >> top) & dt.type(1)).astype(bool) & (w > 0)
            field_ = np.where(sign, field_ | ~ones(w), field_)
        return field_.view(dt)

    def bfi(a, b, pos, n):
        pos, n = pos & U4.type(255), n & U4.type(255)
        mask = np.where(pos < bits, ones(n) << (pos % U4.type(bits)).astype(ud), ud.type(0))
        return np.where(pos < bits, (a << (pos % U4.type(bits)).astype(ud)) & mask | b & ~mask, b)

    def length(a):  # bits needed for a non-negative number
        a, r = a.astype(U8), np.zeros(a.shape, U4)
        for s in (32, 16, 8, 4, 2, 1):
            big = a >= U8.type(1 << s)
            a, r = np.where(big, a >> U8.type(s), a), np.where(big, r + U4.type(s), r)
        return r + (a > 0).astype(U4)

    def bfind(a):
        u = (np.where(a < 0, ~a, a)).view(ud) if t[0] == "s" else a
        n = length(u)
        at = np.where(n > 0, n - U4.type(1), U4.type(2**32 - 1))
        return np.where(n > 0, U4.type(bits) - n, at) if "shiftamt" in i.mods else at

    def brev(a):
        r = np.zeros(a.shape, ud)
        for n in range(bits):
            r |= (a >> ud.type(n) & one) << ud.type(bits - 1 - n)
        return r

    def dp4a(a, b, c):
        ta, tb = (np.dtype(m[0].replace("s", "i") + "1") for m in [x for x in i.mods if is_type(x)])
        a, b = (np.ascontiguousarray(v).view(s).reshape(-1, 4).astype("i8") for v, s in ((a, ta), (b, tb)))
        return ((a * b).sum(1) + c).astype("i4")

    if i.op == "bfe":
        d.alu(i, bfe, t, [t, "u32", "u32"], "int")
    elif i.op == "bfi":
        d.alu(i, bfi, ut, [ut, ut, "u32", "u32"], "int")
    elif i.op == "bfind":
        d.alu(i, bfind, "u32", [t], "int")
    elif i.op == "popc":
        d.alu(i, lambda a: np.bitwise_count(a).astype(U4), "u32", [ut], "int")
    elif i.op == "clz":
        d.alu(i, lambda a: U4.type(bits) - length(a), "u32", [ut], "int")
    elif i.op == "brev":
        d.alu(i, brev, ut, [ut], "int")
    elif i.op == "sad":
        d.alu(i, lambda a, b, c: c + (np.maximum(a, b) - np.minimum(a, b)), t, [t] * 3, "int")
    else:
        d.alu(i, dp4a, "s32", ["b32", "b32", "s32"], "int")


# comparison, selection, moves, conversion ---------------------------------------------------------------------------

_NAN_TRUE = {
    "equ": np.equal,
    "neu": np.not_equal,
    "ltu": np.less,
    "leu": np.less_equal,
    "gtu": np.greater,
    "geu": np.greater_equal,
}
_CMP = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def _compare(name, is_float):
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name in _NAN_TRUE:
        return lambda a, b: _NAN_TRUE[name](a, b) | np.isnan(a) | np.isnan(b)
    f = _CMP[name]
    if is_float and name == "ne":  # ordered
        return lambda a, b: f(a, b) & ~(np.isnan(a) | np.isnan(b))
    return f


@op("setp", "set")
def _(d, i):
    ts = d.types(*_CMP, *_NAN_TRUE, "num", "nan", "and", "or", "xor", "ftz")
    t = ts[-1]
    rest = [m for m in i.mods if not is_type(m) and m != "ftz"]
    cmp = _compare(rest[0], is_float(t))
    join = (
        {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[rest[1]]
        if len(rest) > 1
        else None
    )
    a, b = d.src(i.ops[1], t), d.src(i.ops[2], t)
    c = d.src(i.ops[3], "pred") if len(i.ops) > 3 else None
    flush = _flush if "ftz" in i.mods and t == "f32" else (lambda x: x)
    i.cls = "pred"
    if i.op == "set":
        if c is not None:
            d.no()
        put, true = d.dst(i.ops[0], ts[0]), 1.0 if is_float(ts[0]) else 0
        if is_float(ts[0]):
            i.run = lambda m: put(m, cmp(a(m), b(m)).astype(F4) * F4.type(true))
        else:
            dt = int_dtype(ts[0])
            i.run = lambda m: put(m, -(cmp(flush(a(m)), flush(b(m))).astype(np.dtype(f"i{dt.itemsize}"))))
        return
    first, second = (i.ops[0][1], i.ops[0][2]) if i.ops[0][0] == "|" else (i.ops[0], ("_",))
    p, q = d.dst(first, "pred"), d.dst(second, "pred")

    def ex(m):
        r = cmp(flush(a(m)), flush(b(m)))
        if t.endswith("x2"):
            p(m, r[:, 0])
            q(m, r[:, 1])
            return
        e = c(m) if c is not None else None
        p(m, r if e is None else join(r, e))
        q(m, ~r if e is None else join(~r, e))

    i.run = ex


@op("selp", "slct")
def _(d, i):
    ts = d.types("ftz")
    t = ts[0] if not ts[0].startswith("f") else f"b{type_bits(ts[0])}"
    if i.op == "selp":
        d.alu(i, lambda a, b, p: np.where(p, a, b), t, [t, t, "pred"], "pred")
    else:
        d.alu(i, lambda a, b, c: np.where(c >= 0, a, b), t, [t, t, ts[1]], "pred")


@op("mov")
def _(d, i):
    t = d.types()[0]
    i.cls = "mov"
    if t.startswith("f"):
        t = f"b{type_bits(t)}"
    if i.ops[0][0] == "v":  # unpack
        parts = i.ops[0][1]
        a, small = d.src(i.ops[1], t), UINT[type_bits(t) // len(parts) // 8]
        puts, n = [d.dst(p, f"b{type_bits(t) // len(parts)}") for p in parts], len(parts)

        def ex(m):
            v = np.ascontiguousarray(a(m)).view(small).reshape(-1, n)
            for k, put in enumerate(puts):
                put(m, np.ascontiguousarray(v[:, k]))

        i.run = ex
        return
    d.alu(i, lambda v: v, t, [t], "mov")


@op("cvta")
def _(d, i):
    d.types("to", "global", "shared", "local", "const", "param", "shared::cta")
    space = next(m for m in i.mods if m not in ("to", "u64", "u32"))
    window = {"shared": SHARED_WINDOW, "shared::cta": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space, 0)
    if space == "param":
        d.no()
    w = U8.type((-window if "to" in i.mods else window) & (2**64 - 1))
    d.alu(i, lambda a: a + w, "u64", ["u64"], "int")


@op("isspacep")
def _(d, i):
    space = i.mods[0].split("::")[0]
    shift = U8.type(60)
    want = {"global": 0, "const": 0, "shared": 1, "local": 2}[space]
    d.alu(i, lambda a: (a >> shift) == want, "pred", ["u64"], "pred")


@op("cvt")
def _(d, i):
    rounds = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    ts = d.types("rn", "rz", "rm", "rp", "rna", "ftz", "sat", "relu", "satfinite", *rounds)
    to, frm = ts
    i.cls = "cvt"
    fmods = [m for m in i.mods if m in ("ftz", "relu")]
    if to in ("bf16x2", "f16x2"):
        if frm != "f32" or len(i.ops) != 3 or "rz" in i.mods or "satfinite" in i.mods:
            d.no()
        i.ops[1], i.ops[2] = i.ops[2], i.ops[1]  # the first source is the upper half
        return d.alu(
            i,
            _post(lambda lo, hi: np.stack(np.broadcast_arrays(lo, hi), -1), "x2", fmods),
            to,
            ["f32", "f32"],
            "cvt",
        )
    if to == "tf32":

        def rna(x):  # nearest, ties away from zero (rn: ties to even)
            u = x.view(U4)
            half = U4.type(0x1000) if "rna" in i.mods else U4.type(0xFFF) + ((u >> U4.type(13)) & U4.type(1))
            return np.where(np.isfinite(x), (u + half) & U4.type(0xFFFFE000), u).view(F4)

        return d.alu(i, rna, "f32", ["f32"], "cvt")
    if "satfinite" in i.mods:
        d.no()
    rnd = next((rounds[m] for m in i.mods if m in rounds), None)
    mode = next((m for m in i.mods if m in ("rz", "rm", "rp")), None)
    if is_float(frm) and is_float(to):
        if mode and (to, frm) not in (("f32", "f64"),):
            d.no()
        base = rnd or (lambda v: v)
        fn = (lambda v: _directed(v, mode)) if mode else base
        fn = _post(fn, to if frm == "f32" else "", [m for m in i.mods if m in ("ftz", "relu", "sat")])
    elif is_float(frm):
        dt = int_dtype(to)
        lo, hi = np.iinfo(dt).min, np.iinfo(dt).max
        nan = 0 if frm != "f64" and type_bits(to) < 64 else (1 << (type_bits(to) - 1))
        nan = np.array([nan], UINT[dt.itemsize]).view(dt)

        def fn(v):
            w = (rnd or np.trunc)(_flush(v) if "ftz" in i.mods else v).astype(F8)
            top = (
                float(hi) if type_bits(to) < 64 else np.nextafter(float(hi), 0)
            )  # the largest double below the limit
            r = np.clip(np.nan_to_num(w), float(lo), top).astype(dt)
            return np.where(np.isnan(v), nan, np.where(w >= float(hi), dt.type(hi), r))
    elif is_float(to):
        wide = F8 if to != "f64" and type_bits(frm) <= 32 else None  # exact, then rounded once
        fn = (
            (lambda v: _directed(v.astype(F8), mode or "rn"))
            if to == "f32" and wide
            else (lambda v: v.astype(F4) if to == "f32" else v.astype(F8))
        )
        if mode and not (to == "f32" and wide):
            d.no()
    elif "sat" in i.mods:
        dt = int_dtype(to)
        info, src = np.iinfo(dt), np.iinfo(int_dtype(frm))
        fn = lambda v: np.clip(v, max(info.min, src.min), min(info.max, src.max)).astype(dt)
    else:
        dt = int_dtype(to)
        fn = lambda v: v.astype(dt)
    d.alu(i, fn, to, [frm], "cvt")


# control ------------------------------------------------------------------------------------------------------------


def _label(d, i, name):
    for s in reversed(i.scopes):
        if name in s.labels:
            return s.labels[name]
    d.no(f"unknown label {name}")


@op("bra")
def _(d, i):
    d.types("uni")
    i.kind, i.cls, i.target = "bra", "branch", _label(d, i, i.ops[0][1])


@op("brx")
def _(d, i):
    table = next(s.tables[i.ops[1][1]] for s in reversed(i.scopes) if i.ops[1][1] in s.tables)
    i.kind, i.cls, i.run = "brx", "branch", d.src(i.ops[0], "u32")
    i.target = [_label(d, i, n) for n in table]
    if i.guard:
        d.no("with a guard")


@op("ret", "exit")
def _(d, i):
    i.kind, i.cls = "exit", "branch"


@op("trap")
def _(d, i):
    i.cls = "branch"
    i.run = lambda m: m.fault("trap (a failed device assertion?)", np.flatnonzero(m.active())[0], PTXError)


@op("bar", "barrier")
def _(d, i):
    if i.mods[0] == "warp":
        i.kind, i.cls, i.run, i.target = "sync", "barrier", lambda m: None, d.src(i.ops[0], "u32")
        return
    d.types("sync", "aligned", "cta", "red", "popc", "and", "or")
    i.kind, i.cls = "bar", "barrier"
    ops = list(i.ops)
    pred = d.src(ops.pop(), "pred") if "red" in i.mods else None
    out = ops.pop(0) if pred else None
    ids = d.src(ops[0], "u32")
    need = d.src(ops[1], "u32") if len(ops) > 1 else None

    def arrive(m, mask):
        return (
            m.full(need(m))[mask] if need else 0,
            m.full(ids(m))[mask],
            m.full(pred(m))[mask] if pred else False,
        )

    i.run = arrive
    if not pred and need is None and ops[0][0] == "i":
        i.run = None if int(ops[0][1], 0) == 0 else arrive
    if pred:
        slot = out[1]

        def combine(m, lanes, p):
            v = p.sum() if "popc" in i.mods else p.all() if "and" in i.mods else p.any()
            r = np.array(m.full(m.R[slot]))
            r[lanes] = v
            m.R[slot] = r

        i.target = combine


@op(
    "membar",
    "fence",
    "nanosleep",
    "prefetch",
    "prefetchu",
    "griddepcontrol",
    "discard",
    "applypriority",
    "pmevent",
    "setmaxnreg",
)
def _(d, i):
    i.cls, i.run = "other", lambda m: None


@op("createpolicy")
def _(d, i):
    d.dst(i.ops[0], "b64")
    slot = i.ops[0][1]
    i.run = lambda m: m.put(slot, np.zeros(1, U8))


# memory instructions ------------------------------------------------------------------------------------------------

_SPACES = {
    "global": "global",
    "shared": "shared",
    "shared::cta": "shared",
    "shared::cluster": "shared",
    "local": "local",
    "const": "const",
    "param": "param",
    "param::entry": "param",
}


def _spread(m, addr):
    """Addresses of the active lanes, and their indices (None: all lanes)."""
    addr = m.full(addr)
    if m.amask is None:
        return addr, None
    idx = np.flatnonzero(m.amask)
    return addr[idx], idx


def _by_window(d, i, fn):
    """A generic access: send the lanes to the shared, the local or the global window, each with its own mask."""
    a = d.addr(i.ops[1] if i.op in ("ld", "atom") else i.ops[0])

    def ex(m):
        addr = a(m)
        space = m.full(addr >> U8.type(60))
        act = m.active()
        kinds = np.unique(space[act])
        save = m.amask, m.wmask
        for kind in kinds:
            if kinds.size > 1:
                m.amask = act & (space == kind)
                m.wmask = m.amask
            name, base = {1: ("shared", SHARED_WINDOW), 2: ("local", LOCAL_WINDOW)}.get(
                int(kind), ("global", 0)
            )
            fn[name](m, addr - U8.type(base))
        m.amask, m.wmask = save

    return ex


@op("ld", "ldu", "st")
def _(d, i):
    i.op = "ld" if i.op == "ldu" else i.op
    mem, val = (i.ops[1], i.ops[0]) if i.op == "ld" else (i.ops[0], i.ops[1])
    t = [m for m in i.mods if is_type(m)][-1]
    n = int(next((m[1:] for m in i.mods if m in ("v2", "v4", "v8")), "1"))
    size = type_bits(t) // 8
    space = next((_SPACES[m] for m in i.mods if m in _SPACES), "generic")
    raw = t if t[0] in "su" else f"b{type_bits(t)}"
    parts = val[1] if val[0] == "v" else [val]
    if len(parts) != n:
        d.no("vector length")
    spaces = ["global", "shared", "local"] if space == "generic" else [space]
    sites = {s: d.site(i, s, i.op, size * n) for s in spaces if s != "param"}
    i.cls = f"{i.op}.{space}"
    a = d.addr(mem)
    if i.op == "ld":
        puts, it = [d.dst(p, raw) for p in parts], int_dtype(raw)

        def give(m, vs):
            for put, v in zip(puts, vs):
                put(m, v.view(it))

        def scatter(m, vs, idx):
            if idx is not None:  # the other lanes keep what they have
                full = [np.zeros(m.L, v.dtype) for v in vs]
                for f, v in zip(full, vs):
                    f[idx] = v
                vs, w, m.wmask = full, m.wmask, (m.wmask if m.wmask is None else m.amask)
                give(m, vs)
                m.wmask = w
            else:
                give(m, vs)

        def from_global(m, addr, site=None):
            m.count_global(site, addr)
            if addr.size == 1:
                give(m, m.gload(addr, size, n, None))
            else:
                aa, idx = _spread(m, addr)
                scatter(m, m.gload(aa, size, n, idx), idx)

        def from_shared(m, addr):
            aa, idx = _spread(m, addr)
            scatter(m, m.sload(aa, size, n, idx), idx)
            m.count_shared(sites["shared"], addr)

        def from_local(m, addr):
            aa, idx = _spread(m, addr)
            j = m.lflat(aa, size * n, idx) >> (size.bit_length() - 1)
            scatter(m, [m.lviews[size].take(j + k) for k in range(n)], idx)
            sites["local"].requests += m.W

        def from_param(m, addr):
            active = addr if addr.size == 1 else _spread(m, addr)[0]  # others may hold anything
            at = int(active[0])
            buf = m.launch.params[at : at + size * n]
            if (active != active[0]).any() or buf.size < size * n:
                m.fault("parameter access out of range or not uniform", 0)
            give(m, [buf[k * size : (k + 1) * size].view(UINT[size]) for k in range(n)])

        fn = {
            "global": lambda m, x: from_global(m, x, sites["global"]),
            "const": lambda m, x: from_global(m, x, sites["const"]),
            "shared": from_shared,
            "local": from_local,
            "param": from_param,
        }
    else:
        if space in ("param", "const"):
            d.no()
        vals = [d.src(p, raw) for p in parts]

        def values(m, idx):
            vs = [f(m) for f in vals]
            vs = [v.view(UINT[size]) for v in vs]
            return [v if v.size == 1 or idx is None else v[idx] for v in vs]

        def to_global(m, addr):
            m.count_global(sites["global"], addr)
            aa, idx = _spread(m, addr)
            m.gstore(aa, values(m, idx), size, idx)

        def to_shared(m, addr):
            aa, idx = _spread(m, addr)
            m.sstore(aa, values(m, idx), size, idx)
            m.count_shared(sites["shared"], addr)

        def to_local(m, addr):
            aa, idx = _spread(m, addr)
            j = m.lflat(aa, size * n, idx) >> (size.bit_length() - 1)
            for k, v in enumerate(values(m, idx)):
                m.lviews[size][j + k] = v
            sites["local"].requests += m.W

        fn = {"global": to_global, "shared": to_shared, "local": to_local}
    if space == "generic":
        i.run = _by_window(d, i, fn)
    else:
        go = fn[space]
        i.run = lambda m: go(m, a(m))


@op("atom", "red")
def _(d, i):
    t = [m for m in i.mods if is_type(m)][-1]
    known = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
    name = next((m for m in i.mods if m in known), None)
    size, space = type_bits(t) // 8, next((_SPACES[m] for m in i.mods if m in _SPACES), "generic")
    if (
        name is None
        or any(m in ("v2", "v4", "v8") for m in i.mods)
        or space not in ("global", "shared", "generic")
    ):
        d.no()
    mem, operands = (i.ops[1], i.ops[2:]) if i.op == "atom" else (i.ops[0], i.ops[1:])
    out = d.dst(i.ops[0], f"b{type_bits(t)}") if i.op == "atom" else None
    a, fs, rd, wr = (
        d.addr(mem),
        [d.src(o, t) for o in operands[: 2 if name == "cas" else 1]],
        reader(t),
        writer(t),
    )
    i.cls = "atom"
    sites = {s: d.site(i, s, "atom", size) for s in ("global", "shared")}
    step = {
        **_BITWISE,
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "exch": lambda old, b: b,
        "cas": lambda old, b, c: np.where(old == b, c, old),
        "inc": lambda old, b: np.where(old >= b, old * 0, old + np.uint32(1)),
        "dec": lambda old, b: np.where((old == 0) | (old > b), b, old - np.uint32(1)),
    }[name]

    def ex(m, space, addr):
        aa, idx = _spread(m, addr)
        site = sites[space]
        site.requests += m.W
        site.lanes += aa.size
        if space == "shared":
            cells = m.sflat(aa, size, idx, m.stride, m.S, "shared") // size
            groups = [(m.sviews[size], cells, np.arange(aa.size))]
        else:
            groups = []
            for r, sel in m.gfind(aa, size, idx):
                if not r.writeable:
                    m.fault(f"atomic on read-only {r.name}", m._lane(idx, 0))
                sel = np.arange(aa.size) if sel is None else sel
                off = (aa[sel] - np.uint64(r.base)).astype(np.int64)
                r.read[off >> 5] = r.written[off >> 5] = True
                for how in ("read", "written"):
                    m.touch(r, how, off >> 5, idx, sel)
                groups.append((r.views[size], off // size, sel))
        bs = [
            np.broadcast_to(
                f(m) if f(m).shape[0] == 1 or idx is None else f(m)[idx], (aa.size, *f(m).shape[1:])
            )
            for f in fs
        ]
        olds = np.zeros(aa.size, UINT[size])
        for view, cell, sel in groups:
            order = np.argsort(cell, kind="stable")  # threads on one cell go in lane order
            cell_s, sel_s = cell[order], sel[order]
            first = np.ones(cell_s.size, bool)
            first[1:] = cell_s[1:] != cell_s[:-1]
            start = np.flatnonzero(first)
            rank = np.arange(cell_s.size) - np.repeat(start, np.diff(np.append(start, cell_s.size)))
            for k in range(int(rank.max()) + 1 if rank.size else 0):
                now = rank == k
                c, s = cell_s[now], sel_s[now]
                olds[s] = view[c]
                view[c] = wr(step(rd(view[c]), *[b[s] for b in bs]))
        if out is not None:
            v = np.zeros(m.L, UINT[size])
            v[slice(None) if idx is None else idx] = olds
            w = m.wmask
            m.wmask = w if idx is None or w is None else m.amask
            out(m, v)
            m.wmask = w

    if space == "generic":
        i.run = _by_window(
            d,
            i,
            {
                "global": lambda m, x: ex(m, "global", x),
                "shared": lambda m, x: ex(m, "shared", x),
                "local": lambda m, x: m.fault("atomic on local memory", 0),
            },
        )
    else:
        i.run = lambda m: ex(m, space, a(m))


@op("cp")
def _(d, i):
    if i.mods[:1] != ["async"] or "mbarrier" in i.mods or "bulk" in i.mods:
        d.no()
    i.cls = "cp.async"
    if i.mods[1] == "commit_group":

        def commit(m):
            m.group[m.active()] += 1

        i.run = commit
        return
    if i.mods[1] == "wait_group":
        keep = int(i.ops[0][1], 0)
        i.run = lambda m: m.async_wait(keep)
        return
    if i.mods[1] == "wait_all":
        i.run = lambda m: m.async_wait(None)
        return
    to, frm, n = d.addr(i.ops[0]), d.addr(i.ops[1]), int(i.ops[2][1], 0)
    used = (
        d.src(i.ops[3], "u32")
        if len(i.ops) > 3
        and i.ops[3][0] == "i"
        or len(i.ops) > 3
        and i.ops[3][0] == "r"
        and d.k.reg_bits[i.ops[3][1]] == 32
        else None
    )
    if len(i.ops) > 3 and i.ops[3][0] == "r" and d.k.reg_bits[i.ops[3][1]] == 1:
        d.no("ignore-src")
    gsite, ssite = d.site(i, "global", "cp.async", n), d.site(i, "shared", "cp.async", n)
    unit = min(n, 8)

    def ex(m):
        dst, act = to(m), m.amask
        src, idx = _spread(m, frm(m))
        k = None
        if used is not None:  # bytes past the used ones are zeros, and are not read
            k = m.full(used(m))
            k = k if idx is None else k[idx]
        data = np.zeros((src.size, n), U1)
        take = np.arange(src.size) if k is None else np.flatnonzero(k)
        lanes = (np.arange(m.L) if idx is None else idx)[take]
        if take.size:
            got = m.gload(src[take], unit, n // unit, lanes)
            data[take] = np.ascontiguousarray(np.stack(got, -1)).view(U1).reshape(-1, n)
            reads = np.zeros(m.L, bool)
            reads[lanes] = True
            m.amask = None if reads.all() else reads
            m.count_global(gsite, m.full(frm(m)))
            m.amask = act
        if k is not None:
            data[np.arange(n) >= k[:, None]] = 0
        m.count_shared(ssite, dst)
        dst_a, _ = _spread(m, dst)
        flat = m.sflat(dst_a, n, idx, m.stride, m.S, "shared")
        m.check_race(flat, n, idx, True)
        m.async_copy(flat, data, idx)

    i.run = ex


# warp-level instructions --------------------------------------------------------------------------------------------


def _member(d, i, o):
    """Mark as warp-synchronous: lanes wait for the live lanes that the member mask names."""
    i.kind, i.cls, i.target = "sync", "warp", d.src(o, "u32")


@op("shfl")
def _(d, i):
    mode, t = i.mods[1], d.types("sync", "idx", "up", "down", "bfly")[-1]
    first, second = (i.ops[0][1], i.ops[0][2]) if i.ops[0][0] == "|" else (i.ops[0], ("_",))
    put, pput = d.dst(first, t), d.dst(second, "pred")
    a, b, c = (d.src(o, "b32") for o in i.ops[1:4])
    _member(d, i, i.ops[4])
    lane = np.arange(WARP)

    def ex(m):
        v = m.full(a(m)).reshape(-1, WARP)
        bv, cv = ((x.astype("i8") if x.size == 1 else x.astype("i8").reshape(-1, WARP)) for x in (b(m), c(m)))
        bv, clamp, seg = bv & 31, cv & 31, cv >> 8 & 31
        low = lane & seg
        top = low | (clamp & ~seg)
        j = (
            lane - bv
            if mode == "up"
            else lane + bv
            if mode == "down"
            else lane ^ bv
            if mode == "bfly"
            else low | (bv & ~seg)
        )
        ok = j >= top if mode == "up" else j <= top
        j = np.broadcast_to(np.where(ok, j, lane), v.shape)
        r = np.take_along_axis(v, j, 1)
        if m.amask is not None:  # reading a lane that takes no part is undefined: poison
            r = np.where(np.take_along_axis(m.amask.reshape(-1, WARP), j, 1), r, U4.type(0xFFFFFFFF))
        put(m, np.ascontiguousarray(r).reshape(-1))
        pput(m, np.broadcast_to(ok, v.shape).reshape(-1))

    i.run = ex


def _ballot(m, p):
    bits = (p & m.active()).reshape(-1, WARP).astype(U8) << np.arange(WARP, dtype=U8)
    return np.repeat(bits.sum(1).astype(U4), WARP)


@op("vote")
def _(d, i):
    d.types("sync", "all", "any", "uni", "ballot")
    mode, p = i.mods[1], d.src(i.ops[1], "pred")
    put = d.dst(i.ops[0], "b32" if mode == "ballot" else "pred")
    _member(d, i, i.ops[2])
    mem = d.src(i.ops[2], "u32")

    def ex(m):
        yes, here = _ballot(m, m.full(p(m))) & mem(m), _ballot(m, np.ones(m.L, bool)) & mem(m)
        put(
            m,
            {
                "ballot": lambda: yes,
                "any": lambda: yes != 0,
                "all": lambda: yes == here,
                "uni": lambda: (yes == here) | (yes == 0),
            }[mode](),
        )

    i.run = ex


@op("activemask")
def _(d, i):
    put, i.cls = d.dst(i.ops[0], "b32"), "warp"
    i.run = lambda m: put(m, _ballot(m, np.ones(m.L, bool)))


@op("elect")
def _(d, i):
    put, pput = d.dst(i.ops[0][1], "b32"), d.dst(i.ops[0][2], "pred")
    _member(d, i, i.ops[1])

    def ex(m):
        first = m.active().reshape(-1, WARP).argmax(1).astype(U4)
        lead = np.repeat(first, WARP)
        put(m, lead)
        pput(m, lead == np.tile(np.arange(WARP, dtype=U4), m.W))

    i.run = ex


@op("redux")
def _(d, i):
    t = d.types("sync", "add", "min", "max", "and", "or", "xor", "abs", "NaN")[-1]
    nan = "NaN" in i.mods or not is_float(t)
    name = i.mods[1]
    f = {**_BITWISE, "add": np.add, "min": _fmin(nan), "max": _fmax(nan)}[name]
    a, put = d.src(i.ops[1], t), d.dst(i.ops[0], t)
    _member(d, i, i.ops[2])
    if is_float(t):
        neutral = {"min": np.inf, "max": 0 if "abs" in i.mods else -np.inf}[name]
    else:
        info = np.iinfo(int_dtype(t))
        neutral = {"min": info.max, "max": info.min, "and": -1 if info.min else info.max}.get(name, 0)

    def ex(m):
        v = a(m)
        v = np.abs(v) if "abs" in i.mods else v
        v = np.where(m.active(), m.full(v), v.dtype.type(neutral)).reshape(-1, WARP)
        put(m, np.repeat(f.reduce(v, axis=1, dtype=v.dtype), WARP))

    i.run = ex


@op("ldmatrix", "stmatrix")
def _(d, i):
    d.types("sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta", "b16")
    if "m8n8" not in i.mods or "b16" not in i.mods:
        d.no()
    n = int(next(m[1] for m in i.mods if m in ("x1", "x2", "x4")))
    vec, mem = (i.ops[0], i.ops[1]) if i.op == "ldmatrix" else (i.ops[1], i.ops[0])
    parts = vec[1] if vec[0] == "v" else [vec]
    trans, a = "trans" in i.mods, d.addr(mem)
    i.kind, i.cls = "sync", i.op
    site = d.site(i, "shared", i.op, 16)
    puts = [d.dst(p, "b32") for p in parts] if i.op == "ldmatrix" else None
    vals = None if puts else [d.src(p, "b32") for p in parts]

    def ex(m):
        addr = m.full(a(m))
        rows = np.tile(np.arange(WARP) < 8 * n, m.W) & m.active()
        idx, act = np.flatnonzero(rows), m.amask
        m.amask = rows
        m.count_shared(site, addr, 16)
        m.amask = act
        flat = m.sflat(addr[idx], 16, idx, m.stride, m.S, "shared")
        j = (flat >> 1)[:, None] + np.arange(8)
        warps = np.flatnonzero(rows.reshape(-1, WARP).any(1))
        if puts:
            m.check_race(flat, 16, idx, False)
            t = m.sviews[2][j].reshape(len(warps), n, 8, 8)
            t = np.ascontiguousarray(t.transpose(0, 1, 3, 2)) if trans else t
            for k, put in enumerate(puts):
                full = np.zeros((m.W, WARP), U4)
                full[warps] = np.ascontiguousarray(t[:, k]).view(U4).reshape(-1, WARP)
                put(m, full.reshape(-1))
        else:
            t = np.stack([np.ascontiguousarray(m.full(v(m))).reshape(m.W, WARP)[warps] for v in vals], 1)
            t = t.view(U2).reshape(-1, n, 8, 8)
            t = t.transpose(0, 1, 3, 2) if trans else t
            m.sviews[2][j] = t.reshape(-1, 8)
            m.check_race(flat, 16, idx, True)

    i.run = ex


@op("mma")
def _(d, i):
    m_ = re.fullmatch(r"m(\d+)n(\d+)k(\d+)", next((x for x in i.mods if re.match(r"m\d+n", x)), ""))
    ts = d.types("sync", "aligned", "row", "col", "satfinite", m_[0] if m_ else "")
    if (
        not m_
        or (int(m_[1]), int(m_[2])) != (16, 8)
        or len(ts) != 4
        or "row" not in i.mods
        or "satfinite" in i.mods
    ):
        d.no()
    k, (dt_, at, bt, ct) = int(m_[3]), ts
    per = 32 // type_bits(at) if at != "tf32" else 1  # matrix elements in a register
    na, nb = 16 * k // 32 // per, 8 * k // 32 // per
    if (
        dt_ != ct
        or at[-1] != bt[-1]
        or dt_ not in ("f32", "f16", "s32")
        or (na, nb) != (len(i.ops[1][1]), len(i.ops[2][1]))
    ):
        d.no()
    i.kind, i.cls, i.flops = "sync", "mma", 2 * 16 * 8 * k // 32
    lane = np.arange(WARP)
    g, tig = lane // 4, lane % 4

    def index(regs, place, shape):
        """Where each element of a fragment lies in the (lane, register, part) array of a warp."""
        at_ = np.zeros(shape, np.int64)
        for r in range(regs):
            for e in range(per):
                at_[place(r, e)] = (lane * regs + r) * per + e
        return at_.reshape(-1)

    ia = index(na, lambda r, e: (g + 8 * (r % 2), tig * per + e + 4 * per * (r // 2)), (16, k))
    ib = index(nb, lambda r, e: (tig * per + e + 4 * per * r, g), (k, 8))
    fa, fb = ([d.src(p, "b32") for p in o[1]] for o in i.ops[1:3])
    fc, puts = [d.src(p, "b32") for p in i.ops[3][1]], [d.dst(p, "b32") for p in i.ops[0][1]]
    ra, rb, acc, wr = reader(at), reader(bt), reader(ct), writer(dt_)
    part = UINT[4 // per]

    def gather(m, fs, rd, where, shape):
        w = np.stack([m.full(f(m)) for f in fs], -1).reshape(m.W, -1)
        v = np.ascontiguousarray(w).view(part)[:, where]
        return rd(np.ascontiguousarray(v).reshape(-1)).astype(F8).reshape(m.W, *shape)

    def ex(m):
        prod = gather(m, fa, ra, ia, (16, k)) @ gather(m, fb, rb, ib, (k, 8))
        prod = (
            prod.reshape(m.W, 2, 8, 4, 2).transpose(1, 0, 2, 3, 4).reshape(2, m.L, 2)
        )  # [row half, lane, column]
        for r in range(2):  # C and D: two columns of row g, then of row g + 8
            if dt_ == "f16":
                c = acc(np.ascontiguousarray(m.full(fc[r](m))).view(U2)).reshape(m.L, 2)
                puts[r](m, np.ascontiguousarray(wr(prod[r] + c)).view(U4).reshape(-1))
                continue
            for e in range(2):
                s = prod[r, :, e] + acc(fc[2 * r + e](m))
                puts[2 * r + e](m, wr(s.astype("i8").astype("i4") if dt_ == "s32" else s))

    i.run = ex
