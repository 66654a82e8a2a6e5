import math

import jax.numpy as jnp
import numpy as np
import pytest

from stowax.models import perplexity


def nll(params, tokens):
    """Each token costs its own value; padding would show."""
    return tokens[:, 1:].astype(jnp.float32) * params


TEXT = np.arange(1, 24) % 7 + 1


@pytest.mark.parametrize("window", [2, 5, 6, 23, 24, 100])
def test_every_token_but_the_first_is_scored_once(window):
    expected = math.exp(TEXT[1:].mean())
    assert perplexity(nll, 1.0, TEXT, window=window) == pytest.approx(expected, rel=1e-6)


def test_progress():
    calls = []
    perplexity(nll, 1.0, TEXT, window=12, progress=lambda *done: calls.append(done))
    assert calls == [(1, 2), (2, 2)]


@pytest.mark.parametrize(("tokens", "window"), [([1], 4), ([[1, 2]], 4), ([1, 2, 3], 1)])
def test_bad_arguments(tokens, window):
    with pytest.raises(ValueError, match="`tokens`"):
        perplexity(nll, 1.0, tokens, window=window)
