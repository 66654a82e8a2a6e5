"""Named KV methods: each one a point in selector x codec x tier, with the paper that it is from."""

from __future__ import annotations

import dataclasses
from typing import Any

from stowax.pallas_kernels.codecs import Gear, per_channel, per_token

from .kv import Merge, Method, selectors


def full() -> Method:
    """Nothing compressed: the baseline."""
    return Method("full")


def int8() -> Method:
    """8 bits, a scale for each token and head."""
    return Method("int8", per_token("int8"), per_token("int8"))


def int4(group: int = 32, *, rotate: bool = False, residual: int = 0, sinks: int = 0) -> Method:
    """4 bits per token in groups of `group`; `rotate` turns rows by a Hadamard matrix first (QuaRot,
    https://arxiv.org/abs/2404.00456)."""
    codec = per_token(f"int4-g{group}", rotate=rotate)
    name = f"{'hadamard-' if rotate else ''}int4-g{group}"
    return Method(name + _kept(residual, sinks), codec, codec, residual, sinks)


def kivi(bits: int = 2, *, group: int = 32, residual: int = 128, sinks: int = 0) -> Method:
    """KIVI (https://arxiv.org/abs/2402.02750): keys per channel, values per token, the newest tokens in full.

    Differs from the paper: the residual always holds the newest `residual` tokens (there it empties whenever it is
    full), and zero points are rounded to the grid.
    """
    key, value = per_channel(f"int{bits}-asym", group), per_token(f"int{bits}-g{group}-asym")
    name = f"kivi{bits}{_kept(residual, sinks)}"
    return Method(name, key, value, residual, sinks, paper="https://arxiv.org/abs/2402.02750")


def kv4(*, residual: int = 64, sinks: int = 4) -> Method:
    """The default at 4 bits: Lloyd-Max levels, keys per channel, values after a Hadamard rotation."""
    return _levels("kv4", 4, 4, residual, sinks)


def kv3(*, residual: int = 128, sinks: int = 4) -> Method:
    """3 bits on average: as `kv4`, values in 2 bits."""
    return _levels("kv3", 4, 2, residual, sinks)


def kv2(*, residual: int = 128, sinks: int = 4) -> Method:
    """2 bits: as `kv4`, keys and values in 2 bits."""
    return _levels("kv2", 2, 2, residual, sinks)


def _levels(name: str, key: int, value: int, residual: int, sinks: int) -> Method:
    codec = per_token(f"lm{value}-g32", rotate=True)
    return Method(name, per_channel(f"lm{key}", 32), codec, residual, sinks)


def gear(bits: int = 4, *, rank: int = 4, outliers: float = 0.02, residual: int = 64) -> Method:
    """GEAR (https://arxiv.org/abs/2403.05527): few bits, a low-rank and a sparse part for what they miss."""
    key, value = per_channel(f"int{bits}-asym", 64), per_token(f"int{bits}-g64-asym")
    parts = lambda inner: Gear(inner, rank, outliers)
    return Method(
        f"gear{bits}", parts(key), parts(value), residual, paper="https://arxiv.org/abs/2403.05527"
    )


def think(keep: float = 0.6, *, residual: int = 128) -> Method:
    """ThinK (https://arxiv.org/abs/2407.21018): the channels of keys that queries meet most; the others are dropped.

    The newest `residual` tokens keep all their channels.
    """
    name, paper = f"think-{keep}", "https://arxiv.org/abs/2407.21018"
    return Method(name, residual=residual, channels=keep, paper=paper)


def xquant(bits: int = 4, *, group: int = 128, residual: int = 0, sinks: int = 0) -> Method:
    """XQuant (https://arxiv.org/abs/2508.10395): the input of each layer in few bits, per token, in place of keys and
    values, which are computed again at each attention.

    Pays where a layer's input is narrower than keys and values together (no or few shared heads). Differs from the
    paper: without its latents for shared heads (an SVD of the weights) and its differences between layers.
    """
    codec = per_token(f"int{bits}-g{group}-asym")
    name, paper = f"xquant{bits}{_kept(residual, sinks)}", "https://arxiv.org/abs/2508.10395"
    return Method(name, codec, None, residual, sinks, input=True, paper=paper)


def minicache(
    bits: int | None = 4,
    *,
    group: int = 32,
    t: float = 0.6,
    apart: float = 0.05,
    start: float = 0.5,
    residual: int = 64,
    sinks: int = 4,
) -> Method:
    """MiniCache (https://arxiv.org/abs/2405.14366): from the middle layer on, pairs of layers share directions.

    A share `apart` of the tokens is not merged. `bits` per token for directions and for the layers and tokens that are
    not merged; None for the cache's own dtype. The newest `residual` tokens and the `sinks` are kept in full.
    """
    codec = None if bits is None else per_token(f"int{bits}-g{group}-asym")
    name, paper = f"minicache{bits or ''}", "https://arxiv.org/abs/2405.14366"
    merge = Merge(t, apart, start)
    return Method(name, codec, codec, residual, sinks, merge=merge, paper=paper)


def select(name: str, budget: int | float, **options: Any) -> Method:
    """Keeps `budget` tokens for each head, chosen by a selector.

    Args:
      name: "h2o", "snapkv", "streaming", ...; see `stowax.transforms.kv.selectors.SELECTORS`.
      budget: tokens, or a fraction of the cache's length (a float).
      options: of the selector: `recent`, `sinks`, `window`, ...
    """
    chosen = selectors.get(name, budget, **options)
    return Method(f"{name}-{budget}", selector=chosen, paper=selectors.SELECTORS[name][1])


def combine(tokens: Method, rows: Method) -> Method:
    """The tokens of one method, stored as another stores them: ``combine(select("h2o", 256), int4())``.

    Sinks and recent tokens are those of the selector, in the cache's own dtype.
    """
    if tokens.selector is None or rows.selector is not None:
        raise ValueError(
            f"`tokens` is {tokens.name!r} and `rows` is {rows.name!r}: the first must select tokens, the second not"
        )
    name = f"{tokens.name}-{rows.name}"
    return dataclasses.replace(tokens, name=name, key=rows.key, value=rows.value)


def offload(method: Method) -> Method:
    """`method` with its stored rows in host memory, fetched layer by layer: ``offload(kv4())``.

    Sinks and recent rows stay on the device. As the offloaded cache of Hugging Face's transformers.
    """
    return dataclasses.replace(method, name=f"{method.name}-host", tier="host")


def _kept(residual: int, sinks: int) -> str:
    return (f"-r{residual}" if residual else "") + (f"-s{sinks}" if sinks else "")
