"""How a kernel may find a packed weight to lie in memory."""

from __future__ import annotations

from ..codecs import Packed


def is_stored_as_shown(w: Packed) -> bool:
    """Whether `w` has its stored axes, in their order and whole: its parts are ``[*w.shape[:-1], n]``."""
    view = w.view
    return view.shape == view.storage_shape and view.dims == tuple((i,) for i in range(w.ndim))
