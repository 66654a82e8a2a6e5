"""Names of variants, texts, results files and pictures."""

import json

import pytest

from stowax.experiments import pictures, results, sweep, texts, variants


@pytest.mark.parametrize(
    ("name", "codec", "solver"),
    [
        ("int8", "int8", "round"),
        ("int4-g64", "int4-g64", "round"),
        ("int4-g64-gptq", "int4-g64", "gptq"),
        ("nf4-g64-clip", "nf4-g64", "clip"),
        ("int4-g64-sym-hqq", "int4-g64-sym", "hqq"),
    ],
)
def test_a_name_is_a_codec_and_a_solver(name, codec, solver):
    assert variants.split(name) == (codec, solver)


def test_unknown_variants_are_refused_before_any_work():
    with pytest.raises(ValueError, match="int4-g6x"):
        sweep.Config(names=("int8", "int4-g6x"))


def test_a_text_is_not_scored_after_calibrating_on_it():
    with pytest.raises(ValueError, match="calibration"):
        sweep.Config(text="calibration")


def test_texts_by_name_and_unknown_ones():
    assert all(len(texts.read(name)) > 20_000 for name in texts.NAMES)
    with pytest.raises(ValueError, match=r"no-such-text.*technical"):
        texts.read("no-such-text")


FIGURES = {
    "weight_bytes": 10_000_000,
    "bits_per_weight": 4.5,
    "linear_bits": 4.5,
    "perplexity": 20.0,
    "tokens_per_s": 3.0,
    "decode_temp_bytes": 1_000_000,
    "decode_peak_bytes": 2_000_000,
    "text": "words <b>",
}
FOUND = [
    {"name": "f16", **FIGURES},
    {"name": "int4-g64", **FIGURES, "perplexity": 25.0, "weight_bytes": 5_000_000},
]


def test_results_resume_under_the_same_settings(tmp_path):
    path = tmp_path / "report.json"
    results.Results(path, {"text": "a"}, resume=False).add(FOUND[0])
    again = results.Results(path, {"text": "a"}, resume=True)
    assert again.has("f16")
    assert not again.has("int8")
    assert json.loads(path.read_text())["variants"][0]["name"] == "f16"


@pytest.mark.parametrize("content", ['{"text": "b", "variants": []}', "{", "[]", '{"a": 1}'])
def test_results_of_other_settings_or_none_are_not_gone_on_with(tmp_path, content):
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="resume"):
        results.Results(path, {"text": "a"}, resume=True)
    assert path.read_text() == content


def test_table_has_the_change_against_the_baseline():
    assert "+25.00%" in sweep.table(FOUND)
    assert "+0.00%" in sweep.table(FOUND)


def test_page_is_self_contained_and_escaped():
    page = pictures.page(
        "title",
        "lead",
        [
            ("Figures", pictures.table(sweep.HEADER, sweep.cells(FOUND), "f16")),
            ("Quality", pictures.quality_over_bytes(FOUND, "f16")),
            ("Speed", pictures.bars(FOUND, "tokens_per_s", "tokens per second")),
            ("Words", pictures.texts(FOUND, "prompt")),
        ],
    )
    assert page.count("<svg") == 2
    assert "words &lt;b&gt;" in page
    assert "<script" not in page
    assert "src=" not in page
