"""The main job on the real model, at a quarter of its size."""

import dataclasses
import json
import pathlib

import pytest

from stowax.experiments import rewriting, sweep

QUALITY = sweep.Config(
    names=("gguf", "int8", "int4-g64", "int4-g64-gptq"), tokens=385, words=4, batches=3
)


@pytest.mark.slow
def test_quality_of_variants(tmp_path, run_apart):
    """By programs that are optimized, which here is worth their compiling."""
    code = "import pathlib, test_smollm2 as tests; tests.sweep.run(tests.QUALITY, pathlib.Path(%r))"
    run_apart(code % str(tmp_path), cwd=str(pathlib.Path(__file__).parent))
    report = json.loads((tmp_path / "report.json").read_text())
    found = {v["name"]: v for v in report["variants"]}
    base = found["f16"]["perplexity"]
    loss = {name: v["perplexity"] / base - 1 for name, v in found.items()}
    assert abs(loss["gguf"]) < 1e-3
    assert abs(loss["int8"]) < 0.02
    assert 0.1 < loss["int4-g64"] < 0.6
    assert loss["int4-g64-gptq"] < 0.5 * loss["int4-g64"]
    assert found["gguf"]["weight_bytes"] == 96_576_768  # the tensors of the file
    assert found["int4-g64"]["decode_temp_bytes"] < 4 * 134e6 / 10  # no decoded copy of the weights


def test_rewriting_is_measured_in_every_form():
    config = dataclasses.replace(rewriting.smollm2(layers=4), vocab_size=512)
    for measure in (rewriting.measure, rewriting.measure_cache):
        rows = {form: measure(config, form, repeats=1) for form in rewriting.FORMS}
        assert rows["unrolled"]["equations"] > 3 * rows["scanned"]["equations"]
        assert all(row["trace_ms"] > 0 for row in rows.values())
