"""8-bit floats, E4M3 and E5M2, with a scale that maps the largest |x| to the largest finite value.

Codes are ``uint8`` bit patterns, so that they pack, slice and save like any codes. Scales are
float32: a weight's largest magnitude over 448 is near float16's subnormals, over 57344 among them.

Source: FP8 Formats for Deep Learning (Micikevicius et al., 2022, arXiv:2209.05433).
"""

from __future__ import annotations

import dataclasses

import jax

from .elements import ELEMENTS
from .grouped import check_activations
from .scaled import FloatScaledCodec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8(FloatScaledCodec):
    """``fp8_<e4m3|e5m2>[-g<group>|-tensor][-f16|-bf16][-a8]``.

    Attributes:
      element: ``e4m3`` (E4M3FN: no infinities) or ``e5m2``.
      activations: as in `Int`; with E4M3 only.
    """

    element: str = "e4m3"
    scale_dtype: str = "f32"
    activations: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.element not in ("e4m3", "e5m2"):
            raise ValueError(f"`element` is {self.element!r}; expected 'e4m3' or 'e5m2'")
        check_activations(self.activations, self.element == "e4m3", self.group)

    @property
    def name(self) -> str:
        return f"fp8_{self.element}" + self.suffix("f32") + ("-a8" if self.activations else "")

    @property
    def bits(self) -> int:
        return 8

    @property
    def largest(self) -> float:
        return ELEMENTS[self.element].largest

    def nearest(self, x: jax.Array) -> jax.Array:
        return ELEMENTS[self.element].to_bits(x)

    def level(self, codes: jax.Array) -> jax.Array:
        return ELEMENTS[self.element].from_bits(codes)
