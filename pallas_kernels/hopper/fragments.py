"""Packed codes as register operands of WGMMA.

Two codes at a time become two 16-bit floats in a register. An integer is put into the mantissa of a power of two, by
one logical operation, and what is too much is subtracted: exact, and without a conversion. Codes of several planes are
put together on the way. Where a code of bfloat16 weights is a field of a byte it stays where it lies: a bfloat16 below
the smallest normal number, which the multiplication that scales it takes exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from ..codecs import Codec
from ..codecs.fp8 import Fp8
from ..codecs.integer import Int
from ..codecs.lloyd_max import LloydMax
from ..codecs.nf4 import LEVELS, NF4
from ..codecs.packing import PLANES
from . import asm
from .layout import ROW, ROWS, WGMMA, tiled
from .lookup import look_up, own_copy
from .polynomial import odd_polynomial


@dataclasses.dataclass(frozen=True)
class Field:
    """Some bits of a code: in the bytes of `stream`, from bit `shift` on; they count from bit `up` of the code."""

    stream: int
    shift: int
    width: int
    up: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the codes of a row are taken apart.

    A row is `pieces` equal parts, each of as many columns as every stream has bytes; a stream begins at that number of
    bytes times its number.

    Attributes:
      streams: how many.
      fields: for each piece the fields of its codes.
      kind: "int", "levels", "odd" (levels that mirror each other) or "float".
      bits: of a code.
      middle: what is subtracted from a code where there is no table of zeros.
      tables: the parts beside the codes, in order.
      mantissa: bits, of a float.
      levels: in order, where the kind is "levels" or "odd".
    """

    streams: int
    fields: tuple[tuple[Field, ...], ...]
    kind: str
    bits: int
    middle: int = 0
    tables: tuple[str, ...] = ("scale",)
    mantissa: int = 0
    levels: tuple[float, ...] = ()

    @property
    def pieces(self) -> int:
        return len(self.fields)

    @property
    def terms(self) -> int:
        """Numbers that make a value of a level: a scale, and what is added."""
        return len(self.tables)

    @property
    def has_zero(self) -> bool:
        return "zero" in self.tables


def plan_of(codec: Codec) -> Plan:
    """The plan of a codec. Raises NotImplementedError, with the reason, where there is none."""
    if isinstance(codec, Int) and codec.bits > 1:
        tables = ("scale",) if codec.symmetric else ("scale", "zero")
        return Plan(*_planes(codec.bits), "int", codec.bits, int(codec.middle), tables)
    if isinstance(codec, LloydMax) and codec.bits > 1:
        levels = tuple(map(float, codec.levels))
        return Plan(*_planes(codec.bits), "odd", codec.bits, 0, ("scale", "mean"), levels=levels)
    if isinstance(codec, NF4):
        return Plan(*_planes(4), "levels", 4, levels=tuple(map(float, LEVELS)))
    if isinstance(codec, Fp8):
        return Plan(*_planes(8), "float", 8, mantissa={"e4m3": 3, "e5m2": 2}[codec.element])
    raise NotImplementedError(f"no kernel for {codec.name}")


def _planes(bits: int) -> tuple[int, tuple[tuple[Field, ...], ...]]:
    pieces = max(8 // width for width in PLANES[bits])
    fields: list[list[Field]] = [[] for _ in range(pieces)]
    stream, up = 0, bits
    for width in PLANES[bits]:
        up -= width
        bytes_ = pieces * width // 8  # of the plane, in pieces
        for j in range(pieces):
            fields[j].append(Field(stream + j % bytes_, width * (j // bytes_), width, up))
        stream += bytes_
    return stream, tuple(map(tuple, fields))


def refusal(codec: Codec, length: int) -> str:
    """Why rows of `length` codes can't be taken; "" where they can."""
    try:
        plan = plan_of(codec)
    except NotImplementedError as error:
        return str(error)
    group = getattr(codec, "group", None)
    if length % (64 * plan.pieces):
        return f"K = {length} is no multiple of {64 * plan.pieces}"
    if group is not None and group < length and group % 16:
        return f"groups of {group} are no multiple of 16"
    return ""


MAGIC = {"bfloat16": 128, "float16": 1024}  # from here on integers are a unit apart


def magic_bits(dtype: Any) -> int:
    return int(np.asarray(MAGIC[jnp.dtype(dtype).name], dtype).view(np.uint16))


def offset_of(plan: Plan, dtype: Any) -> int:
    """What `expand` without terms gives over the code, where there is a table of zeros."""
    return -128 if plan.bits == 8 and dtype == jnp.bfloat16 else MAGIC[jnp.dtype(dtype).name]


LOWEST = {"bfloat16": 133, "float16": 24}  # the lowest bit is 2 to minus that
SIGN = 0x8000
X_UNIT = 2.0**64  # products of codes in place with so much of x are normal numbers
DOWN = 33  # weights made of codes in place are 2**-33 of what they are


def is_in_place(plan: Plan, dtype: Any) -> bool:
    """Whether `expand` makes scaled weights of codes where they lie: scales have to be below 2**27."""
    return plan.kind == "int" and plan.streams == 1 and dtype == jnp.bfloat16


def weight_unit(plan: Plan, dtype: Any) -> float:
    """What a weight is to what `expand` makes of it with terms."""
    return 2.0**DOWN if is_in_place(plan, dtype) else 1.0


def terms_of(
    plan: Plan, piece: int, tables: Sequence[jax.Array], dtype: Any
) -> tuple[jax.Array, ...]:
    """What `expand` wants of a piece's table entries: scale, scale and mean, or base, scale and rest.

    ``(code - zero) * scale = (code - base) * scale + rest`` with an integer base, so that nothing is lost where zeros
    are integers, and next to nothing where they are not.
    """
    scale = tables[0].astype(jnp.float32)
    unit = code_unit(plan, piece, dtype) / 2.0**DOWN if is_in_place(plan, dtype) else 1.0
    if not plan.has_zero:
        return ((scale * unit).astype(dtype), *(t.astype(dtype) for t in tables[1:]))
    zero = tables[1].astype(jnp.float32)
    if is_in_place(plan, dtype):
        base = jnp.round(zero).astype(dtype)
        rest = (base.astype(jnp.float32) - zero) * scale * 2.0**-DOWN
        return base, (scale * unit).astype(dtype), rest.astype(dtype)
    base = jnp.round(zero)
    rest = (base - zero) * scale
    return tuple(t.astype(dtype) for t in (base + offset_of(plan, dtype), scale, rest))


def code_unit(plan: Plan, piece: int, dtype: Any) -> float:
    """What a code of a piece is to the 16-bit float that it is in place."""
    return 2.0 ** (LOWEST[jnp.dtype(dtype).name] - plan.bits * piece)


def stays_in_place(plan: Plan, dtype: Any, is_scaled: bool) -> bool:
    """Whether `expand` leaves codes where they lie: to be scaled, or where nothing is to be subtracted."""
    return is_in_place(plan, dtype) and (is_scaled or not plan.middle)


def expand(
    codes: Sequence[Any],
    half: int,
    terms: Sequence[Sequence[jax.Array]],
    plan: Plan,
    *,
    dtype: Any,
    row_bytes: int,
    interpret: bool,
    pieces: range | None = None,
    lookup: Any = None,
) -> list[jax.Array]:
    """64 bytes of every stream as A operands ``[64, 64]``, one for each piece, columns as `permute_columns` has them.

    Args:
      codes: a tile ``uint8[64, row_bytes]`` of each stream in shared memory.
      half: which 64 bytes.
      terms: for each piece `terms_of` its tables, as they are or from `pick_terms`, or () for codes less `middle`,
        unscaled, in place where `middle` is 0; where there is a table of zeros those are codes and `offset_of`.
      pieces: which, None for all; each takes 16 registers.
      lookup: the table of `lookup_scratch`, filled, where the plan has one.
    """
    pieces = range(plan.pieces) if pieces is None else pieces
    if interpret:
        return _expanded([ref[...] for ref in codes], half, terms, plan, dtype, pieces)
    flat, tree = jax.tree.flatten(list(map(tuple, terms)))
    layouts = [ROW if t.ndim == 1 else WGMMA for t in flat]
    ref, levels = plgpu.RefType(tiled(jnp.uint8, row_bytes)), _given(lookup)

    @asm.inline(
        arg_types=([ref] * plan.streams, layouts, [plgpu.RefType()] * len(levels)),
        return_type=[plgpu.ShapeDtypeStruct((ROWS, 64), dtype, layout=WGMMA)] * len(pieces),
    )
    def run(ctx, refs, flat, levels):
        words = load_words(refs, half, row_bytes)
        pairs = [[_pair_of(v, half) for v in t.registers.flat] for t in flat]
        maker = _maker(plan, jnp.dtype(dtype), bool(flat), levels)
        registers = maker(words, jax.tree.unflatten(tree, pairs), pieces)
        return [asm.array(r, WGMMA, (ROWS, 64)) for r in registers]

    return run(list(codes), flat, levels)


def _pair_of(term: Any, half: int) -> Any:
    """A term for two codes."""
    kind = ir.VectorType(term.type)
    if kind.element_type == asm.i32():  # from `pick_terms`
        return asm.extract(term, 0)
    return asm.doubled(term, 0 if kind.shape[0] == 1 else half)


def _given(lookup: Any) -> list[Any]:
    """As operands."""
    return [] if lookup is None else [lookup]


def load_words(refs: Sequence[Any], half: int, row_bytes: int) -> list[list[list[Any]]]:
    """A thread's 16 bytes of each stream and of its two rows, as words."""
    warp, g, q = asm.lanes()
    turn = g if row_bytes == 128 else arith.shrui(g, asm.const(1))  # the swizzle
    chunk = arith.xori(arith.addi(q, asm.const(4 * half)), turn)
    row = arith.muli(asm.first_row(warp, g), asm.const(row_bytes))
    start = arith.addi(row, arith.muli(chunk, asm.const(16)))
    quad, byte = ir.VectorType.get((4,), asm.i32()), ir.IntegerType.get_signless(8)
    out = []
    for ref in refs:
        pointer, rows = asm.pointer(ref), []
        for r in range(2):
            place = asm.at(pointer, arith.addi(start, asm.const(8 * row_bytes * r)), byte)
            v = llvm.load(quad, place, alignment=16)
            take = lambda t, v=v: vector.extract(v, dynamic_position=[], static_position=[t])
            rows.append([take(t) for t in range(4)])
        out.append(rows)
    return out


def load_in_order(
    codes: Sequence[Any], half: int, row_bytes: int, interpret: bool
) -> list[jax.Array]:
    """64 bytes of each row of a tile ``uint8[64, row_bytes]`` of each stream: opaque, for `expand_in_order`."""
    if interpret:
        return [ref[:, 64 * half : 64 * half + 64].astype(jnp.int32) for ref in codes]
    ref = plgpu.RefType(tiled(jnp.uint8, row_bytes))

    @asm.inline(
        arg_types=[ref] * len(codes),
        return_type=[plgpu.ShapeDtypeStruct((ROWS, 16), jnp.int32, layout=WGMMA)] * len(codes),
    )
    def run(ctx, *refs):
        pair = ir.VectorType.get((2,), asm.i32())
        out = []
        for ref in refs:
            words = _load_in_order(ref, half, row_bytes)
            registers = np.empty((2, 2), dtype=object)
            for r in range(2):
                for o in range(2):
                    registers[o, r] = asm.vector_of(pair, words[r][2 * o : 2 * o + 2])
            out.append(asm.array(registers, WGMMA, (ROWS, 16), is_signed=True))
        return out

    return run(*codes)


def expand_in_order(
    words: Sequence[jax.Array],
    piece: int,
    terms: Any,
    plan: Plan,
    *,
    dtype: Any,
    interpret: bool,
    lookup: Any = None,
) -> jax.Array:
    """64 bytes of every stream as the A operand ``[64, 64]`` of one piece, columns in their own order.

    More loads than `expand` has, and no order that the other operand must follow.

    Args:
      words: from `load_in_order`.
      terms: for 1, 2 or 4 equal parts of the columns `terms_of` their tables, ``[64]`` each.
      lookup: as for `expand`.
    """
    if interpret:
        return _in_order(words, piece, terms, plan, jnp.dtype(dtype))
    flat, tree = jax.tree.flatten(list(map(tuple, terms)))
    levels = _given(lookup)

    @asm.inline(
        arg_types=([WGMMA] * plan.streams, [ROW] * len(flat), [plgpu.RefType()] * len(levels)),
        return_type=plgpu.ShapeDtypeStruct((ROWS, 64), dtype, layout=WGMMA),
    )
    def run(ctx, words, flat, levels):
        own = jax.tree.unflatten(tree, [[asm.doubled(v) for v in t.registers.flat] for t in flat])
        maker = _maker(plan, jnp.dtype(dtype), bool(flat), levels)
        streams = [w.registers.reshape(2, 2) for w in words]
        registers = np.empty((8, 2), dtype=object)
        for r in range(2):
            for t in range(4):
                mine = [asm.extract(stream[t // 2, r], t % 2) for stream in streams]
                terms_ = maker.terms(piece, [term[r] for term in own[t * len(own) // 4]])
                for o, pair in enumerate(maker.pairs(mine)[piece]):
                    registers[2 * t + o, r] = asm.bits(maker.scaled(pair, terms_), maker.vector)
        return asm.array(registers, WGMMA, (ROWS, 64))

    return run(list(words), flat, levels)


def _load_in_order(ref: Any, half: int, row_bytes: int) -> list[list[Any]]:
    """For a thread's two rows and each 16 columns a word of its four: 2 q, 2 q + 8, 2 q + 1, 2 q + 9."""
    warp, g, q = asm.lanes()
    row = arith.muli(asm.first_row(warp, g), asm.const(row_bytes))
    turn = g if row_bytes == 128 else arith.shrui(g, asm.const(1))  # the swizzle
    own = arith.addi(row, arith.muli(q, asm.const(2)))
    byte, short = (ir.IntegerType.get_signless(n) for n in (8, 16))

    def load(r: int, t: int, h: int) -> Any:
        chunk = arith.muli(arith.xori(turn, asm.const(4 * half + t)), asm.const(16))
        start = arith.addi(arith.addi(own, chunk), asm.const(8 * row_bytes * r + 8 * h))
        found = llvm.load(short, asm.at(asm.pointer(ref), start, byte), alignment=2)
        return arith.extui(asm.i32(), found)

    join = lambda a, b: asm.word("prmt.b32 $0, $1, $2, $3;", a, b, asm.const(0x5140))
    return [[join(load(r, t, 0), load(r, t, 1)) for t in range(4)] for r in range(2)]


def place(word: Any, o: int) -> Any:
    """A word whose bytes 0 and 2 are the bytes o and o + 2."""
    return arith.shrui(word, asm.const(8)) if o else word


def _field(field: Field) -> Any:
    """The mask of a field in bytes 0 and 2."""
    return asm.const(asm.both((2**field.width - 1) << field.shift))


class _Maker:
    """Registers of A: for each piece ``[octet of columns, row]``; an octet is 2 t + o."""

    def __init__(self, plan: Plan, dtype: Any):
        self.plan, self.dtype = plan, dtype
        self.kind = "bf16x2" if dtype == jnp.bfloat16 else "f16x2"
        self.magic = asm.const(asm.both(magic_bits(dtype)))
        element = ir.BF16Type.get() if dtype == jnp.bfloat16 else ir.F16Type.get()
        self.vector = ir.VectorType.get((2,), element)

    def __call__(self, words: Any, terms: Any, pieces: range) -> list[np.ndarray]:
        out = [np.empty((8, 2), dtype=object) for _ in pieces]
        for r in range(2):
            for t in range(4):
                pairs = self.pairs([stream[r][t] for stream in words])
                for piece, registers in zip(pieces, out):
                    own = self.terms(piece, [term[r] for term in terms[piece]])
                    for o, pair in enumerate(pairs[piece]):
                        registers[2 * t + o, r] = asm.bits(self.scaled(pair, own), self.vector)
        return out

    def terms(self, piece: int, terms: list[Any]) -> list[Any]:
        """What `scaled` wants of the terms of a piece."""
        return terms

    def pairs(self, words: list[Any]) -> list[list[Any]]:
        """For each piece the levels of bytes 0 and 2, and of bytes 1 and 3, of the words of a thread."""
        return [[self.pair(words, fields, o) for o in range(2)] for fields in self.plan.fields]

    def pair(self, words: list[Any], fields: tuple[Field, ...], o: int) -> Any:
        raise NotImplementedError

    def scaled(self, pair: Any, terms: list[Any]) -> Any:
        if len(terms) == 2:
            return self.fma(pair, *terms)
        return self.mul(pair, terms[0]) if terms else pair

    def code(self, words: list[Any], fields: tuple[Field, ...], o: int, over: Any) -> Any:
        """Codes of bytes o and o + 2 in the low bits of two halves, put over a word."""
        for f in fields:
            v, shift = words[f.stream], 8 * o + f.shift - f.up
            if shift:
                move = arith.shrui if shift > 0 else arith.shli
                v = move(v, asm.const(abs(shift)))
            mask = asm.const(asm.both((2**f.width - 1) << f.up))
            over = asm.word("lop3.b32 $0, $1, $2, $3, 0xEA;", v, mask, over)
        return over

    def constant(self, x: float) -> Any:
        return asm.const(asm.both(int(np.asarray(x, self.dtype).view(np.uint16))))

    def sub(self, a: Any, b: Any) -> Any:
        return asm.word(f"sub.rn.{self.kind} $0, $1, $2;", a, b)

    def mul(self, a: Any, b: Any) -> Any:
        return asm.word(f"mul.rn.{self.kind} $0, $1, $2;", a, b)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return asm.word(f"fma.rn.{self.kind} $0, $1, $2, $3;", a, b, c)


class _Ints(_Maker):
    def pair(self, words: list[Any], fields: tuple[Field, ...], o: int) -> Any:
        if self.plan.bits == 8 and self.dtype == jnp.bfloat16:
            return self.byte(words[0], o)
        if self.dtype == jnp.float16 and self.plan.streams == 1 and not self.plan.has_zero:
            return self.in_place(words[0], fields[0], o)
        x = self.code(words, fields, o, self.magic)
        less = MAGIC[self.dtype.name] + self.plan.middle
        return x if self.plan.has_zero else self.sub(x, self.constant(less))

    def in_place(self, word: Any, field: Field, o: int) -> Any:
        """A code less `middle` from where it lies: exact, and without a shift of its own; see `halves`."""
        v, up = place(word, o), 2.0**field.shift
        x = asm.word("lop3.b32 $0, $1, $2, $3, 0xEA;", v, _field(field), self.magic)
        less = MAGIC[self.dtype.name] / up + self.plan.middle
        return self.fma(x, self.constant(1 / up), self.constant(-less))

    def byte(self, word: Any, o: int) -> Any:
        """A code less 128: its low 7 bits over 128, less 256 or, where the high bit is set, 128."""
        v = place(word, o)
        low, high = asm.const(asm.both(0x7F)), asm.const(asm.both(0x80))
        a = asm.word("lop3.b32 $0, $1, $2, $3, 0xEA;", v, low, self.magic)
        b = asm.word("lop3.b32 $0, $1, $2, $3, 0xAE;", v, high, self.magic)  # (~v & high) | magic
        return self.sub(a, b)

    def scaled(self, pair: Any, terms: list[Any]) -> Any:
        if not (self.plan.has_zero and terms):
            return super().scaled(pair, terms)
        base, scale, rest = terms
        return self.fma(self.sub(pair, base), scale, rest)


class _InPlace(_Maker):
    """Codes where they lie, to be scaled; the same rounding as after a subtraction."""

    def terms(self, piece: int, terms: list[Any]) -> list[Any]:
        up, middle = self.plan.bits * piece, self.plan.middle
        if not terms:
            return terms
        if self.plan.has_zero:
            base, scale, rest = terms
            return [self.mul(base, asm.const(asm.both(1 << up))), scale, rest]
        (scale,) = terms
        return [scale, self.mul(scale, asm.const(asm.both(SIGN | middle << up)))]

    def pair(self, words: list[Any], fields: tuple[Field, ...], o: int) -> Any:
        (field,), (word,) = fields, words
        return arith.andi(place(word, o), _field(field))

    def scaled(self, pair: Any, terms: list[Any]) -> Any:
        if not terms:
            return pair
        *base, scale, rest = terms
        return self.fma(self.sub(pair, *base) if base else pair, scale, rest)


class _Odd(_Maker):
    """Levels that mirror each other, as `halves` makes them."""

    def pair(self, words: list[Any], fields: tuple[Field, ...], o: int) -> Any:
        down, coefficients = odd_polynomial(self.plan.levels)
        code = self.sub(self.code(words, fields, o, self.magic), self.magic)
        middle = (2**self.plan.bits - 1) / 2
        u = self.fma(code, self.constant(2.0**-down), self.constant(-middle / 2**down))
        *rest, value = map(self.constant, coefficients)
        square = self.mul(u, u)
        for c in reversed(rest):
            value = self.fma(value, square, c)
        return self.mul(u, value)


class _Floats(_Maker):
    """8-bit floats: their bits moved to the places of a wider float's, and the exponent's bias made up for."""

    def pair(self, words: list[Any], fields: tuple[Field, ...], o: int) -> Any:
        exponent = 7 - self.plan.mantissa
        wide, bias = (7, 127) if self.dtype == jnp.bfloat16 else (10, 15)
        up = wide - self.plan.mantissa
        v, shift = words[0], up - 8 * o
        move = arith.shli if shift > 0 else arith.shrui
        v = move(v, asm.const(abs(shift))) if shift else v
        sign = words[0] if o else arith.shli(words[0], asm.const(8))
        body = arith.andi(v, asm.const(asm.both(0x7F << up)))
        v = asm.word("lop3.b32 $0, $1, $2, $3, 0xEA;", sign, asm.const(asm.both(0x8000)), body)
        return self.mul(v, self.constant(2.0 ** (bias - (2 ** (exponent - 1) - 1))))


class _Levels(_Maker):
    """16 levels, looked up for two codes at once."""

    def __init__(self, plan: Plan, dtype: Any, lookup: Any):
        super().__init__(plan, dtype)
        self.own = own_copy(lookup)

    def pair(self, words: list[Any], fields: tuple[Field, ...], o: int) -> Any:
        (field,) = fields
        up = words[field.stream]
        if field.shift == 0:
            up = arith.shli(up, asm.const(4))
        return look_up(self.own, arith.andi(up, asm.const(asm.both(0xF0F0))), o)


MAKERS = {"int": _Ints, "odd": _Odd, "float": _Floats, "levels": _Levels}


def _maker(plan: Plan, dtype: Any, is_scaled: bool, levels: Sequence[Any]) -> _Maker:
    if stays_in_place(plan, dtype, is_scaled):
        return _InPlace(plan, dtype)
    return MAKERS[plan.kind](plan, dtype, *levels)


def _expanded(
    codes: list[jax.Array], half: int, terms: Any, plan: Plan, dtype: Any, pieces: range
) -> list[jax.Array]:
    """`expand` in plain jnp."""
    start = 64 * half

    def ordered(x: jax.Array) -> jax.Array:
        x = x[:, start : start + 64]
        return x.reshape(ROWS, 4, 4, 2, 2).transpose(0, 2, 4, 1, 3).reshape(ROWS, 64)

    def column(t: jax.Array) -> jax.Array:
        if t.ndim == 1:
            return t[:, None].astype(jnp.float32)
        own = t[:, half::2].astype(jnp.float32)[:, None, None, :, None]
        return jnp.broadcast_to(own, (ROWS, 4, 2, 4, 2)).reshape(ROWS, 64)

    streams, out = [ordered(c).astype(jnp.int32) for c in codes], []
    for piece in pieces:
        out.append(_values(streams, piece, [column(t) for t in terms[piece]], plan, dtype))
    return out


def _in_order(
    streams: Sequence[jax.Array], piece: int, terms: Any, plan: Plan, dtype: Any
) -> jax.Array:
    """`expand_in_order` in plain jnp."""
    wide = lambda entries: jnp.repeat(
        jnp.stack([t.astype(jnp.float32) for t in entries], 1), 64 // len(terms), axis=1
    )
    return _values(streams, piece, list(map(wide, zip(*terms))), plan, dtype)


def _values(
    streams: Sequence[jax.Array], piece: int, columns: list[jax.Array], plan: Plan, dtype: Any
) -> jax.Array:
    """A piece of the bytes of every stream as numbers.

    Args:
      columns: its terms, spread over the numbers; none for levels unscaled.
    """
    code = code_of(streams, plan.fields[piece])
    if stays_in_place(plan, dtype, bool(columns)):
        return _placed(code, code_unit(plan, piece, dtype), columns, plan).astype(dtype)
    level = level_of(code, plan)
    if plan.has_zero:
        level = level + offset_of(plan, dtype)
    if plan.has_zero and columns:
        base, scale, rest = columns
        level = (level - base).astype(dtype).astype(jnp.float32) * scale + rest
    elif columns:
        level = level * columns[0] + (columns[1] if columns[1:] else 0)
    return level.astype(dtype)


def _placed(code: jax.Array, unit: float, columns: list[jax.Array], plan: Plan) -> jax.Array:
    """`_values` of codes in place, which a CPU takes for zero: unscaled times `X_UNIT`, scaled from their levels."""
    if not columns:
        return code * (X_UNIT / unit)
    *base, scale = columns[: len(plan.tables)]
    level = code - (base[0] if base else plan.middle)
    weight = level * (scale * (2.0**DOWN / unit)) * 2.0**-DOWN
    return weight + columns[2] if base else weight


def code_of(streams: Sequence[jax.Array], fields: tuple[Field, ...]) -> jax.Array:
    """Codes put together from their fields in the bytes of every stream, int32."""
    parts = (((streams[f.stream] >> f.shift) & (2**f.width - 1)) << f.up for f in fields)
    return jnp.asarray(sum(parts))


def level_of(code: jax.Array, plan: Plan) -> jax.Array:
    if plan.kind in ("levels", "odd"):
        hot = (code[..., None] == jnp.arange(len(plan.levels))).astype(jnp.float32)
        return sum(hot[..., i] * v for i, v in enumerate(plan.levels))  # pyright: ignore
    if plan.kind == "float":
        kind = jnp.float8_e4m3fn if plan.mantissa == 3 else jnp.float8_e5m2
        return jax.lax.bitcast_convert_type(code.astype(jnp.uint8), kind).astype(jnp.float32)
    return code.astype(jnp.float32) - (0 if plan.has_zero else plan.middle)
