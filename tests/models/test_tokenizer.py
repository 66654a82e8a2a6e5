import contextlib
import itertools
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from stowax.models import Tokenizer, tokenizer
from stowax.models.gguf_file import GgufFile

from .conftest import write_tiny_gguf, write_tiny_hf

FUZZ = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXTS = [
    "",
    "hello world",
    "  leading, trailing and    inner spaces  ",
    "It's 12345 o'clock; we'll see, they've said so.\n\n\tTab\r\nend",
    "naïve café — Zürich, Ελληνικά, русский, 日本語, עברית, 🙂👩‍👩‍👧",
    "x=3.14159e-10; y[0]+=1 # comment\x00\x7f",
    "\u200bzero width\ufeff and e\u0301 combining",
]


@pytest.fixture(scope="module")
def tiny(tiny_gguf):
    return tokenizer.from_gguf(GgufFile(tiny_gguf))


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tiny, text):
    assert tiny.decode(tiny.encode(text)) == text


def test_merges_apply(tiny):
    words = [tiny.core.id_to_token(i) for i in tiny.encode("hello world 12")]
    assert words == ["hello", "Ġw", "o", "r", "l", "d", "Ġ", "1", "2"]


def test_special_tokens(tiny):
    ids = tiny.encode("<|im_start|>hello<|im_end|>")
    assert (ids[0], ids[-1]) == (1, 2)
    assert tiny.decode(ids) == "hello"
    assert tiny.decode(ids, skip_special=False) == "<|im_start|>hello<|im_end|>"
    assert (tiny.bos_id, tiny.eos_ids, tiny.vocab_size) == (1, (2,), 264)


def test_add_bos(tiny):
    assert Tokenizer(tiny.core, bos_id=1, add_bos=True).encode("he")[0] == 1


def test_chat(tiny):
    messages = [{"role": "user", "content": "hello"}]
    text = "<|im_start|>user\nhello<|im_end|>\n"
    assert tiny.apply_chat(messages, reply=False) == text
    assert tiny.apply_chat(messages) == text + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "match"),
    [
        (None, "no chat template"),
        ("{{ messages", "can't be rendered"),
        ("{{ ''.__class__.__mro__ }}", "can't be rendered"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for i in range(10**9) %}{% endfor %}", "can't be rendered"),
    ],
)
def test_bad_templates(tiny, template, match):
    broken = Tokenizer(tiny.core, chat_template=template)
    with pytest.raises(ValueError, match=match):
        broken.apply_chat([{"role": "user", "content": "x"}])


def test_ids_outside_the_vocabulary(tiny):
    with pytest.raises(ValueError, match="`ids`"):
        tiny.decode([3, 10_000])


def test_directory(tmp_path, tiny):
    ours = tokenizer.from_directory(write_tiny_hf(tmp_path / "hf"))
    text = "hello <|im_end|> world"
    assert ours.encode(text) == tiny.encode(text)
    assert (ours.bos_id, ours.eos_ids) == (1, (2,))
    messages = [{"role": "user", "content": "x"}]
    assert ours.apply_chat(messages) == tiny.apply_chat(messages)


def test_directory_errors(tmp_path):
    path = write_tiny_hf(tmp_path / "hf")
    (path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: expected a JSON object"):
        tokenizer.from_directory(path)
    (path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        tokenizer.from_directory(path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer=False"):
        tokenizer.from_directory(path)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("tokenizer.ggml.model", "llama", "'llama' is not supported"),
        ("tokenizer.ggml.pre", "mystery", "'mystery' is not supported"),
        ("tokenizer.ggml.tokens", ["a", "a"], "token_type has 264 entries for 2"),
        ("tokenizer.ggml.merges", ["h e l"], "not two tokens"),
        ("tokenizer.ggml.merges", ["h zzz"], "not all tokens"),
        ("tokenizer.ggml.merges", "h e", "should be list"),
        ("tokenizer.ggml.eos_token_id", 264, "eos_token_id is 264"),
    ],
)
def test_bad_metadata(tiny_gguf, key, value, match):
    file = GgufFile(tiny_gguf)
    file.metadata[key] = value
    with pytest.raises(ValueError, match=match) as caught:
        tokenizer.from_gguf(file)
    assert "tiny.gguf" in str(caught.value)


def test_duplicate_tokens(tiny_gguf):
    file = GgufFile(tiny_gguf)
    file.metadata["tokenizer.ggml.tokens"][5] = file.metadata["tokenizer.ggml.tokens"][6]
    with pytest.raises(ValueError, match="duplicates"):
        tokenizer.from_gguf(file)


def test_without_tokenizer_metadata(tmp_path):
    path = write_tiny_gguf(tmp_path / "bare.gguf", tokenizer=False)
    with pytest.raises(ValueError, match="tokenizer=False"):
        tokenizer.from_gguf(GgufFile(path))


class ReferenceBpe:
    """GPT-2 byte-level BPE with digits split one by one, after its paper, in plain Python.

    ``[^\\W\\d_]`` stands for a letter and ``\\d`` for a digit, which is exact on the texts below.
    """

    WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")

    def __init__(self, metadata):
        self.ids = {t: i for i, t in enumerate(metadata["tokenizer.ggml.tokens"])}
        merges = metadata["tokenizer.ggml.merges"]
        self.rank = {tuple(m.split(" ")): i for i, m in enumerate(merges)}
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [b for b in range(256) if b not in visible]
        self.letters = {b: chr(b) for b in visible}
        self.letters |= {b: chr(256 + i) for i, b in enumerate(hidden)}

    def encode(self, text):
        pieces = [w for part in re.split(r"(\d)", text) for w in self.WORDS.findall(part)]
        return [self.ids[t] for piece in pieces for t in self.merge(piece)]

    def merge(self, piece):
        parts = [self.letters[b] for b in piece.encode()]
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            best = min(pairs, key=lambda p: self.rank.get(p, 1 << 30))
            if best not in self.rank:
                break
            i = pairs.index(best)
            parts[i : i + 2] = ["".join(best)]
        return parts


def test_reference_alphabet():
    letters = ReferenceBpe({"tokenizer.ggml.tokens": [], "tokenizer.ggml.merges": []}).letters
    assert set(letters.values()) == set(pre_tokenizers.ByteLevel.alphabet())


@FUZZ
@given(data=st.data())
def test_fuzzed_json(tiny_hf, tmp_path, data):
    """Bytes of tokenizer.json replaced: a tokenizer or a ValueError, never a crash."""
    whole = bytearray((tiny_hf / "tokenizer.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(
            st.sampled_from(b'09"[{,}x\xff')
        )
    (tmp_path / "tokenizer.json").write_bytes(bytes(whole))
    with contextlib.suppress(ValueError):
        tokenizer.from_directory(tmp_path)


@pytest.fixture(scope="module")
def real_file(smollm2_path):
    return GgufFile(smollm2_path)


@pytest.fixture(scope="module")
def real(real_file):
    return tokenizer.from_gguf(real_file)


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_equals_the_reference(real_file, real, text):
    assert real.encode(text) == ReferenceBpe(real_file.metadata).encode(text)
    assert real.decode(real.encode(text)) == text


def test_smollm2_chat_is_made_of_special_tokens(real):
    text = real.apply_chat([{"role": "user", "content": "Hi"}])
    ids = real.encode(text)
    assert text.startswith("<|im_start|>system\n")
    assert ids.count(1) == 3
    assert ids.count(2) == 2
    assert real.eos_ids == (2,)
