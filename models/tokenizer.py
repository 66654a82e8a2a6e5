"""Text to tokens and back, from a GGUF file's metadata or a ``tokenizer.json``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from .gguf_file import GgufFile

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# `tokenizer.ggml.pre`: (digits are split one by one first, the pattern words are cut by)
_PRE = {
    "gpt-2": (False, _GPT2),
    "smollm": (True, _GPT2),
    "starcoder": (True, _GPT2),
    "llama-bpe": (False, _LLAMA3),
    "llama3": (False, _LLAMA3),
    "qwen2": (False, _QWEN2),
}
_CONTROL, _USER_DEFINED = 3, 4  # of `tokenizer.ggml.token_type`


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer with its special tokens and its chat template.

    Attributes:
      core: the ``tokenizers.Tokenizer`` that does the work.
      bos_id: begin-of-text token, or None.
      eos_ids: tokens that end a generated text.
      add_bos: a text is meant to start with `bos_id`.
      chat_template: Jinja source, or None.
    """

    core: tokenizers.Tokenizer
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    add_bos: bool = False
    chat_template: str | None = None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self.core.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Names of special tokens in it become those tokens."""
        ids = self.core.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if self.add_bos and self.bos_id is not None else ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of token ids; special tokens are left out unless ``skip_special=False``."""
        ids = [int(i) for i in ids]
        wrong = [i for i in ids if not 0 <= i < self.vocab_size]
        if wrong:
            raise ValueError(f"`ids` has {wrong[:5]}, outside the {self.vocab_size} tokens.")
        return self.core.decode(ids, skip_special_tokens=skip_special)

    def apply_chat(self, messages: Sequence[dict[str, str]], *, reply: bool = True) -> str:
        """The text of a conversation in the model's own chat format.

        Args:
          messages: dicts with ``role`` (system, user, assistant) and ``content``.
          reply: end with the start of the assistant's turn.

        Raises:
          ValueError: the file has no chat template, or it can't be rendered.
        """
        if self.chat_template is None:
            raise ValueError("This tokenizer has no chat template; use encode() on plain text.")
        return _render(
            self.chat_template,
            messages=list(messages),
            add_generation_prompt=reply,
            bos_token=self._name(self.bos_id),
            eos_token=self._name(self.eos_ids[0] if self.eos_ids else None),
        )

    def _name(self, token: int | None) -> str:
        return "" if token is None else self.core.id_to_token(token) or ""


def from_gguf(file: GgufFile) -> Tokenizer:
    """The tokenizer in the metadata of `file` (byte-level BPE, model "gpt2").

    Raises:
      ValueError: another kind of tokenizer, or an inconsistent vocabulary.
    """

    def fail(what: str) -> ValueError:
        return ValueError(
            f"{file.path}: {what}. Pass tokenizer=False to load() to do without a tokenizer."
        )

    kind = file.get("tokenizer.ggml.model", str, "none")
    pre = file.get("tokenizer.ggml.pre", str, "gpt-2")
    if kind != "gpt2":
        raise fail(f"tokenizer model {kind!r} is not supported, only byte-level BPE ('gpt2')")
    if pre not in _PRE:
        raise fail(f"pre-tokenizer {pre!r} is not supported; {sorted(_PRE)} are")
    tokens = file.get("tokenizer.ggml.tokens", list)
    merges = _merges(file.get("tokenizer.ggml.merges", list), fail)
    types = file.get("tokenizer.ggml.token_type", np.ndarray, np.ones(len(tokens), np.int32))
    if len(types) != len(tokens):
        raise fail(f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise fail("tokenizer.ggml.tokens has duplicates")
    for a, b in merges:
        if not {a, b, a + b} <= vocab.keys():
            raise fail(f"tokenizer.ggml.merges joins {a!r} and {b!r}, which are not all tokens")
    core = _byte_level_bpe(vocab, merges, *_PRE[pre])
    _add_special(core, tokens, types)

    def token_id(name: str) -> int | None:
        value = file.get(f"tokenizer.ggml.{name}_token_id", int, -1)
        if not -1 <= value < len(tokens):
            raise fail(f"tokenizer.ggml.{name}_token_id is {value}, not a token")
        return None if value < 0 else value

    ends = {token for name in ("eos", "eot") if (token := token_id(name)) is not None}
    return Tokenizer(
        core,
        bos_id=token_id("bos"),
        eos_ids=tuple(sorted(ends)),
        add_bos=file.get("tokenizer.ggml.add_bos_token", bool, False),
        chat_template=file.get("tokenizer.chat_template", str, "") or None,
    )


def from_directory(path: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory: ``tokenizer.json`` and the files around it."""
    file = path / "tokenizer.json"
    if not file.exists():
        raise FileNotFoundError(
            f"{file} is missing. Pass tokenizer=False to load() to do without a tokenizer."
        )
    try:
        core = tokenizers.Tokenizer.from_str(file.read_text("utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file}: not a tokenizer.json ({error}).") from error
    settings = _json(path / "tokenizer_config.json")
    ends = _json(path / "generation_config.json").get("eos_token_id")
    if ends is None:
        ends = _id(core, settings.get("eos_token"))
    ends = ends if isinstance(ends, list) else [ends]
    template = settings.get("chat_template")
    if (path / "chat_template.jinja").exists():
        template = (path / "chat_template.jinja").read_text("utf-8")
    return Tokenizer(
        core,
        bos_id=_id(core, settings.get("bos_token")),
        eos_ids=tuple(e for e in ends if isinstance(e, int)),
        add_bos=settings.get("add_bos_token", False) is True,
        chat_template=template if isinstance(template, str) else None,
    )


def _byte_level_bpe(vocab, merges, split_digits: bool, pattern: str) -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    core.decoder = decoders.ByteLevel()
    return core


def _add_special(core: tokenizers.Tokenizer, tokens: list[str], types: np.ndarray):
    names = {kind: [t for t, k in zip(tokens, types) if k == kind and t] for kind in (3, 4)}
    core.add_special_tokens([AddedToken(t, normalized=False) for t in names[_CONTROL]])
    core.add_tokens([AddedToken(t, normalized=False) for t in names[_USER_DEFINED]])


def _merges(lines: list[str], fail) -> list[tuple[str, str]]:
    pairs = []
    for line in lines:
        a, space, b = line.partition(" ")
        if not (a and space and b) or " " in b:
            raise fail(f"tokenizer.ggml.merges has {line!r}, not two tokens")
        pairs.append((a, b))
    return pairs


def _render(template: str, **values: Any) -> str:
    """Renders a template that came with a file: sandboxed, it can't reach Python's internals."""
    import jinja2
    import jinja2.sandbox

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(template).render(**values)
    except (jinja2.TemplateError, TypeError, KeyError, OverflowError) as error:
        raise ValueError(f"The chat template can't be rendered: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object.")
    return value


def _id(core: tokenizers.Tokenizer, token: Any) -> int | None:
    name = token.get("content") if isinstance(token, dict) else token
    return core.token_to_id(name) if isinstance(name, str) else None
