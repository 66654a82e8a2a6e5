"""StreamingLLM (https://arxiv.org/abs/2309.17453): the first tokens and the newest ones.

Differs from the paper: positions stay those of the text, as the model's own mask and rotary angles have them.
"""

from .base import Selector


def streaming(budget: int | float, *, sinks: int = 4) -> Selector:
    return Selector("streaming", budget, lambda seen: seen.at.astype("float32"), sinks=sinks)
