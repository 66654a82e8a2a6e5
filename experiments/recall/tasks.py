"""Five recall tasks over 256 symbols: something stands in a context, and a question asks for it.

A context is a start token, then filler with items hidden in it. The item asked for begins at
`depth`, from 0 (first) to 1 (last). Keys, values, words and filler are disjoint ranges of tokens,
and a value follows its key directly, so that an induction head finds it. A question names its key
twice, ``ASK key ANSWER key``: all but the last token tell what is asked, and the answer follows
the last one.

After needle-in-a-haystack (https://github.com/gkamradt/LLMTest_NeedleInAHaystack), RULER
(https://arxiv.org/abs/2404.06654), passkey retrieval (https://arxiv.org/abs/2305.16300) and
induction heads (https://arxiv.org/abs/2209.11895).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

VOCABULARY = 256
START, ASK, ANSWER, PASS = range(4)
FILLER = np.arange(16, 48)
KEYS = np.arange(48, 112)
VALUES = np.arange(112, 176)
WORDS = np.arange(176, 224)
SPARE = np.arange(224, VOCABULARY)  # in no task; training begins with them


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A context with a question, or a batch of them of one length.

    Attributes:
      prompt: context and question, ``int32[T]`` or ``int32[B, T]``.
      answer: ``int32[A]`` or ``int32[B, A]``.
      context_end: where the question begins in `prompt`.
      more: other questions about the same context with their answers; empty in a batch.
    """

    prompt: np.ndarray
    answer: np.ndarray
    context_end: int
    more: tuple[tuple[np.ndarray, np.ndarray], ...] = ()


def needle(rng: np.random.Generator, length: int, depth: float) -> Example:
    """One pair ``key value`` in random filler; the value is asked for."""
    return multi_key(rng, length, depth, pairs=1)


def multi_key(rng: np.random.Generator, length: int, depth: float, *, pairs: int = 16) -> Example:
    """`pairs` pairs ``key value``, all different; the value of one is asked for."""
    keys, values = _draw(rng, KEYS, pairs, "pairs"), _draw(rng, VALUES, pairs, "pairs")
    items = np.stack([keys, values], axis=1)
    context = _hide(rng, [[item] for item in items], length, depth)
    return _example(context, [(_question(k), [v]) for k, v in items])


def variable_tracking(
    rng: np.random.Generator, length: int, depth: float, *, chains: int = 4, hops: int = 2
) -> Example:
    """Chains ``x value``, ``y x``, ``z y``: `hops` copies; the last is followed to its value.

    The answer of ``z`` is ``y x value``. The statements of a chain stand in this order, with
    filler and other chains between them; the first of the chain asked for is at `depth`.
    """
    if hops < 1:
        raise ValueError(f"`hops` must be at least 1, got {hops}.")
    values = _draw(rng, VALUES, chains, "chains")
    names = _draw(rng, KEYS, chains * (hops + 1), "chains").reshape(chains, hops + 1)
    sources = np.concatenate([values[:, None], names[:, :-1]], axis=1)
    context = _hide(rng, list(np.stack([names, sources], axis=2)), length, depth)
    asked = [
        (_question(chain[i]), [*chain[:i][::-1], value])
        for chain, value in zip(names, values)
        for i in range(hops, -1, -1)
    ]
    return _example(context, asked)


def repeated_context(
    rng: np.random.Generator,
    length: int,
    depth: float,
    *,
    segments: int = 3,
    size: int = 12,
    given: int = 4,
) -> Example:
    """`segments` random segments of `size` words; one's first `given` words come again.

    The answer is the rest of the segment.
    """
    if not 2 <= given < size:
        raise ValueError(f"`given` must be from 2 to `size` - 1 = {size - 1}, got {given}.")
    items = _draw(rng, WORDS, segments * size, "segments").reshape(segments, size)
    context = _hide(rng, [[item] for item in items], length, depth)
    return _example(context, [(item[:given], item[given:]) for item in items])


def passkey(
    rng: np.random.Generator, length: int, depth: float, *, digits: int = 5, phrase: int = 6
) -> Example:
    """A key of `digits` values after the token PASS; the filler is one phrase over and over."""
    key = _draw(rng, VALUES, digits, "digits")
    filler = np.resize(_draw(rng, FILLER, phrase, "phrase"), max(length, 1))
    context = _hide(rng, [[np.array([PASS, *key])]], length, depth, filler)
    return _example(context, [(_question(PASS), key)])


TASKS: dict[str, Callable[..., Example]] = {
    "needle": needle,
    "multi_key": multi_key,
    "variable_tracking": variable_tracking,
    "repeated_context": repeated_context,
    "passkey": passkey,
}


def batch(
    task: str, seed: int, count: int, length: int, *, depth: float | None = None, **options: int
) -> Example:
    """`count` examples of one task with contexts of `length` tokens, the same for equal arguments.

    Args:
      task: a name in `TASKS`.
      seed: of the random choices.
      count: how many, B.
      length: tokens of the context; the question comes on top.
      depth: of what is asked for; None for depths spread evenly from 0 to 1.
      options: of the task, for example ``pairs=32``.

    Returns:
      `Example` with ``prompt int32[B, T]`` and ``answer int32[B, A]``.
    """
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}; got {task!r}.")
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}.")
    rng = np.random.default_rng(seed)
    depths = np.linspace(0, 1, count) if depth is None else np.full(count, depth)
    rows = [TASKS[task](rng, length, float(d), **options) for d in depths]
    prompts, answers = np.stack([r.prompt for r in rows]), np.stack([r.answer for r in rows])
    return Example(prompts, answers, rows[0].context_end)


def _draw(rng: np.random.Generator, tokens: np.ndarray, count: int, name: str) -> np.ndarray:
    """`count` different tokens."""
    if not 1 <= count <= tokens.size:
        raise ValueError(
            f"`{name}` asks for {count} different tokens; from 1 to {tokens.size} are there."
        )
    return rng.choice(tokens, count, replace=False)


def _question(key: int) -> list[int]:
    return [ASK, key, ANSWER, key]


def _example(context: np.ndarray, asked: Sequence[tuple]) -> Example:
    pairs = [(np.array(q, np.int32), np.array(a, np.int32)) for q, a in asked]
    question, answer = pairs[0]
    return Example(np.concatenate([context, question]), answer, context.size, tuple(pairs[1:]))


def _hide(rng, groups, length: int, depth: float, filler=None) -> np.ndarray:
    """A context ``int32[length]`` with the items of all groups in it, each group's in order.

    The first item of the first group has the share `depth` of all that it can have before it.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"`depth` must be from 0 to 1, got {depth}.")
    items = [item for group in groups for item in group]
    room = length - 1 - sum(len(item) for item in items)
    if room < 0:
        raise ValueError(f"`length` must be at least {length - room} for this task, got {length}.")
    if filler is None:
        filler = rng.choice(FILLER, room)
    parts = [filler[i : i + 1] for i in range(room)]
    for place, item in sorted(zip(_places(rng, groups, room + len(items), depth), items)):
        parts.insert(place, item)
    return np.concatenate([[START], *parts]).astype(np.int32)


def _places(rng, groups, slots: int, depth: float) -> list[int]:
    """A slot for every item, group after group."""
    asked = len(groups[0])
    first = round(depth * (slots - asked))
    later = rng.choice(np.arange(first + 1, slots), asked - 1, replace=False)
    free = rng.permutation(np.setdiff1d(np.arange(slots), [first, *later]))
    places = [first, *sorted(later)]
    for group in groups[1:]:
        places += sorted(free[: len(group)])
        free = free[len(group) :]
    return places
