"""A saved model: predicts as the tables do, and says of each file what it found."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from difflt_core.data.long_tail import load_split
from difflt_core.experiments import results
from difflt_core.recognition.classifier import extract
from difflt_core.reporting import baseline
from difflt_core.reporting import predict as predict_module
from difflt_core.reporting.predict import (
    SavedModel,
    image_paths,
    main,
    predict,
    save_model,
    save_model_once,
    write_onnx,
)

N = 40  # test images


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(trained, folder)
    return folder


@pytest.fixture(scope="module")
def pictures(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("a föl der")
    for i, image in enumerate(load_split(trained.data(), "test").images[:N]):
        Image.fromarray(image[..., 0]).save(folder / f"{i:03}.png")
    return folder


def test_it_predicts_as_the_tables_do(trained, saved, pictures, tmp_path):
    to = tmp_path / "found.csv"
    assert main([str(pictures), "--model", str(saved), "--to", str(to), "--device", "cpu"]) == 0
    found = pd.read_csv(to, dtype={"class": str})
    names = load_split(trained.data(), "test").class_names
    theirs = results.predictions(trained, trained.train_classifier())[:N]
    assert found["class"].tolist() == [names[c] for c in theirs]
    p = found[["probability", *(f"probability_{k}" for k in range(2, 6))]].to_numpy()
    assert (np.diff(p, axis=1) <= 0).all() and (0 < p).all() and (p.sum(axis=1) <= 1.001).all()
    assert (found["out_of_distribution"] == (found["distance"] > 2)).all()


def test_each_training_has_a_folder_that_is_written_once(trained, pictures, tmp_path):
    bsce = trained.vary({"classifier.method": "bsce"})
    saved = save_model_once(bsce, tmp_path, "BSCE", "train_on_real")
    written = (saved / "about.json").stat().st_mtime_ns
    assert save_model_once(bsce, tmp_path, "BSCE", "train_on_real") == saved
    assert (saved / "about.json").stat().st_mtime_ns == written
    assert saved != save_model_once(trained, tmp_path, "DiffuLT", "train_classifier")
    # the same classifier, another bound of what is like no class
    other = bsce.vary({"filtering.aid_factor": 3.0})
    assert saved != save_model_once(other, tmp_path, "BSCE", "train_on_real")
    found = predict(SavedModel(saved), image_paths([pictures]))["class"].tolist()
    names = load_split(trained.data(), "test").class_names
    theirs, diffult = (
        [names[c] for c in results.predictions(bsce, artifact)[:N]]
        for artifact in (bsce.train_on_real(), trained.train_classifier())
    )
    assert found == theirs != diffult


def test_a_classifier_on_real_images_alone_is_saved_too(pictures, tmp_path, capsys):
    command = ["--profile", "smoke", "--out", str(tmp_path), "--model", str(tmp_path / "model")]
    for setting in ("method=bsce", "n_extractor_steps=2", "n_max=40"):
        command += ["--set", setting]
    assert baseline.main(command) == 0
    assert main([str(pictures / "000.png"), "--model", str(tmp_path / "model")]) == 0
    assert "000.png" in capsys.readouterr().out
    assert baseline.main(command) == 1 and "is there already" in capsys.readouterr().err


def test_distance_is_that_of_the_nearest_class(trained, saved):
    """Of real training images it is at most 1, the radius of their own class."""
    images = load_split(trained.data(), "train").images[:30]
    assert (SavedModel(saved).nearest(images) <= 1 + 1e-5).all()
    noise = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    assert SavedModel(saved).nearest(noise).mean() > SavedModel(saved).nearest(images).mean()


def test_what_cannot_be_read_is_said_and_the_rest_predicted(saved, pictures, tmp_path, capsys):
    for name, content in (("zip.jpg", b"PK\x03\x04"), ("empty.png", b""), ("text.png", b"no")):
        (tmp_path / name).write_bytes(content)
    whole = (pictures / "000.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "good.png").write_bytes(whole)
    assert main([str(tmp_path), "--model", str(saved), "--device", "cpu"]) == 0
    told = capsys.readouterr()
    assert "4 of 5 files cannot be read as images" in told.err
    rows = [line for line in told.out.splitlines() if "good.png" in line]
    assert len(rows) == 1 and "cannot be read" not in rows[0]
    assert told.out.count("cannot be read as an image") == 4


def test_what_would_fail_after_the_work_is_said_before_it(saved, pictures, tmp_path, capsys):
    def refused(*argv):
        assert main([*map(str, argv), "--device", "cpu"]) == 1
        return capsys.readouterr().err

    (tmp_path / "phone").mkdir()
    for i in range(2):
        (tmp_path / "phone" / f"{i}.heic").write_bytes(b"no image that is known")
    assert "expected images, got 2 .heic" in refused(tmp_path / "phone", "--model", saved)
    assert "expected a file, got a folder" in refused(pictures, "--model", saved, "--to", tmp_path)
    shutil.copytree(saved, tmp_path / "cut")
    weights = tmp_path / "cut" / "classifier" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "classifier: cannot be read" in refused(pictures, "--model", tmp_path / "cut")


def test_a_name_that_is_not_utf_8_is_shown(saved, pictures, tmp_path):
    shutil.copy(pictures / "000.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    to = tmp_path / "found.csv"
    assert main([str(tmp_path), "--model", str(saved), "--to", str(to), "--device", "cpu"]) == 0
    assert "caf\\xe9.png" in to.read_text("utf-8")


def test_colour_and_size_do_not_matter(saved, pictures, tmp_path):
    image = Image.open(pictures / "003.png")
    image.convert("RGB").save(tmp_path / "rgb.png")
    image.convert("CMYK").save(tmp_path / "cmyk.tif")
    image.resize((64, 64), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    found = predict(SavedModel(saved), image_paths([pictures / "003.png", tmp_path]))
    assert found["class"].nunique() == 1 and len(found) == 4


@pytest.mark.parametrize(
    "file, harm",
    [
        ("about.json", b""),
        ("about.json", b"{}"),
        ("about.json", b'{"class_names": ['),
        ("phi_0/centres.npy", b""),
        ("phi_0/model.json", b"{}"),
        ("classifier/model.json", b""),
        ("classifier/model.safetensors", b"cut"),
    ],
)
def test_a_folder_that_was_copied_by_half_is_named(saved, pictures, tmp_path, capsys, file, harm):
    shutil.copytree(saved, tmp_path / "model")
    (tmp_path / "model" / file).write_bytes(harm)
    assert main([str(pictures), "--model", str(tmp_path / "model")]) == 1
    said = capsys.readouterr().err
    assert str(tmp_path / "model") in said and "copy the folder again" in said


def test_wrong_folders_are_named(trained, saved, pictures, tmp_path, capsys):
    assert main([str(tmp_path / "none"), "--model", str(saved)]) == 1
    assert "there is no such file or folder" in capsys.readouterr().err
    assert main([str(pictures), "--model", str(tmp_path)]) == 1
    assert "expected a folder that" in capsys.readouterr().err
    with pytest.raises(FileExistsError, match="is there already"):
        save_model(trained, saved)


def test_images_of_a_folder_wherever_it_lies(pictures, tmp_path, monkeypatch):
    """Below a hidden folder, or by a path with dots; what is hidden or no image in it is left out."""
    here = tmp_path / ".cache" / "photos"
    (here / "deeper").mkdir(parents=True)
    for name in ("a.png", ".hidden.png", "notes.txt", "deeper/b.png"):
        (here / name).write_bytes((pictures / "000.png").read_bytes())
    assert image_paths([here]) == [here / "a.png", here / "deeper" / "b.png"]
    monkeypatch.chdir(here / "deeper")
    assert len(image_paths([Path("..")])) == 2


def test_it_holds_no_pickle_and_names_its_classes(saved):
    kinds = {p.suffix for p in saved.rglob("*") if p.is_file()}
    assert kinds == {".safetensors", ".json", ".npy"}
    about = json.loads((saved / "about.json").read_text())
    assert len(about["class_names"]) == 10 and about["image_shape"] == [8, 8, 1]
    np.load(saved / "phi_0" / "centres.npy", allow_pickle=False)


def test_onnx_gives_torchs_logits_for_any_number_of_images(trained, saved, tmp_path):
    import onnxruntime

    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    images = load_split(trained.data(), "test").images[:N]
    path = write_onnx(SavedModel(folder), images)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    mine = extract(SavedModel(folder).classifier, images)[1]
    for n in (1, 3, N):
        x = images[:n].transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
        theirs = session.run(["logits"], {"images": x})[0]
        np.testing.assert_allclose(theirs, mine[:n], atol=1e-4)


def test_onnx_that_differs_is_refused_and_removed(trained, saved, tmp_path, monkeypatch):
    import onnxruntime

    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    wrong = lambda *_, **__: SimpleNamespace(run=lambda *_: [np.zeros((2, 10))])  # noqa: E731
    monkeypatch.setattr(onnxruntime, "InferenceSession", wrong)
    with pytest.raises(RuntimeError, match="onnx: logits differ from torch's by"):
        write_onnx(SavedModel(folder), load_split(trained.data(), "test").images[:2])
    assert not (folder / "classifier" / "model.onnx").exists()


def test_onnx_without_its_packages_says_what_to_install(saved, monkeypatch):
    monkeypatch.setattr(predict_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[onnx\]"'):
        write_onnx(SavedModel(saved), np.zeros((1, 8, 8, 1), np.uint8))
