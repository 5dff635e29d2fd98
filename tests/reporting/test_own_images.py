"""From somebody's folder to a verdict: lengths that fit into hours, the folder of digits, the words."""

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from difflt_core import Pipeline, load_config, vary
from difflt_core.data.long_tail import load_split
from difflt_core.experiments import sizing
from difflt_core.experiments.own_images import own_images, rare_classes
from difflt_core.experiments.sizing import ENOUGH, Rates, _round, sized
from difflt_core.notebooks import UsageError
from difflt_core.reporting import export, runner
from difflt_core.reporting.sentences import does_it_help


@pytest.fixture
def folder(tmp_path):
    config, data_dir = own_images(load_config("smoke"), tmp_path, "")
    return Pipeline(config, tmp_path, "cpu", progress=False, data_dir=data_dir)


def test_the_digits_as_a_folder_are_the_digits(folder, tmp_path):
    digits = Pipeline(load_config("smoke"), tmp_path, "cpu", progress=False)
    assert folder.config.data.name == "folder" and folder.config.data.imb_ratio is None
    for split in ("train", "val", "test"):
        mine, theirs = (load_split(p.data(), split) for p in (folder, digits))
        assert np.array_equal(mine.class_counts, theirs.class_counts)
        order = [np.argsort(s.labels, kind="stable") for s in (mine, theirs)]
        assert np.array_equal(mine.images[order[0]][..., :1], theirs.images[order[1]])
    again, where = own_images(load_config("smoke"), tmp_path, "")
    assert again == folder.config and where == folder.store.context.data_dir


def test_a_folder_is_itself_and_other_data_are_refused(tmp_path):
    config = load_config("folder", path="mine")
    assert own_images(config, tmp_path, "/data") == (config, "/data")
    with pytest.raises(
        ValueError, match="about a folder of images; got cifar10; use --profile folder"
    ):
        own_images(load_config("cifar10"), tmp_path, "")


@pytest.mark.parametrize("counts, rare", [([5, 9, 1, 3, 3, 7], [2, 3]), ([4, 2], [1])])
def test_rare_classes_are_the_third_with_the_fewest_images(counts, rare):
    assert rare_classes(counts).tolist() == rare


RATES = Rates(plain_step=0.5, full_step=1.5, classifier_step=0.05, image=0.02)


@pytest.mark.parametrize("hours", [1, 2, 8])
def test_the_lengths_fit_into_the_hours(folder, monkeypatch, hours):
    monkeypatch.setenv("DIFFLT_JOBS", "2")
    config = vary(folder.config, {"diffusion.plain_share": 0.9, "diffusion.schedule": "trapezoid"})
    folder.config = config
    found = sized(folder, hours, RATES)
    steps = found["parameters"]
    seconds = steps["n_diffusion_steps"] * (0.9 * 0.5 + 0.1 * 1.5)
    seconds += 3 * steps["n_classifier_steps"] * 0.05
    assert 0.6 * hours * 3600 < seconds < hours * 3600  # two repeats, side by side
    assert steps["n_extractor_steps"] == steps["n_classifier_steps"]
    assert f"{steps['n_diffusion_steps']} steps" in found["words"]
    assert ("That is short" in found["words"]) == (steps["n_diffusion_steps"] < ENOUGH)


def test_a_repeat_more_than_fits_side_by_side_takes_another_turn(folder, monkeypatch):
    """Two cores have one and a half repeats' time no use for: a generator is not split."""
    monkeypatch.setenv("DIFFLT_JOBS", "2")
    lengths = []
    for seeds in ((0, 1), (0, 1, 2), (0, 1, 2, 3)):
        folder.config = vary(folder.config, {"seeds": seeds})
        lengths.append(sized(folder, 8, RATES)["parameters"]["n_diffusion_steps"])
    assert lengths[0] > lengths[1] == lengths[2]


def test_what_is_measured_trains_for_a_few_steps(folder, tmp_path, monkeypatch):
    kept = contextlib.nullcontext(tmp_path / "measured")
    monkeypatch.setattr(sizing.tempfile, "TemporaryDirectory", lambda: kept)
    folder.config = vary(folder.config, {"diffusion.alpha": 0.03, "extractor.n_steps": 100_000})
    rates = sizing.measure(folder, jobs=1)
    assert 0 < rates.plain_step < 10 and 0 < rates.classifier_step < 10 and 0 < rates.image < 10
    recipes = [json.loads(path.read_text())["recipe"] for path in tmp_path.rglob("manifest.json")]
    settings = {"diffusion": "diffusion", "extractor": "classifier"}
    trained = [r for r in recipes if r["stage"] in settings]
    steps = [r["config"][settings[r["stage"]]]["n_steps"] for r in trained]
    # of three kinds a warm-up and two lengths or more; phi_0 for L_AID, of two seeds
    assert len(steps) >= 11 and max(steps) <= 4 * sizing._LONGEST
    assert not list((tmp_path / "runs").rglob("extractor"))


def test_what_is_measured_is_in_no_cache_and_the_data_are_read_once(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFLT_CACHE", str(tmp_path / "cache"))
    mine = Pipeline(folder.config, "", "cpu", False, folder.store.context.data_dir)
    there = sizing._elsewhere(mine, tmp_path / "measured")
    assert there.data().key == mine.data().key and there.data().path.resolve() == mine.data().path
    there.vary({"extractor.n_steps": 4}).train_extractor()
    assert not (tmp_path / "cache" / "extractor").exists()


def test_the_longer_training_is_longer_until_it_takes_longer(folder, monkeypatch):
    """Of a machine that makes a thousand steps in a second, each training a quarter of a second late."""
    trained = []

    def build(self, runs, *_):
        trained.append(max(run.get("diffusion.n_steps", 0) for run in runs))

    def made(self):
        return SimpleNamespace(manifest={"elapsed_s": 0.25 + self.config.diffusion.n_steps / 1000})

    monkeypatch.setattr(Pipeline, "build", build)
    for stage in ("train_diffusion", "train_extractor", "quality_samples"):
        monkeypatch.setattr(Pipeline, stage, made)
    rates = sizing.measure(folder, jobs=1)
    assert trained[:6] == [4, 4, 14, 56, 224, 896] and rates.plain_step == pytest.approx(1e-3)


def test_too_few_hours_say_how_many_would_do(folder, monkeypatch):
    monkeypatch.setenv("DIFFLT_JOBS", "2")
    with pytest.raises(ValueError, match=r"--hours 0.01: too few .* would give the generator 2000"):
        sized(folder, 0.01, RATES)
    enough = sized(folder, 5, RATES)["enough_hours"]
    assert sized(folder, 1.05 * enough, RATES)["parameters"]["n_diffusion_steps"] >= 0.9 * ENOUGH


def test_a_longer_training_that_took_no_longer_gives_no_free_step():
    assert sizing._per_step(1.0, 3.0, 4, 14) == pytest.approx(0.2)
    # the first had to import everything
    assert sizing._per_step(2.8, 0.7, 4, 14) == pytest.approx(0.05)


def test_round_is_down_to_two_digits():
    assert [_round(n) for n in (0.5, 7.9, 123.4, 5678, 123456)] == [0, 7, 120, 5600, 120000]


def test_hours_are_measured_once_and_become_settings(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        runner, "sized", lambda p, hours: asked.append(hours) or sized(p, hours, RATES)
    )
    arguments = ["--profile", "folder", "--hours", "3", "--out", str(tmp_path), "--jobs", "1"]
    arguments += ["--data-dir", str(folder.store.context.data_dir), "--device", "cpu"]
    arguments += ["--set", f"path={folder.config.data.path}", "--set", "n_classifier_steps=77"]
    options = runner.build_parser().parse_args(arguments)
    monkeypatch.setenv("DIFFLT_JOBS", "1")
    first, second = (runner.lengths_for(options) for _ in range(2))
    assert first == second and asked == [3.0] and first["n_classifier_steps"] == 77
    path = tmp_path / "runs" / "folder" / "sizing.json"
    (record,) = json.loads(path.read_text())
    assert record["parameters"]["n_diffusion_steps"] == first["n_diffusion_steps"]
    assert record["rates"]["image"] == 0.02
    options.hours = 4.0  # other options in between take nothing from the first
    runner.lengths_for(options)
    options.hours = 3.0
    assert runner.lengths_for(options) == first and asked == [3.0, 4.0]
    path.write_text("[1, {}]")  # damaged: measured anew
    assert runner.lengths_for(options) == first and asked == [3.0, 4.0, 3.0]
    options = runner.build_parser().parse_args([*arguments[:-2], "--set", "extractor.epochs=20"])
    with pytest.raises(UsageError, match="--hours: .*leave extractor.epochs out, or --hours"):
        runner.lengths_for(options)


def test_the_export_takes_the_lengths_that_a_run_fixed(folder, tmp_path, monkeypatch, capsys):
    rates = Rates(1e-4, 1e-4, 1e-4, 1e-4)
    monkeypatch.setattr(runner, "sized", lambda p, hours: sized(p, hours, rates))
    monkeypatch.setattr(Pipeline, "build", lambda self, *_, **__: built.append(self.config))
    monkeypatch.setattr(export, "export", lambda *_: pd.DataFrame({"kept": [True]}))
    built, to = [], str(tmp_path / "set")
    same = ["--profile", "folder", "--out", str(tmp_path), "--device", "cpu"]
    same += ["--data-dir", str(folder.store.context.data_dir)]
    same += ["--set", f"path={folder.config.data.path}"]
    assert export.main([*same, "--to", to, "--hours", "1"]) == 1
    assert "sizing.json has nothing of these options" in capsys.readouterr().err and not built
    lengths = runner.lengths_for(runner.build_parser().parse_args([*same, "--hours", "1"]))
    assert export.main([*same, "--to", to, "--hours", "2"]) == 1 and not built
    assert export.main([*same, "--to", to, "--hours", "1"]) == 0
    assert built[0].diffusion.n_steps == lengths["n_diffusion_steps"]
    assert built[0].classifier.n_steps == lengths["n_classifier_steps"]


def runs(difflt, bsce):
    rows = [("cross-entropy", s, 10 + s, 40.0 + s) for s in range(2)]
    rows += [("BSCE", s, *(v + s for v in bsce)) for s in range(2)]
    rows += [("DiffuLT", s, *(v + s for v in difflt)) for s in range(2)]
    return pd.DataFrame(rows, columns=["method", "seed", "rare", "all"])


def test_the_verdict_says_first_what_to_use():
    helps = does_it_help(runs((30.0, 55.0), (25.0, 50.0)))
    assert helps.startswith("Generated images help: +20.0 ± 0.0 points on the rare classes")
    assert "+5.0 ± 0.0 over all classes" in helps
    assert does_it_help(runs((30.0, 49.0), (25.0, 50.0))).startswith("Use BSCE instead. Generated")
    one = does_it_help(runs((30.0, 55.0), (25.0, 50.0)).query("seed == 0"))
    assert one.startswith("Not decided") and "+20.0 points (one repeat)" in one
    spread = runs((30.0, 55.0), (25.0, 50.0))
    spread.loc[5, "all"] -= 4.0  # ahead in both repeats, by 5 and by 1
    assert does_it_help(spread).startswith('Not decided by so few repeats (--set "seeds=[0,1,2,3]"')
    rarer = does_it_help(runs((22.0, 50.0), (25.0, 50.0)))
    assert rarer.startswith("Use BSCE instead. Generated images: +12.0 ± 0.0 points on the rare")
    worse = does_it_help(runs((9.0, 55.0), (5.0, 50.0)))
    assert worse.startswith("Generated images do not help: -1.0 ± 0.0 points on the rare")
    level = runs((9.0, 55.0), (5.0, 50.0))  # one point below plain training, and one above
    level.loc[5, "rare"] += 2.0
    assert does_it_help(level).startswith("Not decided")
    unseen = does_it_help(runs((float("nan"), 55.0), (float("nan"), 50.0)))
    assert unseen.startswith("Not decided: no test image of the rare classes. Add some")
    assert "seeds" not in unseen and "not measured on the rare classes" in unseen
