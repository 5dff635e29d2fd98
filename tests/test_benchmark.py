"""The benchmark runs, and both of its modes compute the same loss. Nothing here looks at times."""

import json

import pytest

from difflt_core import benchmark


def test_both_modes_compute_the_same_loss(tmp_path, capsys):
    argv = [
        "--preset",
        "tiny",
        "--device",
        "cpu",
        "--batch",
        "8",
        "--steps",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert benchmark.main(argv) == 0
    record = json.loads((tmp_path / "tiny-cpu.json").read_text())
    reference, fast = record["modes"]
    assert fast["loss"] == pytest.approx(reference["loss"], rel=0.01)
    assert all(row["mem_gib"] > 0 and row["train_images_per_s"] > 0 for row in record["modes"])
    shown = capsys.readouterr().out
    assert "training, images/s" in shown and shown == (tmp_path / "tiny-cpu.md").read_text() + "\n"
