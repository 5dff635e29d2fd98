"""Settings side by side on the validation part: what is written, what decides, what is refused."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from difflt_core import Pipeline, load_config
from difflt_core.data.long_tail import load_split
from difflt_core.experiments.results import accuracy, noise_share
from difflt_core.reporting import choose
from difflt_core.reporting.choose import read_variants, report_choice
from difflt_core.reporting.items import AS_LONG_AS_SAU, Report


def test_rows_are_those_of_the_validation_part(trained, tmp_path):
    variants = {"other weight": {"classifier.omega": 1.0}}
    judges = {s: trained.vary({"seed": s, "data.n_val": 11}) for s in trained.config.seeds}
    table, ahead = report_choice(trained, Report(trained, tmp_path), variants, judges)
    assert list(table.index) == ["BSCE", "the profile", "other weight"]
    runs = pd.read_csv(tmp_path / "figures" / "smoke" / "choose.csv")
    found = runs.set_index(["variant", "seed"])["overall"]
    for seed in trained.config.seeds:
        p = trained.vary({"seed": seed})
        for name, artifact in (
            ("BSCE", p.vary({"classifier.method": "bsce"}).train_on_real()),
            ("the profile", p.train_classifier()),
            ("other weight", p.vary(variants["other weight"]).train_classifier()),
        ):
            score = accuracy(judges[seed], artifact, "val")["overall"]
            assert found[name, seed] == pytest.approx(score, abs=1e-4)
    for column in ("few-shot copies %", "of new images %"):
        assert runs[column].isna().tolist() == (runs["variant"] == "BSCE").tolist()
    caption = json.loads((tmp_path / "figures" / "smoke" / "choose.json").read_text())["caption"]
    assert "on 110 validation images. Data seeds 0, 10, which the profile's own tables" in caption
    assert "classifier.omega = 1.0" in caption
    assert list(ahead.index) == ["the profile", "other weight"]
    mean = found.groupby("variant").mean()
    for name, reference in (("the profile", "BSCE"), ("other weight", "the profile")):
        cell = ahead.loc[name, f"overall, against {reference}"]
        assert float(cell.split()[0]) == pytest.approx(mean[name] - mean[reference], abs=0.06)
    assert ahead.loc["the profile", "overall, against the profile"] == ""


def test_sau_is_set_beside_the_same_images_as_long(trained, tmp_path):
    changes = {"sau.n_steps": 12, "classifier.n_steps": 9, "classifier.method": "bsce"}
    longer = trained.vary(changes)
    variants = {"alone": {"sau.branches": "unaware"}, "drop": {"sau.strategy": "drop"}}
    judges = {s: longer.vary({"seed": s}) for s in longer.config.seeds}
    args = longer, Report(longer, tmp_path), variants, judges
    _, ahead = report_choice(*args, "choose_sau", choose.SAU)
    assert list(ahead.index) == ["the profile", "alone", "drop"]
    runs = pd.read_csv(tmp_path / "figures" / "smoke" / "choose_sau.csv")
    runs = runs.set_index(["variant", "seed"])
    for seed in longer.config.seeds:
        p = longer.vary({"seed": seed})
        alike = {"classifier.method": "ce", "classifier.omega": 1.0}  # whatever the profile's is
        as_long = p.vary({**alike, **p.as_long_as_sau()})
        assert as_long.config.classifier.n_steps == 12
        of_sau = {"the profile": {}, **variants}
        artifacts = {name: p.vary(changes).train_sau() for name, changes in of_sau.items()}
        for name, artifact in {AS_LONG_AS_SAU: as_long.train_on_synthetic(), **artifacts}.items():
            score = accuracy(p, artifact, "val")["overall"]
            assert runs.loc[(name, seed), "overall"] == pytest.approx(score, abs=1e-4)
        noise = noise_share(p.vary(variants["drop"]))
        assert runs.loc[("drop", seed), "noise"] == pytest.approx(noise, abs=1e-4)
    assert runs["noise"].isna().groupby("variant").all()[[AS_LONG_AS_SAU, "alone"]].all()
    assert not runs.loc["the profile", "noise"].isna().any()


def test_bsce_has_as_many_updates_as_the_classifier(tmp_path):
    p = Pipeline(load_config("smoke", **{"classifier.n_steps": 70}), tmp_path, "cpu", False)
    assert p.config.extractor.n_steps == 60
    assert (
        p.vary(choose._rows(p, {}, choose.DIFFULT)["BSCE"].changes).config.extractor.n_steps == 70
    )


class Samples:
    def __init__(self, images, labels):
        self.arrays = {"images": images, "labels": labels}

    def array(self, name):
        return self.arrays[name]


def test_copies_are_told_from_new_images(trained, monkeypatch):
    train, unseen = (load_split(trained.data(), name) for name in ("train", "test"))
    rare = np.flatnonzero(train.class_counts < trained.config.data.few_below)
    n_val = trained.config.data.n_val

    def found(images, labels):
        monkeypatch.setattr(Pipeline, "generate", lambda _: Samples(images, labels))
        return choose._copies(trained, trained)

    rows = np.isin(train.labels, rare)
    new = 100 / (len(rare) * n_val + 1)  # one of so many held-out images sets what is near
    assert found(train.images[rows], train.labels[rows]) == pytest.approx((100, new))
    share, expected = found(unseen.images, unseen.labels)  # of all classes: the rare ones count
    assert share < 10 and expected == pytest.approx(new)
    one = train.labels == rare[0]  # the other rare classes have no generated image
    assert found(train.images[one], train.labels[one]) == pytest.approx((100, 100 / (n_val + 1)))
    assert np.isnan(found(train.images[~rows], train.labels[~rows])).all()


def test_more_images_judge_where_the_cut_stays(trained):
    more = choose._judge(trained, 0, trained.config.data.n_val + 1)
    labels = load_split(more.data(), "val").labels
    assert np.bincount(labels).tolist() == [trained.config.data.n_val + 1] * 10
    kept, same = (load_split(p.data(), "train").images for p in (trained, more))
    assert np.array_equal(kept, same)


@pytest.fixture
def photos(tmp_path):
    """The folder `photos`: classes a and b, 20 images each for training and 4 for the test."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 20), ("test", 4)):
        for name in "ab":
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
                image.save(folder / f"{i}.png")
    return tmp_path


def test_what_cannot_be_judged_is_refused_before_any_training(photos, capsys):
    command = ["--profile", "folder", "--set", "path=photos", "--data-dir", str(photos)]
    command += ["--out", str(photos)]
    cut = [*command, "--set", "n_max=10", "--set", "imb_ratio=2"]
    for refused, message in (
        (
            [*cut, "--n-val", "500"],
            "expected 500 validation images of each class outside the training",
        ),
        ([*cut, "--n-val", "0"], "n_val: "),
        ([*command, "--n-val", "3"], "got none that are cut; leave it out"),
        (command, "expected validation images of each class, got none of a, b"),
        ([*cut, "--variant", "a", "schedule=cosine"], "plain_share"),
        ([*cut, "--variant", "a", "n_sau_steps=9"], "a: expected a setting that changes DiffuLT's"),
        ([*cut, "--variant", "a", "tau=2", "--variant", "b", "tau=2"], "trains the same as a"),
        (
            [*cut, "--sau", "--variant", "a", "omega=1"],
            "a: expected a setting that changes SAU, got",
        ),
        ([*command[:2], "--set", "path=none", *command[4:]], "none"),
    ):
        assert choose.main(refused) == 2
        assert message in capsys.readouterr().err
    shutil.copytree(photos / "photos" / "test", photos / "photos" / "val")
    assert choose.main([*cut, "--n-val", "3"]) == 2
    assert "got a validation part of their own; leave it out" in capsys.readouterr().err
    shutil.rmtree(photos / "photos" / "val")
    assert not list(photos.glob("runs/cache/extractor")) and not (photos / "figures").exists()
    p = Pipeline(
        load_config("folder", path="photos", n_max=10, imb_ratio=2), photos, "cpu", data_dir=photos
    )
    assert np.bincount(load_split(choose._judge(p, 0, 3).data(), "val").labels).tolist() == [3, 3]


def test_variants_change_what_set_gives():
    base = load_config("demo", plain_share=0.0)
    assert read_variants([["cosine", "schedule=cosine"]], base) == {
        "cosine": {"diffusion.schedule": "cosine"}
    }


def test_the_command_writes_both_tables(trained, capsys):
    out = str(trained.store.root.parents[1])
    command = ["--profile", "smoke", "--device", "cpu", "--out", out]
    for setting in (
        "n_diffusion_steps=12",
        "n_extractor_steps=20",
        "n_classifier_steps=20",
        "n_sampling_steps=3",
    ):
        command += ["--set", setting]  # the configuration of `trained`
    even = ["--variant", "even", "omega=1"]
    assert choose.main([*command, *even, "--name", "omega"]) == 0
    printed = capsys.readouterr().out
    assert "| even" in printed and "choose_omega_differences.md" in printed
    for name in ("differences", "a/b"):
        assert choose.main([*command, *even, "--name", name]) == 2
        assert "--name: expected letters, digits and -" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, message",
    [
        (["longer"], "--variant longer: expected PARAMETER=VALUE after the name, got nothing"),
        (["longer", "tau"], "--variant longer: expected PARAMETER=VALUE after the name"),
        (["BSCE", "tau=1"], "--variant BSCE: there is one of this name"),
        ([AS_LONG_AS_SAU, "tau=1"], "as long as SAU: there is one of this name"),
        (["a", "tua=1"], "unknown parameter 'tua'; did you mean 'tau'?"),
        (["a", "tau=1", "imb_ratio=10"], "--variant a: imb_ratio must be one for all variants"),
        (["a", "seeds=1"], "--variant a: seeds must be one for all variants"),
        (["a", "tau=1", "tau=2"], "--variant a: expected each parameter once"),
    ],
)
def test_what_is_no_variant_is_refused(given, message, capsys):
    with pytest.raises(ValueError) as caught:
        read_variants([given], load_config("smoke"))
    assert message in str(caught.value)
    assert choose.main(["--profile", "smoke", "--variant", *given]) == 2
    assert message in capsys.readouterr().err
    assert read_variants([["a", "tau=1", "omega=0.5"]], load_config("smoke")) == {
        "a": {"diffusion.tau": 1.0, "classifier.omega": 0.5}
    }
