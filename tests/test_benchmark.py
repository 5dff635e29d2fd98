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


def test_the_classifiers_epoch_beside_the_usual_loop(tmp_path, capsys):
    argv = ["--classifier", "resnet32", "--device", "cpu", "--steps", "1", "--out", str(tmp_path)]
    assert benchmark.main(argv) == 0
    record = json.loads((tmp_path / "classifier-resnet32-cpu.json").read_text())
    usual, ours = record["rows"]
    assert usual["gain"] == 1 and ours["gain"] == pytest.approx(
        ours["images/s"] / usual["images/s"]
    )


def test_a_step_of_sau_gives_the_loss_of_four_forwards(tmp_path, capsys):
    argv = ["--sau", "resnet32", "--device", "cpu", "--batch", "4", "--steps", "1"]
    assert benchmark.main([*argv, "--out", str(tmp_path)]) == 0
    plain, ours = json.loads((tmp_path / "sau-resnet32-cpu.json").read_text())["modes"]
    assert ours["loss"] == pytest.approx(plain["loss"], rel=0.01)
    assert all(row["mem_gib"] > 0 and row["step_s"] > 0 for row in (plain, ours))
