"""A KV method: which tokens are kept, how their rows are stored, and where."""

from __future__ import annotations

import dataclasses
from typing import Any

from stowax.pallas_kernels.codecs import RowCodec, per_token

from .merge import Merge
from .tiers import TIERS


@dataclasses.dataclass(frozen=True)
class Method:
    """One point in what is stored x selector x codec x merge x tier.

    Attributes:
      name: for reports.
      key, value: how rows of keys and values are stored. None keeps the cache's own dtype.
      residual: the newest tokens, kept in the cache's own dtype (KIVI's R). At least a block of the codecs.
      sinks: the first tokens, kept in the cache's own dtype.
      selector: which tokens are kept; None for all.
      channels: the share of each key's channels that is kept, those that queries meet most (ThinK); the first call
        chooses them, head by head. The newest `residual` tokens keep all.
      input: the rows that keys and values are made of are stored, by `key`'s codec, and keys and values are computed
        again at each attention (XQuant); see `source`.
      merge: pairs of layers share directions; see `depth`.
      tier: where the stored rows live, "device" or "host"; see `tiers`.
      private_pages: the user's word that a paged pool's pages belong to one row of the batch each; see `compress_kv`.
      paper: where the method is from.
    """

    name: str = "full"
    key: RowCodec | None = None
    value: RowCodec | None = None
    residual: int = 0
    sinks: int = 0
    selector: Any = None
    channels: float = 1.0
    input: bool = False
    merge: Merge | None = None
    tier: str = "device"
    private_pages: bool = False
    paper: str = ""

    def __post_init__(self) -> None:
        for field in ("residual", "sinks"):
            n = getattr(self, field)
            if not isinstance(n, int) or n < 0:
                raise ValueError(f"`{field}` is {n!r}; expected a number of tokens, 0 or more")
        if self.tier not in TIERS:
            raise ValueError(f"`tier` is {self.tier!r}; expected one of {list(TIERS)}")
        if not 0 < self.channels <= 1:
            raise ValueError(f"`channels` is {self.channels}; expected a share in (0, 1]")
        if self.input and (
            self.selector is not None or self.channels < 1 or self.value is not None
        ):
            raise ValueError(
                f"`input` stores one row a token for keys and values, so {self.name!r} can't have a `selector`, "
                "`channels` or a codec for `value`: leave those out"
            )
        if self.merge and (self.selector is not None or self.channels < 1 or self.block > 1):
            raise ValueError(
                f"`merge` keeps a direction for each token of two layers, so {self.name!r} can't have a `selector`, "
                "`channels` or a codec that encodes tokens together: use a codec per token, such as "
                "`per_token('int4-g32')`"
            )
        if self.channels < 1 and self.selector is not None:
            raise ValueError(
                f"`channels` and `selector` are both set in {self.name!r}; give one of them"
            )
        if self.selector is not None and self.block > 1:
            raise ValueError(
                f"`selector` evicts single tokens, but {self.name!r} encodes {self.block} tokens together: "
                "use a codec per token, such as `per_token('int4-g32', rotate=True)`"
            )
        if self.block > 1 and self.residual < self.block:
            raise ValueError(
                f"`residual` is {self.residual}, but {self.name!r} encodes {self.block} tokens together: "
                f"keep at least the newest {self.block} tokens unencoded"
            )

    @property
    def encodes(self) -> bool:
        """Whether rows are stored otherwise than in the cache's own dtype."""
        return self.key is not None or self.value is not None or self.channels < 1

    def width(self, role: str, width: int) -> int:
        """Elements of a row that are stored."""
        return width if role != "key" else max(1, round(self.channels * width))

    @property
    def needs_queries(self) -> bool:
        return self.channels < 1 or (self.selector is not None and self.selector.queries)

    @property
    def block(self) -> int:
        return max((c.block for c in (self.key, self.value) if c is not None), default=1)

    def codec(self, role: str, dtype: str) -> RowCodec:
        """The codec of a stream; "both" (latent attention) is stored as keys are."""
        chosen = self.value if role == "value" else self.key
        return chosen if chosen is not None else per_token(_SHORT.get(dtype, dtype))


_SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
