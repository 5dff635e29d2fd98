"""Settings side by side on the validation part: what is written, what decides, what is refused."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from difflt_core import Pipeline
from difflt_core.data.long_tail import load_split
from difflt_core.experiments.results import accuracy
from difflt_core.reporting import choose
from difflt_core.reporting.choose import read_variants, report_choice
from difflt_core.reporting.items import Report


def test_rows_are_those_of_the_validation_part(trained, tmp_path):
    variants = {"other weight": {"classifier.omega": 1.0}}
    judges = {seed: trained.vary({"seed": seed}) for seed in trained.config.seeds}
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
            assert found[name, seed] == pytest.approx(accuracy(p, artifact, "val")["overall"])
    assert runs["copies %"].isna().tolist() == (runs["variant"] == "BSCE").tolist()
    caption = json.loads((tmp_path / "figures" / "smoke" / "choose.json").read_text())["caption"]
    n_images = len(load_split(trained.data(), "val").labels)
    assert f"on {n_images} validation images" in caption and "classifier.omega = 1.0" in caption
    assert list(ahead.index) == ["the profile", "other weight"]


def test_copies_are_told_from_new_images(trained, monkeypatch):
    train = load_split(trained.data(), "train")
    counts, data = train.class_counts, trained.config.data
    rare = np.flatnonzero(counts < data.few_below)

    class Samples:
        def __init__(self, images, labels):
            self.arrays = {"images": images, "labels": labels}

        def array(self, name):
            return self.arrays[name]

    rows = np.flatnonzero(np.isin(train.labels, rare))
    noise = np.random.default_rng(0).integers(0, 256, train.images[rows].shape, np.uint8)
    for images, share in ((train.images[rows], 100), (noise, 0)):
        monkeypatch.setattr(
            Pipeline, "generate", lambda _, images=images: Samples(images, train.labels[rows])
        )
        assert choose._copies(trained, trained) == share


def test_more_images_judge_where_the_cut_stays(trained):
    more = choose._judge(trained, 0, trained.config.data.n_val + 1)
    labels = load_split(more.data(), "val").labels
    assert np.bincount(labels).tolist() == [trained.config.data.n_val + 1] * 10
    kept, same = (load_split(p.data(), "train").images for p in (trained, more))
    assert np.array_equal(kept, same)


def test_too_many_to_judge_by_are_refused_before_any_training(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(20):
            image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
            image.save(tmp_path / "photos" / name / f"{i}.png")
    command = ["--profile", "folder", "--set", "path=photos", "--set", "n_max=10"]
    command += ["--set", "imb_ratio=2", "--data-dir", str(tmp_path), "--out", str(tmp_path)]
    for n, message in (("500", "expected 500 validation images of each class"), ("0", "n_val: ")):
        assert choose.main([*command, "--n-val", n]) == 2
        assert message in capsys.readouterr().err
    assert choose.main([*command, "--variant", "a", "schedule=cosine"]) == 2
    assert "plain_share" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/cache/extractor")) and not (tmp_path / "figures").exists()


@pytest.mark.parametrize(
    "given, message",
    [
        (["longer"], "--variant longer: expected PARAMETER=VALUE after the name, got nothing"),
        (["longer", "tau"], "--variant longer: expected PARAMETER=VALUE after the name"),
        (["BSCE", "tau=1"], "--variant BSCE: there is one of this name"),
        (["a", "tua=1"], "unknown parameter 'tua'; did you mean 'tau'?"),
        (["a", "tau=1", "imb_ratio=10"], "--variant a: imb_ratio must be one for all variants"),
        (["a", "seeds=1"], "--variant a: seeds must be one for all variants"),
    ],
)
def test_what_is_no_variant_is_refused(given, message, capsys):
    with pytest.raises(ValueError) as caught:
        read_variants([given], "smoke")
    assert message in str(caught.value)
    assert choose.main(["--profile", "smoke", "--variant", *given]) == 2
    assert message in capsys.readouterr().err
    assert read_variants([["a", "tau=1", "omega=0.5"]], "smoke") == {
        "a": {"diffusion.tau": 1.0, "classifier.omega": 0.5}
    }
