"""ImageNet-LT on a small root of JPEGs with lists in the original format, and the real class sizes."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from difflt_core import Pipeline, load_config, vary
from difflt_core.data import image_files
from difflt_core.data.image_files import read_image
from difflt_core.data.imagenet_lt import parse_lists
from difflt_core.data.long_tail import load_split, shot_groups

SYNSETS = ("n01440764", "n01443537", "n02084071")
SPLITS = ("train", "val", "test")


def _row(split, c, i, synset):
    if split == "test":
        return f"val/{synset}/ILSVRC2012_val_{1000 * c + i:08}.JPEG {c}\n"
    return f"train/{synset}/{synset}_{i + (5000 if split == 'val' else 0)}.JPEG {c}\n"


def _texts(synsets, **counts):
    """The lists of these counts per class, rows of the classes in turn, as the published ones."""
    return {
        split: "".join(
            _row(split, c, i, synset)
            for i in range(max(counts[split]))
            for c, synset in enumerate(synsets)
            if i < counts[split][c]
        )
        for split in SPLITS
    }


def _write(root, texts, lists=None):
    """Every file that the lists name, as a JPEG of its own noise, and the lists."""
    for split, text in texts.items():
        ((lists or root) / f"ImageNet_LT_{split}.txt").write_text(text)
        for k, row in enumerate(text.splitlines()):
            path = root / row.split()[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng([k, *split.encode()])
            size = (int(noise.integers(20, 50)), int(noise.integers(20, 50)), 3)
            Image.fromarray(noise.integers(0, 256, size, np.uint8)).save(path, "JPEG")


@pytest.fixture
def root(tmp_path):
    """ILSVRC2012 with 9, 5 and 2 training images, 2 for validation and 3 for testing per class."""
    folder = tmp_path / "data" / "ILSVRC2012"
    folder.mkdir(parents=True)
    _write(folder, _texts(SYNSETS, train=(9, 5, 2), val=(2, 2, 2), test=(3, 3, 3)))
    return folder


def pipeline(root, out="out", **changes):
    changes = {"data.image_size": 16, "data.path": root.name} | changes
    config = vary(load_config("imagenet"), changes)
    return Pipeline(config, root.parents[1] / out, "cpu", False, root.parent)


def test_splits_of_the_lists(root):
    data = pipeline(root).data()
    train, val, test = (load_split(data, split) for split in SPLITS)
    assert train.class_names == SYNSETS
    assert [s.class_counts.tolist() for s in (train, val, test)] == [[9, 5, 2], [2] * 3, [3] * 3]
    assert train.images.shape == (16, 16, 16, 3) and train.images.dtype == np.uint8
    assert train.labels[:4].tolist() == [0, 1, 2, 0] and train.labels.dtype == np.int64
    assert test.files[1] == "val/n01443537/ILSVRC2012_val_00001000.JPEG"
    for split in (train, val, test):
        for name, image in zip(split.files, split.images, strict=True):
            assert np.array_equal(read_image(root / name, (16, 16, 3))[0], image)


def test_the_profile_reads_64_pixels(root):
    data = pipeline(root, **{"data.image_size": 64}).data()
    assert load_split(data, "val").images.shape == (6, 64, 64, 3)


def test_lists_in_the_data_folder(root):
    before = pipeline(root).data().key
    for path in root.glob("*.txt"):
        shutil.move(path, root.parent)
    assert pipeline(root).data().key == before


def test_the_key_follows_the_lists_and_not_the_place(root, tmp_path):
    before = pipeline(root).data()
    moved = tmp_path / "elsewhere" / "ILSVRC2012"
    shutil.copytree(root, moved)
    assert pipeline(moved).data().key == before.key
    assert not any(str(root) in p.read_text() for p in before.path.glob("*.json"))
    lines = (moved / "ImageNet_LT_val.txt").read_text().splitlines(keepends=True)
    (moved / "ImageNet_LT_val.txt").write_text("".join(lines[:-1]))
    assert pipeline(moved).data().key != before.key


def test_another_copy_of_the_images_has_another_key(root, tmp_path):
    """A resized ILSVRC2012 with the same lists."""
    shutil.copytree(root, tmp_path / "resized")
    for file in (tmp_path / "resized").rglob("*.JPEG"):
        with Image.open(file) as image:
            image.resize((8, 8)).save(file, "JPEG")
    assert pipeline(tmp_path / "resized").data().key != pipeline(root).data().key


def test_killed_and_resumed_it_goes_on_and_gives_the_same_bytes(root, monkeypatch):
    whole = pipeline(root, "whole").data()
    monkeypatch.setattr(image_files, "CHUNK", 4)
    read, last = [], root / load_split(whole, "val").files[-1]

    def killed(path, shape):
        read.append(path)
        if path == last:
            raise KeyboardInterrupt
        return read_image(path, shape)

    monkeypatch.setattr(image_files, "read_image", killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline(root, "killed").data()
    n_train, last = len(load_split(whole, "train").files), None
    assert len(read) > n_train
    read.clear()
    resumed = pipeline(root, "killed").data()
    names = load_split(whole, "val").files[4:] + load_split(whole, "test").files
    assert sorted(read) == sorted(root / name for name in names)
    assert resumed.manifest["files"] == whole.manifest["files"]


def test_files_that_cannot_be_read_are_named_and_the_others_kept(root, monkeypatch):
    bad, cut = (root / row.split()[0] for row in _lines(root, "train")[:2])
    whole = cut.read_bytes()
    bad.write_bytes(b"not a picture")
    cut.write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(image_files, "CHUNK", 4)
    with pytest.raises(ValueError, match="2 files cannot be read as images") as fault:
        pipeline(root).data()
    assert str(bad) in str(fault.value) and str(cut) in str(fault.value)
    for path in (bad, cut):
        path.write_bytes(whole)
    read = []
    monkeypatch.setattr(
        image_files, "read_image", lambda path, shape: read.append(path) or read_image(path, shape)
    )
    pipeline(root).data()
    assert sorted(read) == sorted(root / row.split()[0] for row in _lines(root, "train")[:4])


def test_other_colours_are_converted_and_named(root):
    for mode, row in zip(("L", "CMYK"), _lines(root, "test"), strict=False):
        path = root / row.split()[0]
        Image.open(path).convert(mode).save(path, "JPEG")
    with pytest.warns(UserWarning, match="unusual files:") as said:
        pipeline(root).data()
    text = "".join(str(warning.message) for warning in said)
    for mode, row in zip(("L", "CMYK"), _lines(root, "test"), strict=False):
        name = re.escape(row.split()[0])
        assert re.search(rf"Colour mode {mode}, converted to RGB: 1\n .*{name}\n?", text)


def _lines(root, split):
    return (root / f"ImageNet_LT_{split}.txt").read_text().splitlines()


def test_missing_files_are_named(root):
    shutil.rmtree(root / "val" / SYNSETS[0])
    with pytest.raises(FileNotFoundError, match="3 of the 31 listed files are missing") as fault:
        pipeline(root).data()
    shown = str(fault.value).splitlines()[1:]
    assert [Path(line.strip()).name for line in shown] == [
        f"ILSVRC2012_val_0000000{i}.JPEG" for i in range(3)
    ]
    for part in ("train", "val"):
        shutil.rmtree(root / part)
        (root / part).mkdir()
    with pytest.raises(FileNotFoundError) as fault:
        pipeline(root).data()
    assert len(str(fault.value).splitlines()) == 22
    assert str(fault.value).endswith("\n  and 11 more")


def test_a_missing_root_or_list_is_named(root):
    (root / "ImageNet_LT_val.txt").unlink()
    with pytest.raises(FileNotFoundError) as fault:
        pipeline(root).data()
    assert f"expected ImageNet_LT_val.txt in {root} or {root.parent}" in str(fault.value)
    assert "OLTR" in str(fault.value)
    shutil.rmtree(root / "val")
    with pytest.raises(FileNotFoundError, match="expected the unpacked ILSVRC2012 at .*ILSVRC2012"):
        pipeline(root).data()


@pytest.mark.parametrize(
    "split, row, message",
    [
        ("train", "train/n01440764/a.JPEG", "train.txt, line 10: expected `relative/path label`"),
        ("train", "train/n01440764/a.JPEG 0 ", "got 'train/n01440764/a.JPEG 0 '"),
        ("val", "train/n01440764/a.JPEG -1", "val.txt, line 4: .* a label from 0 on"),
        ("val", "a.JPEG 0", "val.txt, line 4: expected `relative/path label`"),
        ("test", "", "test.txt, line 4: expected .* got ''"),
        ("train", f"train/n01440764/a.JPEG {10**30}", "line 10: expected `relative/path label`"),
        ("train", f"train/n9/a.JPEG {10**12}", f"class 3 has no .* there is a label {10**12}"),
        ("train", "train/n9/a.JPEG 4", "class 3 has no training image, .* is the list whole?"),
        ("val", "train/n9/a.JPEG 3", "val.txt, line 4: expected .* 0 to 2, got 3"),
        ("test", f"val/n9/a.JPEG {10**15}", "test.txt, line 4: expected .* 0 to 2, got 10{15}"),
        ("train", "train/n9/a.JPEG 0", "train.txt, line 10: label 0 is n01440764 in the training"),
        ("test", "val/n01440764/a.JPEG 1", "test.txt, line 4: label 1 is n01443537 in the"),
        ("train", "train/n00/a.JPEG 3", "sorted order .* got n00 for label 3 after n02084071"),
        ("train", "train/n02084071/a.JPEG 3", "got n02084071 for label 3 after n02084071"),
        ("train", "/train/n01440764/a.JPEG 0", "line 10: expected a path inside the ILSVRC2012"),
        ("val", "train/../../n01440764/a.JPEG 0", "val.txt, line 4: expected a path inside"),
    ],
)
def test_bad_lines_are_named(split, row, message):
    texts = _texts(SYNSETS, train=(4, 3, 2), val=(1, 1, 1), test=(1, 1, 1))
    texts[split] += row + "\n"
    with pytest.raises(ValueError, match=message):
        parse_lists(texts)


def test_a_file_in_two_splits_is_said():
    texts = _texts(SYNSETS, train=(4, 3, 2), val=(1, 1, 1), test=(1, 1, 1))
    texts["val"] += texts["train"]
    with pytest.warns(UserWarning, match="9 files are in both train and val, e.g. train/n01440764"):
        parse_lists(texts)


def test_the_last_newline_may_be_missing():
    texts = _texts(SYNSETS, train=(4, 3, 2), val=(1, 1, 1), test=(1, 1, 1))
    found = parse_lists(texts | {"test": texts["test"].removesuffix("\n")})
    assert found.files == parse_lists(texts).files


def test_golden_class_sizes():
    """Of the published training list, as two public repositories count them."""
    counts = json.loads(Path(__file__).with_name("imagenet_lt_counts.json").read_text())
    assert len(counts) == 1000 and sum(counts) == 115_846
    assert (min(counts), max(counts), counts[0], counts[86]) == (5, 1280, 50, 1280)
    assert counts.count(20) == 10 and counts.count(100) == 6
    synsets = [f"n{c:08}" for c in range(1000)]
    texts = _texts(synsets, train=counts, val=[20] * 1000, test=[50] * 1000)
    found = parse_lists(texts)
    assert [len(found.files[s]) for s in SPLITS] == [115_846, 20_000, 50_000]
    train = np.bincount(found.labels["train"])
    assert train.tolist() == counts
    assert {name: len(c) for name, c in shot_groups(train).items()} == {
        "many": 385,
        "medium": 479,
        "few": 136,
    }


def test_profile_of_the_paper():
    config = load_config("imagenet")
    assert config.extractor.arch == config.classifier.arch == "resnet10"
    assert config.extractor.in_steps(115_846).n_steps == 90 * 227
    assert config.classifier.in_steps(1000 * 1280).n_steps == 90 * 2500
    with pytest.raises(ValueError, match="imagenet_lt is used as its lists have it"):
        load_config("imagenet", imb_ratio=10)
