"""Scalar grids with a scale for each group: the frame of the int, float and table codecs.

A member says how a group's parameters are fitted and how one number becomes a code and back; this
file groups, packs and counts. Solvers (GPTQ, HQQ, clip search) work through the same five methods,
so a new grid works with all of them:

    groups = codec.split(x)                    # f32[*lead, n_groups, group], last group
    zero-padded params = codec.fit(groups)                 # each f32[*lead, n_groups, 1], as they
    will be stored codes  = codec.codes(groups, params)       # uint8, the nearest level values =
    codec.values(codes, params)       # f32 parts  = codec.assemble(codec.join(codes, length),
    params)
"""

from __future__ import annotations

import abc
import dataclasses
import functools

import jax
import jax.numpy as jnp

from .base import Codec, Parts
from .check import validate, validate_params
from .packing import pack_bits, unpack_bits

Params = dict[str, jax.Array]
SCALE_DTYPES = {"f16": jnp.float16, "bf16": jnp.bfloat16, "f32": jnp.float32}


@dataclasses.dataclass(frozen=True)
class GroupCodec(Codec):
    """A scalar grid over groups of the encoded axis.

    Attributes:
      group: elements that one scale covers; None is one scale for the whole encoded axis (a
      channel).
    """

    group: int | None = None

    @property
    @abc.abstractmethod
    def bits(self) -> int:
        """Bits of one code."""

    @abc.abstractmethod
    def fit(
        self, groups: jax.Array, *, shrink: jax.Array | float = 1.0, batch_dims: int = 0
    ) -> Params:
        """Parameters of each group, rounded to the precision they are stored in.

        Args:
          groups: ``f32[*lead, n_groups, group]``; zeros that pad the last group must not matter.
          shrink: multiplies each group's range (1 is its full range), broadcast against
            ``[*lead, n_groups, 1]``; what a clip search varies.
          batch_dims: see `Codec.encode`.

        Returns:
          Float32 arrays ``[*lead, n_groups, 1]`` (axes may be 1 where a value is shared).
        """

    @abc.abstractmethod
    def codes(self, x: jax.Array, params: Params) -> jax.Array:
        """The code of the level nearest to each `x`, ``uint8``, `params` broadcast against `x`."""

    @abc.abstractmethod
    def values(self, codes: jax.Array, params: Params) -> jax.Array:
        """The level of each code as float32, `params` broadcast against `codes`."""

    @abc.abstractmethod
    def store(self, params: Params) -> Parts:
        """Parameters as stored, each ``[*lead, n_groups]``; exact on what `fit` gives."""

    @abc.abstractmethod
    def load(self, parts: Parts) -> Params:
        """Undoes `store`: the float32 parameters, ``[*lead, n_groups, 1]``."""

    def group_size(self, length: int) -> int:
        return length if self.group is None else min(self.group, length)

    def split(self, x: jax.Array) -> jax.Array:
        """``[*lead, length]`` to ``[*lead, n_groups, group]``, the last group padded with zeros."""
        group = self.group_size(x.shape[-1])
        pad = -x.shape[-1] % group
        if pad:
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)])
        return x.reshape(*x.shape[:-1], -1, group)

    def join(self, groups: jax.Array, length: int) -> jax.Array:
        """Undoes `split`."""
        return groups.reshape(*groups.shape[:-2], -1)[..., :length]

    def assemble(self, codes: jax.Array, params: Params) -> Parts:
        """Parts of ``uint8[*lead, length]`` codes and their groups' parameters."""
        return {"codes": pack_bits(codes, self.bits), **self.store(params)}

    def disassemble(self, parts: Parts, length: int) -> tuple[jax.Array, Params]:
        """The ``uint8[*lead, length]`` codes and the parameters of `parts`."""
        params = self.load({k: v for k, v in parts.items() if k != "codes"})
        return unpack_bits(parts["codes"], self.bits, length), params

    def encode(self, x: jax.Array, *, batch_dims: int = 0) -> Parts:
        x = jnp.asarray(x)
        validate(x, batch_dims=batch_dims)
        parts, params = _encode(self, x, batch_dims)
        validate_params(params, x, self.name)
        return parts

    def decode(self, parts: Parts, length: int) -> jax.Array:
        codes, params = self.disassemble(parts, length)
        return self.join(self.values(self.split(codes), params), length)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _encode(codec: GroupCodec, x: jax.Array, batch_dims: int) -> tuple[Parts, Params]:
    groups = codec.split(x.astype(jnp.float32))
    params = codec.fit(groups, batch_dims=batch_dims)
    codes = codec.join(codec.codes(groups, params), x.shape[-1])
    return codec.assemble(codes, params), params


def check_granularity(group: int | None, per_tensor: bool) -> None:
    """Raises unless `group` and `per_tensor` say one thing."""
    if group is not None and group < 1:
        raise ValueError(f"`group` is {group}; expected a positive number of elements")
    if group is not None and per_tensor:
        raise ValueError(f"`group` is {group} and `per_tensor` is set; a codec has one of them")


def granularity_suffix(group: int | None, per_tensor: bool) -> str:
    """The part of a codec's name that says what one scale covers."""
    return "-tensor" if per_tensor else "" if group is None else f"-g{group}"


def scale_dtype_suffix(scale_dtype: str) -> str:
    """The part of a codec's name that says what scales are stored in; "" for f16."""
    return "" if scale_dtype == "f16" else f"-{scale_dtype}"


def reduce_axes(groups: jax.Array, per_tensor: bool, batch_dims: int) -> tuple[int, ...]:
    """The axes of ``[*lead, n_groups, group]`` that share a scale."""
    return tuple(range(batch_dims, groups.ndim)) if per_tensor else (-1,)


def check_activations(activations: int | None, fits: bool, group: int | None) -> None:
    if activations is not None and (activations != 8 or not fits or group is not None):
        raise ValueError(
            "activations of 8 bits (`-a8`) go with int8 and int4 without a zero point and with fp8_e4m3, a scale "
            f"for each channel or the tensor; the group is {group}: choose 'int8-a8', 'int4-sym-a8' or "
            "'fp8_e4m3-a8', or for 4 bits in groups 'qoq4-g128'"
        )


def check_scale_dtype(scale_dtype: str) -> None:
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(
            f"`scale_dtype` is {scale_dtype!r}; expected one of {sorted(SCALE_DTYPES)}"
        )


def round_scale(scale: jax.Array, scale_dtype: str) -> jax.Array:
    """`scale` rounded to what `scale_dtype` holds, as float32; never a negative zero."""
    scale = scale.astype(SCALE_DTYPES[scale_dtype]).astype(jnp.float32)
    return jnp.where(scale == 0, 0.0, scale)


def nonzero(scale: jax.Array) -> jax.Array:
    """`scale` fit to divide by: a group of zeros has the scale 0."""
    return jnp.where(scale == 0, 1.0, scale)
