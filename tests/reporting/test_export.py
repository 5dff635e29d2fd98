"""The export: what other programs find in it, and that it is whole or not there."""

import os

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from difflt_core import Pipeline, load_config, vary
from difflt_core.data.long_tail import load_split
from difflt_core.experiments.results import kept
from difflt_core.reporting import predict
from difflt_core.reporting.export import _folder_names, export, export_once, main


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "balanced"
    return folder, export(trained, folder)


def test_image_folder_reads_the_balanced_set(trained, exported):
    folder, manifest = exported
    train, chosen = load_split(trained.data(), "train"), kept(trained)
    data = ImageFolder(folder)
    assert data.classes == list(train.class_names)
    assert len(data) == len(train.labels) + len(chosen) == manifest["kept"].sum()
    made = np.asarray(trained.generate().array("labels"))[chosen]
    wanted = train.class_counts + np.bincount(made, minlength=len(train.class_names))
    assert np.bincount(data.targets).tolist() == wanted.tolist()


def test_hugging_faces_imagefolder_reads_it(trained, exported, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    from datasets import load_dataset

    folder, manifest = exported
    data = load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path))["train"]
    assert len(data) == manifest["kept"].sum()
    assert data.features["label"].names == list(load_split(trained.data(), "train").class_names)
    other = ImageFolder(folder)
    assert data["label"] == other.targets
    assert np.array_equal(np.asarray(data[0]["image"].convert("RGB")), np.asarray(other[0][0]))


def test_the_manifest_says_what_each_image_is(trained, exported):
    folder, written = exported
    manifest = pd.read_csv(folder / "manifest.csv", dtype={"class": str}, keep_default_na=False)
    assert list(manifest) == list(written) and len(manifest) == len(written)
    drawn = manifest[manifest["origin"] == "generated"].reset_index(drop=True)
    images, labels = (trained.generate().array(name) for name in ("images", "labels"))
    assert len(drawn) == len(labels) and set(drawn["artifact"]) == {trained.generate().key}
    for i in (0, len(drawn) - 1):
        row = drawn.iloc[i]
        assert row["class"] == str(labels[i]) and row["type"] in ("ID", "AID", "OOD")
        assert (row["file"] != "") == row["kept"] and row["seed"] == "0"
        assert (folder / row["nearest"]).exists() and float(row["nearest_distance"]) >= 0
        if row["file"]:
            assert np.array_equal(np.asarray(Image.open(folder / row["file"])), images[i, ..., 0])
    card = (folder / "README.md").read_text()
    assert "## Limits" in card and trained.generate().key not in card and "| 0 " in card


def test_an_export_that_is_there_is_not_touched(trained, exported):
    folder, _ = exported
    before = sorted(os.listdir(folder))
    with pytest.raises(FileExistsError, match="is there already"):
        export(trained, folder)
    assert sorted(os.listdir(folder)) == before


def test_an_export_that_fails_leaves_nothing(trained, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("difflt_core.reporting.export._png", full)
    with pytest.raises(OSError, match="No space left"):
        export(trained, tmp_path / "balanced")
    assert not list(tmp_path.iterdir())


def test_wrong_ways_to_give_the_real_images(trained, tmp_path):
    with pytest.raises(ValueError, match="real: expected one of array, copy, link, got 'move'"):
        export(trained, tmp_path / "a", "move")
    with pytest.raises(ValueError, match="real: digits has no image files; use array"):
        export(trained, tmp_path / "a", "copy")


@pytest.mark.parametrize("real", ["copy", "link"])
def test_files_of_a_folder_come_along(tmp_path, real):
    for c, n in enumerate((9, 5, 4)):
        for i in range(n):
            path = tmp_path / "d" / f"kind {c}" / f"{i}.PNG"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(10 * c + i).integers(0, 256, (40, 30, 3), np.uint8)
            Image.fromarray(pixels).save(path)
    tiny = {"diffusion.n_steps": 2, "diffusion.batch_size": 4, "extractor.n_steps": 2}
    tiny |= {"sampling.n_steps": 1, "data.image_size": 16, "filtering.keep": "all"}
    p = Pipeline(vary(load_config("folder"), tiny), tmp_path / "out", "cpu", False, tmp_path / "d")
    manifest = export(p, tmp_path / "balanced", real)
    first = tmp_path / "balanced" / manifest["file"][0]
    assert Image.open(first).size == (30, 40) and first.is_symlink() == (real == "link")
    assert len(ImageFolder(tmp_path / "balanced")) == manifest["kept"].sum()


def test_no_class_leads_out_of_the_export():
    names = _folder_names(("..", "a/b", "A", "a", "", "x ", "数字", 'q"?', "../../etc"))
    assert len({n.casefold() for n in names}) == len(names)
    assert all(n and "/" not in n and n not in (".", "..") for n in names) and "数字" in names


def test_the_command(tmp_path, capsys):
    settings = ["n_diffusion_steps=2", "n_extractor_steps=2", "n_sampling_steps=1", "n_max=40"]
    settings.append("n_classifier_steps=2")
    command = ["--profile", "smoke", "--out", str(tmp_path), "--to", str(tmp_path / "set")]
    command += [part for s in settings for part in ("--set", s)]
    with_model = [*command, "--model", str(tmp_path / "model")]
    assert main(with_model) == 0 and "images in" in capsys.readouterr().out
    assert (tmp_path / "set" / "README.md").exists()
    image = next((tmp_path / "set").rglob("*.png"))
    assert predict.main(["--model", str(tmp_path / "model"), str(image)]) == 0
    assert image.name in capsys.readouterr().out
    assert main(command) == 1 and "is there already" in capsys.readouterr().err


def test_what_another_rule_keeps_is_another_export(trained, tmp_path):
    folders = [
        export_once(trained.vary({"filtering.keep": keep}), tmp_path)
        for keep in ("id", "aid", "id")
    ]
    assert folders[0] == folders[2] != folders[1]
    assert "Kept: id." in (folders[0] / "README.md").read_text()
    assert "Kept: aid." in (folders[1] / "README.md").read_text()


def test_a_mirror_image_is_a_copy_where_the_generator_saw_both(trained, tmp_path, monkeypatch):
    train = load_split(trained.data(), "train").images
    p = trained.vary({"diffusion.flip": True, "diffusion.n_steps": 2})
    samples = p.generate()
    images = np.array(samples.array("images"))
    images[:3] = train[:3, :, ::-1]
    whole = type(samples).array
    monkeypatch.setattr(
        type(samples), "array",
        lambda self, name: images if (self.key, name) == (samples.key, "images") else whole(self, name),
    )  # fmt: skip
    manifest = export(p, tmp_path / "balanced")
    drawn = manifest[manifest["origin"] == "generated"].iloc[:3]
    assert drawn["nearest_distance"].tolist() == [0, 0, 0]
    assert drawn["nearest"].tolist() == manifest["file"].iloc[:3].tolist()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--model", "{there}"], "is there already; name a new one"),
        (["--onnx"], "--onnx: goes with --model DIR"),
        (["--model", "{there}/set"], "--model: expected another folder than --to"),
        (["--real", "copy"], "real: digits has no image files; use array"),
        (["--set", "n_shown=5"], "n_shown is a parameter of notebook 09 alone"),
    ],
)
def test_what_would_fail_at_the_end_is_said_before_the_training(
    tmp_path, capsys, monkeypatch, more, message
):
    monkeypatch.setattr(Pipeline, "build", lambda *_, **__: pytest.fail("trained"))
    more = [part.format(there=tmp_path) for part in more]
    command = ["--profile", "smoke", "--out", str(tmp_path), "--to", str(tmp_path / "set"), *more]
    assert main(command) and message in capsys.readouterr().err
