"""Value types of PTX registers, and the parser: PTX text to Kernel objects."""

from __future__ import annotations

import functools
import math
import re
import struct
from dataclasses import dataclass, field

import numpy as np

U1, U2, U4, U8 = np.dtype("u1"), np.dtype("u2"), np.dtype("u4"), np.dtype("u8")
UINT = {1: U1, 2: U2, 4: U4, 8: U8}
F2, F4, F8 = np.dtype("f2"), np.dtype("f4"), np.dtype("f8")


class PTXError(RuntimeError):
    """The kernel did something that a GPU would not survive, or that has no defined result."""


class Unsupported(PTXError):
    """The kernel needs an instruction or a form of one that is not implemented here."""


class MemoryFault(PTXError):
    """An address outside every region, a misaligned address, or a store to read-only memory."""


class RaceError(PTXError):
    """Unordered accesses: two warps of a block touch the same shared memory between two barriers and one writes, or two
    threads of one instruction, or two blocks, store different values to one global address."""


# ---------------------------------------------------------------------------------------------------------------- types


@functools.cache
def type_bits(t):
    """Width in bits of a PTX scalar (or packed) type; 1 for pred."""
    if t == "pred":
        return 1
    if t in ("f16x2", "bf16x2", "tf32"):
        return 32
    m = re.fullmatch(r"(?:[busf]|bf)(\d+)", t)
    if not m or int(m[1]) not in (8, 16, 32, 64):
        raise Unsupported(f"unsupported type .{t}")
    return int(m[1])


@functools.cache
def is_type(t):
    return t in ("pred", "f16x2", "bf16x2", "tf32") or re.fullmatch(
        r"(?:b|u|s)(?:8|16|32|64|128)|f(?:16|32|64)|bf16", t
    )


def is_float(t):
    return t[0] == "f" or t.startswith("bf") or t == "tf32"


@functools.cache
def int_dtype(t):
    if is_float(t) or t == "pred":
        raise Unsupported(f"type .{t} here")
    return np.dtype(("i" if t[0] == "s" else "u") + str(type_bits(t) // 8))


def bf16_to_f32(u):
    """bfloat16 bits (uint16) to float32."""
    return (u.astype(U4) << np.uint32(16)).view(F4)


def f32_to_bf16(x):
    """float32 or float64 to bfloat16 bits, round to nearest even (no double rounding from float64)."""
    x = np.asarray(x)
    if x.dtype == F8:
        t = x.astype(F4)
        err = x - t  # round to odd: keep a sticky bit in float32's last place
        fix = (err != 0) & np.isfinite(t) & ((t.view(U4) & 1) == 0)
        away = (err > 0) == (t > 0)
        t = np.where(fix, (t.view("i4") + np.where(away, 1, -1).astype("i4")).view(F4), t)
    else:
        t = x.astype(F4)
    t = np.ascontiguousarray(t)
    u = t.view(U4)
    r = ((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(U2)
    return np.where(np.isnan(t), np.uint16(0x7FFF), r)


def narrow(raw, dt):
    return raw if raw.dtype == dt else raw.astype(dt)


@functools.cache
def reader(t):
    """raw register array -> values that NumPy can compute with (f16 and bf16 in float32; x2 types as (n, 2))."""
    if t == "pred":
        return lambda r: r
    if t in ("f32", "f64"):
        raw, dt = UINT[type_bits(t) // 8], np.dtype("f" + str(type_bits(t) // 8))
        return lambda r: narrow(r, raw).view(dt)
    if t == "tf32":
        return lambda r: (narrow(r, U4) & np.uint32(0xFFFFE000)).view(F4)
    if t == "f16":
        return lambda r: narrow(r, U2).view(F2).astype(F4)
    if t == "bf16":
        return lambda r: bf16_to_f32(narrow(r, U2))
    if t == "f16x2":
        return lambda r: np.ascontiguousarray(narrow(r, U4)).view(F2).reshape(-1, 2).astype(F4)
    if t == "bf16x2":
        return lambda r: bf16_to_f32(np.ascontiguousarray(narrow(r, U4)).view(U2).reshape(-1, 2))
    raw, dt = UINT[type_bits(t) // 8], int_dtype(t)
    return (lambda r: narrow(r, raw)) if dt == raw else (lambda r: narrow(r, raw).view(dt))


@functools.cache
def writer(t):
    """values -> raw register array of the type's own width."""
    if t == "pred":
        return lambda v: v
    if t in ("f32", "f64", "f16"):
        dt, raw = np.dtype("f" + str(type_bits(t) // 8)), UINT[type_bits(t) // 8]
        return lambda v: v.astype(dt, copy=False).view(raw)
    if t == "tf32":
        return lambda v: v.astype(F4, copy=False).view(U4)
    if t == "bf16":
        return f32_to_bf16
    if t == "f16x2":
        return lambda v: np.ascontiguousarray(v.astype(F2)).view(U4).reshape(-1)
    if t == "bf16x2":
        return lambda v: np.ascontiguousarray(f32_to_bf16(v)).view(U4).reshape(-1)
    dt, raw = int_dtype(t), UINT[type_bits(t) // 8]
    return lambda v: v.astype(dt, copy=False).view(raw)


# ----------------------------------------------------------------------------------------------------------- parser


@dataclass
class Ins:
    """One instruction: opcode, modifiers, operands; `run` is filled in by the decoder."""

    pc: int
    text: str
    line: int
    loc: str
    op: str
    mods: list
    ops: list
    guard: tuple | None
    scopes: tuple
    run: object = None
    kind: str = ""  # "", bra, brx, exit, bar, sync
    target: object = None
    cls: str = "other"
    flops: int = 0  # per thread; mma counts 1/32 of the warp's


@dataclass
class Var:
    """A variable in memory: state space, size in bytes, initial bytes, address once placed."""

    space: str
    size: int
    align: int
    init: bytes | None = None
    extern: bool = False
    addr: int = 0


class Scope:
    def __init__(self):
        self.regs, self.ranges, self.labels, self.tables = {}, {}, {}, {}


@dataclass
class Kernel:
    name: str
    params: list  # (name, offset, size, type)
    param_bytes: int
    reqntid: tuple | None
    code: list = field(default_factory=list)
    reg_bits: list = field(default_factory=list)
    vars: dict = field(default_factory=dict)  # function-level and module-level variables
    sites: list = field(default_factory=list)  # of the memory instructions, once decoded
    placed: list | None = None  # the addresses of the variables that the code was decoded with

    def layout(self, space):
        """Static bytes of a state space; places its variables from address 0."""
        at = 0
        for v in self.vars.values():
            if v.space == space and not v.extern:
                at = -(-at // v.align) * v.align
                v.addr = at
                at += v.size
        return at


def _strip_comments(text):
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


_VAR = re.compile(
    r"(?:\.(?:visible|weak|extern|common|managed)\s+)*\.(global|const|shared|local)\s+([^;]*?);", re.S
)


def _parse_var(space, decl, extern):
    align = re.search(r"\.align\s+(\d+)", decl)
    m = re.search(r"\.([busf]f?\d+)\s+([\w$%.]+)\s*((?:\[\s*\d*\s*\])*)\s*(?:=\s*(.*))?$", decl.strip(), re.S)
    if not m or ".v2" in decl or ".v4" in decl:
        raise Unsupported(f"unsupported variable declaration: .{space} {decl}")
    width = type_bits(m[1]) // 8
    dims = re.findall(r"\[\s*(\d*)\s*\]", m[3])
    n = math.prod(int(d) if d else 0 for d in dims) if dims else 1
    init = None
    if m[4]:
        values = [s.strip() for s in re.sub(r"[{}]", " ", m[4]).split(",") if s.strip()]
        if any(re.match(r"[A-Za-z_$]", s) for s in values):
            raise Unsupported(f"variable {m[2]} is initialised with an address")
        init = b"".join(imm_bits(s, type_bits(m[1])).to_bytes(width, "little") for s in values).ljust(
            n * width, b"\0"
        )
    return m[2], Var(
        space, n * width, max(int(align[1]) if align else width, 1), init, extern and (not dims or not n)
    )


def imm_bits(s, bits):
    """Bits of an immediate operand as an unsigned integer of the given width."""
    neg = s.startswith("-")
    s = s.lstrip("+-")
    if s[:2].lower() == "0f":
        v = int(s[2:], 16)
        v = v ^ 0x80000000 if neg else v
        if bits == 64:
            v = struct.unpack("<Q", struct.pack("<d", struct.unpack("<f", struct.pack("<I", v))[0]))[0]
        return v
    if s[:2].lower() == "0d":
        v = int(s[2:], 16) ^ ((1 << 63) if neg else 0)
        if bits == 32:
            v = struct.unpack("<I", struct.pack("<f", struct.unpack("<d", struct.pack("<Q", v))[0]))[0]
        return v
    if re.fullmatch(r"\d*\.\d*(e[+-]?\d+)?", s, re.I):
        v = -float(s) if neg else float(s)
        return int.from_bytes(struct.pack("<f" if bits == 32 else "<d", v), "little")
    s = s.rstrip("uU")
    v = int(s, 8) if re.fullmatch(r"0[0-7]+", s) else int(s, 0)
    return (-v if neg else v) & ((1 << bits) - 1)


_NUM = re.compile(
    r"[+-]?(0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+[uU]?|\d+\.\d*(?:[eE][+-]?\d+)?|\d+[uU]?)$"
)


class Parser:
    """PTX text -> Kernel objects. Only the wanted kernel's body is decoded."""

    def __init__(self, text):
        self.text = _strip_comments(text)
        self.text = re.sub(
            r"^\s*\.section\s+\S+\s*\{[^}]*\}",
            lambda m: "\n" * m[0].count("\n"),
            self.text,
            flags=re.S | re.M,
        )
        self.files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', self.text, re.M))
        self.text = re.sub(r"^\s*\.file\s[^\n]*", "", self.text, flags=re.M)
        self.text = re.sub(r"^\s*\.loc\s+(\d+)\s+(\d+)\s+(\d+)[^\n]*", r".loc \1 \2;", self.text, flags=re.M)
        self.text = re.sub(r"\.pragma\s+\"[^\"]*\"\s*;", "", self.text)
        self.bodies, self.module_vars = {}, {}
        self._top_level()

    def _top_level(self):
        t, at, outside = self.text, 0, []
        head = re.compile(
            r"\.(entry|func)\b\s*(?:\([^)]*\)\s*)?([\w$]+)\s*(?:\(([^)]*)\))?([^{;]*)([{;])", re.S
        )
        while m := head.search(t, at):
            outside.append(t[at : m.start()])
            at = m.end()
            if m[5] == "{":
                depth = 1
                for b in re.compile(r"[{}]").finditer(t, at):
                    depth += 1 if b[0] == "{" else -1
                    if not depth:
                        break
                if m[1] == "entry":
                    self.bodies[m[2]] = (m[3] or "", m[4], at, b.start())
                at = b.end()
        outside.append(t[at:])
        for v in _VAR.finditer("\n".join(outside)):
            name, var = _parse_var(v[1], v[2], ".extern" in v[0])
            self.module_vars[name] = var

    def kernel(self, name=None):
        if name is None:
            if len(self.bodies) != 1:
                raise PTXError(f"name one of the kernels: {', '.join(self.bodies) or 'none found'}")
            name = next(iter(self.bodies))
        if name not in self.bodies:
            raise PTXError(f"no kernel {name!r}; there is {', '.join(self.bodies)}")
        params, directives, start, end = self.bodies[name]
        k = Kernel(name, [], 0, None)
        for p in filter(None, (s.strip() for s in params.split(","))):
            m = re.search(r"\.([busf]f?\d+)\b", p)
            align = re.search(r"\.align\s+(\d+)\s+\.b8", p)
            n = re.search(r"([\w$%]+)\s*(?:\[(\d+)\])?$", p)
            width = type_bits(m[1]) // 8
            size, al = width * int(n[2] or 1), int(align[1]) if align else width
            k.param_bytes = -(-k.param_bytes // al) * al
            k.params.append((n[1], k.param_bytes, size, m[1]))
            k.param_bytes += size
        if re.search(r"\.(explicitcluster|reqnctapercluster)", directives):
            raise Unsupported(f"{name}: thread-block clusters")
        if m := re.search(r"\.reqntid\s+([\d,\s]+)", directives):
            d = [int(x) for x in m[1].split(",")]
            k.reqntid = tuple(d + [1] * (3 - len(d)))
        k.vars = {n: Var(v.space, v.size, v.align, v.init, v.extern) for n, v in self.module_vars.items()}
        self._body(k, start, end)
        return k

    def _body(self, k, at, end):
        t, scopes, loc = self.text, [Scope()], ""
        line, counted = t.count("\n", 0, at) + 1, at  # the line of position `counted`
        label = re.compile(r"([$%\w.]+)\s*:(?!:)")
        while True:
            while at < end and t[at].isspace():
                at += 1
            if at >= end:
                break
            if t[at] == "{":
                scopes.append(Scope())
                at += 1
            elif t[at] == "}":
                scopes.pop()
                at += 1
            elif t[at] == ";":
                at += 1
            elif (m := label.match(t, at)) and m.end() <= end:
                at = m.end()
                if b := re.compile(r"\s*\.branchtargets\s+([^;]*);").match(t, at):
                    scopes[-1].tables[m[1]] = [s.strip() for s in b[1].split(",")]
                    at = b.end()
                else:
                    scopes[-1].labels[m[1]] = len(k.code)
            else:
                stop = t.index(";", at)
                stmt = " ".join(t[at:stop].split())
                line, counted = line + t.count("\n", counted, at), at
                at = stop + 1
                if stmt.startswith(".loc "):
                    _, f, row = stmt.split()
                    loc = f"{self.files.get(f, f)}:{row}"
                elif stmt.startswith(".reg"):
                    self._regs(k, scopes[-1], stmt)
                elif m := _VAR.match(stmt + ";"):
                    name, var = _parse_var(m[1], m[2], ".extern" in stmt)
                    k.vars[name] = var
                elif stmt.startswith(".param"):
                    raise Unsupported(
                        f"unsupported: a call of a device function that was not inlined (PTX line {line})"
                    )
                elif stmt.startswith("."):
                    raise Unsupported(f"unsupported directive: {stmt} (PTX line {line})")
                else:
                    k.code.append(self._instruction(k, stmt, line, loc, tuple(scopes)))
        k.code.append(Ins(len(k.code), "ret", 0, loc, "ret", [], [], None, tuple(scopes)))

    @staticmethod
    def _regs(k, scope, stmt):
        m = re.match(r"\.reg\s*\.(\w+)\s+(.*)", stmt)
        if not m or m[1] in ("v2", "v4", "b128"):
            raise Unsupported(f"unsupported declaration: {stmt}")
        bits = max(type_bits(m[1]), 16) if m[1] != "pred" else 1
        for name in (s.strip() for s in m[2].split(",")):
            if r := re.fullmatch(r"([\w$%]+)<(\d+)>", name):
                scope.ranges[r[1]] = (int(r[2]), bits)
            else:
                scope.regs[name] = len(k.reg_bits)
                k.reg_bits.append(bits)

    @staticmethod
    def _reg(k, scopes, name):
        for s in reversed(scopes):
            if name in s.regs:
                return s.regs[name]
            stem = name.rstrip("0123456789")
            if stem in s.ranges and stem != name and int(name[len(stem) :]) < s.ranges[stem][0]:
                s.regs[name] = len(k.reg_bits)
                k.reg_bits.append(s.ranges[stem][1])
                return s.regs[name]
        return None

    def _instruction(self, k, stmt, line, loc, scopes):
        m = re.match(r"(?:@(!?)\s*([\w$%]+)\s+)?([a-z]\w*)((?:\.[\w:]+)*)\s*(.*)$", stmt, re.S)
        if not m:
            raise Unsupported(f"cannot parse: {stmt} (PTX line {line})")
        guard = None
        if m[2]:
            guard = (self._reg(k, scopes, m[2]), m[1] == "!")
            if guard[0] is None:
                raise Unsupported(f"unknown predicate {m[2]}: {stmt} (PTX line {line})")
        try:
            ops = [self._operand(k, s, scopes) for s in _split(m[5])]
        except (Unsupported, ValueError) as e:
            raise Unsupported(
                f"unsupported instruction {m[3]}{m[4]}: {e}\n  {stmt} (PTX line {line})"
            ) from None
        return Ins(len(k.code), stmt, line, loc, m[3], m[4].split(".")[1:], ops, guard, scopes)

    def _operand(self, k, s, scopes):
        """('r', slot) ('i', text) ('v', [..]) ('m', base, offset) ('sp', name) ('sym', name) ('|', a, b) ('!', a) ('_',)"""
        s = s.strip()
        if s == "_":
            return ("_",)
        if s[0] == "{":
            return ("v", [self._operand(k, x, scopes) for x in _split(s[1:-1])])
        if s[0] == "[":
            m = re.fullmatch(r"\[\s*([^\s+,]+)\s*(?:\+\s*(-?\w+)\s*)?\]", s)
            if not m:
                raise Unsupported(f"unsupported address {s}")
            return ("m", self._operand(k, m[1], scopes), int(m[2] or "0", 0))
        if s[0] == "!":
            return ("!", self._operand(k, s[1:], scopes))
        if "|" in s:
            a, b = s.split("|")
            return ("|", self._operand(k, a, scopes), self._operand(k, b, scopes))
        if _NUM.match(s):
            return ("i", s)
        slot = self._reg(k, scopes, s)
        if slot is not None:
            return ("r", slot)
        if s[0] == "%":
            return ("sp", s[1:])
        return ("sym", s)


def _split(s):
    """Split at commas outside braces, brackets and parentheses."""
    out, depth, start = [], 0, 0
    for i, c in enumerate(s):
        if c in "{[(":
            depth += 1
        elif c in "}])":
            depth -= 1
        elif c == "," and not depth:
            out.append(s[start:i])
            start = i + 1
    out.append(s[start:])
    return [x for x in out if x.strip()]
