"""The benchmarks run, and their modes compute the same loss. Nothing here looks at times."""

import argparse
import json
import math

import numpy as np
import pandas as pd
import pytest

from difflt_core.benchmarks import cost, sau, throughput
from difflt_core.benchmarks.__main__ import main
from difflt_core.benchmarks.generator import speed
from difflt_core.config import load_config
from difflt_core.data.long_tail import class_sizes
from difflt_core.engine.provenance import ROOT
from difflt_core.notebooks import find_notebooks


def _run(out, name, record, *options):
    """The record that a benchmark writes."""
    assert main([name, *options, "--device", "cpu", "--out", str(out)]) == 0
    return json.loads((out / f"{record}.json").read_text())


def test_both_modes_compute_the_same_loss(tmp_path, capsys):
    options = ("--preset", "tiny", "--parameterisation", "eps", "--batch", "8", "--steps", "1")
    reference, fast = _run(tmp_path, "throughput", "tiny-cpu", *options)["modes"]
    assert fast["loss"] == pytest.approx(reference["loss"], rel=0.01)
    assert (reference["precision"], reference["sampler"]) == ("fp32", "ddpm, 1000 steps")
    assert all(row["mem_gib"] > 0 and row["train_images_per_s"] > 0 for row in (reference, fast))
    shown = capsys.readouterr().out
    assert "training, images/s" in shown and shown == (tmp_path / "tiny-cpu.md").read_text() + "\n"


def test_kept_memory_changes_no_image(tmp_path):
    options = ("--profile", "smoke", "--images", "4", "--steps", "1")
    given_back, kept = _run(tmp_path, "allocator", "allocator-cpu", *options)["modes"]
    assert given_back["sum"] == kept["sum"] > 0 and min(given_back["gib"], kept["gib"]) > 0


@pytest.fixture
def here(monkeypatch):
    """What is measured in a process of its own, in this one: memory is not looked at."""
    for module in (throughput, sau):
        monkeypatch.setattr(module, "in_a_process", lambda function, *given: function(*given))


def test_the_fast_mode_says_its_parameterisation(tmp_path, here):
    options = ("--preset", "tiny", "--batch", "8", "--steps", "1")
    modes = _run(tmp_path, "throughput", "tiny-cpu", *options)["modes"]
    assert [row["parameterisation"] for row in modes] == ["eps", "edm"]
    assert "do not compare" in (tmp_path / "tiny-cpu.md").read_text()


def test_the_classifiers_epoch_beside_the_usual_loop(tmp_path):
    options = ("classifier-resnet32-cpu", "--steps", "1")
    usual, ours = _run(tmp_path, "classifier", *options)["rows"]
    assert usual["gain"] == 1 and (usual["loop"][:5], ours["loop"]) == ("usual", "ours")
    assert ours["gain"] == pytest.approx(ours["images/s"] / usual["images/s"])


def test_a_step_of_sau_gives_the_loss_of_four_forwards(tmp_path, here):
    options = ("sau-resnet32-cpu", "--arch", "resnet32", "--batch", "4", "--steps", "1")
    plain, ours = _run(tmp_path, "sau", *options)["modes"]
    assert ours["loss"] == pytest.approx(plain["loss"], rel=0.01)
    assert all(row["mem_gib"] > 0 and row["step_s"] > 0 for row in (plain, ours))


def test_augmentation_at_once_and_one_at_a_time(tmp_path):
    rows = _run(tmp_path, "augment", "augment-cpu", "--steps", "1")["rows"]
    assert len(rows) == 6 and {r["policy"] for r in rows} == {
        "autoaugment",
        "randaugment",
        "contrastive",
    }
    assert all(r["gain"] > 0 and r["at once, ms"] > 0 for r in rows)


@pytest.mark.parametrize("profile", ["cifar10-fast", "cifar100-fast", "cifar100", "imagenet"])
def test_the_committed_cost_is_that_of_the_profile(profile):
    """And one seed of the fast profiles' main table takes less than an hour, on paper."""
    row = cost.main_rows(profile, argparse.Namespace(peak=989.0, share=0.15, step_ms=5.0))[0]
    record = json.loads((ROOT / "figures" / "benchmark" / f"cost-{profile}.json").read_text())
    assert row in record["rows"], "run `python -m difflt_core.benchmarks cost` again"
    assert (float(row["h alone"]) < 1) == profile.endswith("-fast")


def test_flops_of_a_training(tmp_path):
    """phi_0 and DiffuLT at smoke size, by hand from the networks' own FLOPs."""
    notebook = next(n for n in find_notebooks() if n.number == "09")
    works = {w.stage: w for w in cost.cost_of(cost.planned(notebook, "smoke", seeds=[0])).values()}
    config = load_config("smoke")
    recipe, net = config.extractor, cost._backbone_flop("small_cnn", 32, 8, 1, 10)
    assert works["extractor"].steps == recipe.n_steps == 60
    assert works["extractor"].flop == 3 * net * 60 * recipe.batch_size
    unet, diffusion = cost.unet_flop("nano", 8, 1, 10), config.diffusion
    assert works["diffusion"].images == 60 * 32
    assert works["diffusion"].flop == 2 * 3 * unet * 60 * 32 and diffusion.tau > 0
    drawn = load_config("smoke").sampling
    counts = np.array(class_sizes(10, 60, 10))
    images = {10 * config.metrics.n_per_class, int((60 - counts).sum())}
    found = [
        w for w in cost.cost_of(cost.planned(notebook, "smoke")).values() if w.stage == "samples"
    ]
    assert {w.images for w in found} == images
    assert {w.flop for w in found} == {n * drawn.n_steps * 2 * unet for n in images}


@pytest.mark.slow
def test_every_sampler_of_the_generator(tmp_path):
    options = ("--profile", "smoke", "--runs", str(tmp_path), "--per-class", "2")
    rows = _run(tmp_path, "samplers", "samplers-cpu", *options)["rows"]
    assert min(row["gain"] for row in rows) == 1
    assert {(r["sampler"], r["steps"], r["calls"]) for r in rows} >= {
        ("heun", 18, 35),
        ("dpm++ 2m", 15, 15),
    }


@pytest.mark.slow
def test_the_generators_quality_by_training_seconds(tmp_path):
    options = ("generator-quick-cpu", "--quick", "--runs", str(tmp_path))
    record = _run(tmp_path, "generator", *options)
    assert record["config"]["data_seed"] == 1  # the reported tables have 0
    runs = pd.read_csv(tmp_path / "generator-quick-cpu.csv")
    generators = runs[runs["method"].isin(["eps", "edm"])]
    assert sorted(zip(generators["method"], generators["steps"], strict=True)) == [
        ("edm", 10),
        ("edm", 40),
        ("eps", 20),
        ("eps", 40),
    ]
    assert not generators.isna().any().any() and (generators["train_s"] > 0).all()
    assert generators[["ID", "AID", "OOD"]].sum(axis=1).values == pytest.approx(100, abs=0.01)
    assert list(runs["method"][:2]) == ["cross-entropy", "BSCE"] and runs["overall"].notna().all()
    text = (tmp_path / "generator-quick-cpu.md").read_text()
    assert record["sentence"] in text and "none: BSCE" in text
    assert all((tmp_path / f"generator-quick-cpu.{kind}").exists() for kind in ("png", "pdf"))


def _curves(eps, edm):
    """Runs of two seeds, half a point apart, from {(steps, seconds): accuracy}."""
    rows = [
        {"method": method, "steps": n, "train_s": s, "overall": accuracy + shift}
        for method, curve in (("eps", eps), ("edm", edm))
        for (n, s), accuracy in curve.items()
        for shift in (-0.25, 0.25)
    ]
    return pd.DataFrame([{"method": "BSCE", "steps": 0, "overall": 99.0}, *rows])


def test_when_edm_is_as_good_as_eps_gets():
    eps = {(500, 50.0): 70.0, (1000, 100.0): 80.0, (2000, 200.0): 78.0}
    halfway = _curves(eps, {(100, 10.0): 76.0, (400, 40.0): 84.0})
    sentence, ratio = speed(halfway)  # half of the way from 10 to 40 s on a log axis is 20 s
    assert ratio == pytest.approx(0.2)
    assert (
        "(80.0 % of the validation part) at 20.0 s, 0.20 of the 100.0 s that eps needs" in sentence
    )
    assert speed(halfway.iloc[::-1]) == (sentence, ratio)

    sentence, ratio = speed(_curves(eps, {(100, 10.0): 81.0, (400, 40.0): 84.0}))
    assert ratio == pytest.approx(0.1) and "in its shortest training, at 10.0 s" in sentence

    sentence, ratio = speed(_curves(eps, {(100, 10.0): 71.0, (400, 40.0): 79.0}))
    assert math.isnan(ratio) and "does not reach" in sentence and "79.0 % at 40.0 s" in sentence


def test_an_unknown_benchmark_or_device_is_a_usage_error(tmp_path, capsys):
    for argv in (["speed"], []):
        with pytest.raises(SystemExit) as error:
            main(argv)
        assert error.value.code == 2
    assert "throughput" in capsys.readouterr().err
