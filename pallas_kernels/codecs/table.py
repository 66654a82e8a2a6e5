"""Every codec by name. A new codec is one small file and one line in `CODECS`.

A spec is a head and options: ``int4-g64-sym`` is the head ``int4`` with a group of 64, symmetric.
Which options a head takes follows from the fields of its class.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re

from .base import Codec
from .cast import Cast
from .fp8 import Fp8
from .gguf_k import Q4_K, Q5_K, Q6_K
from .gguf_legacy import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from .integer import Int
from .lloyd_max import LEVELS, LloydMax
from .mx import Mx
from .nf4 import NF4
from .nvfp4 import Nvfp4
from .qoq4 import Qoq4

# head: (class, its fixed fields, examples of the options that it takes)
CODECS: dict[str, tuple[type[Codec], dict[str, object], tuple[str, ...]]] = {
    **{f"int{bits}": (Int, {"bits": bits}, ("-g64",)) for bits in (2, 3, 5, 6, 7)},
    "int1": (Int, {"bits": 1}, ("", "-g64", "-g32-asym")),
    "int4": (
        Int,
        {"bits": 4},
        ("", "-g32", "-g64", "-g128-sym", "-tensor", "-g64-bf16", "-sym-a8"),
    ),
    "int8": (Int, {"bits": 8}, ("", "-g64", "-g128-asym", "-tensor", "-f32", "-a8")),
    **{f"lm{bits}": (LloydMax, {"bits": bits}, ("-g32",)) for bits in LEVELS},
    "nf4": (NF4, {}, ("", "-g64", "-tensor-f32")),
    "fp8_e4m3": (Fp8, {"element": "e4m3"}, ("", "-g128", "-tensor", "-a8")),
    "fp8_e5m2": (Fp8, {"element": "e5m2"}, ("", "-g32-bf16")),
    "mxfp4": (Mx, {"element": "e2m1"}, ("",)),
    "mxfp8_e4m3": (Mx, {"element": "e4m3"}, ("",)),
    "mxfp8_e5m2": (Mx, {"element": "e5m2"}, ("",)),
    "nvfp4": (Nvfp4, {}, ("",)),
    "qoq4": (Qoq4, {}, ("", "-g32-f32")),
    **{
        cls.__name__.lower(): (cls, {}, ("",))
        for cls in (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K)
    },
    **{dtype: (Cast, {"dtype": dtype}, ("",)) for dtype in ("f32", "f16", "bf16")},
}

ALIASES = {
    "w8a8": "int8-a8",
    "w4a8": "qoq4-g128",
    "float32": "f32",
    "fp32": "f32",
    "float16": "f16",
    "fp16": "f16",
    "bfloat16": "bf16",
}

FORMS = (
    "int<1-8>[-g<N>|-tensor][-sym|-asym][-f32|-bf16] (also w<1-8>[g<N>])",
    "lm<1-4>[-g<N>][-f32|-bf16]",
    "nf4[-g<N>|-tensor][-f32|-bf16]",
    "fp8_e4m3, fp8_e5m2, each [-g<N>|-tensor][-f16|-bf16]",
    "int8[-tensor][-f32|-bf16]-a8 (also w8a8), int4-sym[-tensor][-f32|-bf16]-a8, fp8_e4m3[-tensor][-f16|-bf16]-a8",
    "qoq4[-g<N>][-f32|-bf16] (also w4a8)",
    "mxfp4, mxfp8_e4m3, mxfp8_e5m2, nvfp4",
    "q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k",
    "f32, f16, bf16",
)


def get(spec: str | Codec) -> Codec:
    """The codec of a name such as ``int4-g64``, ``w4g64``, ``nf4-g64`` or ``q4_k``.

    Args:
      spec: a canonical name (see `names`), an alias, or a codec, which comes back as it is. Case
      and
        order of options do not matter.

    Raises:
      ValueError: on an unknown name, with the nearest known ones and the legal forms.
    """
    if isinstance(spec, Codec):
        return spec
    if not isinstance(spec, str):
        raise ValueError(f"`spec` is {spec!r}; expected a codec or its name")
    return _parse(spec)


def names() -> tuple[str, ...]:
    """Canonical names of examples of every codec, a few for those that take options."""
    specs = (head + tail for head, (_, _, tails) in CODECS.items() for tail in tails)
    return tuple(dict.fromkeys(get(spec).name for spec in specs))


@functools.lru_cache(maxsize=1024)
def _parse(spec: str) -> Codec:
    head, *options = _canonical(spec).split("-")
    if head not in CODECS:
        raise ValueError(_unknown(spec))
    cls, fixed, _ = CODECS[head]
    legal = {f.name for f in dataclasses.fields(cls) if f.init} - set(fixed)
    fields = dict(fixed)
    for option in options:
        field, value = _option(option)
        if field not in legal or field in fields:
            raise ValueError(
                f"codec {spec!r}: `-{option}` is not an option of {head!r}, or is given twice."
                f" Legal forms:\n  " + "\n  ".join(FORMS)
            )
        fields[field] = value
    return cls(**fields)  # pyright: ignore[reportArgumentType]


def _canonical(spec: str) -> str:
    spec = spec.strip().lower()
    if match := re.fullmatch(r"w([1-8])(?:g(\d+))?(-.*)?", spec):
        bits, group, rest = match.groups()
        return f"int{bits}" + (f"-g{group}" if group else "") + (rest or "")
    return ALIASES.get(spec, spec)


def _option(option: str) -> tuple[str, object]:
    if re.fullmatch(r"g[1-9]\d{0,8}", option):
        return "group", int(option[1:])
    simple = {
        "tensor": ("per_tensor", True),
        "sym": ("symmetric", True),
        "asym": ("symmetric", False),
        "a8": ("activations", 8),
    }
    if option in ("f32", "f16", "bf16"):
        return "scale_dtype", option
    return simple.get(option, ("", None))


def _unknown(spec: str) -> str:
    near = difflib.get_close_matches(
        _canonical(spec), [*names(), *CODECS, *ALIASES], n=4, cutoff=0.5
    )
    hint = f" Did you mean {', '.join(dict.fromkeys(near))}?" if near else ""
    return f"unknown codec {spec!r}.{hint} Legal forms:\n  " + "\n  ".join(FORMS)
