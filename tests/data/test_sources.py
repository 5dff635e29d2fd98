"""The datasets: the community's protocol, and each loader on small files in its own format."""

import gzip
import hashlib
import os
import pickle
import re
import shutil
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from difflt_core import Pipeline, load_config, vary
from difflt_core.config import DataConfig
from difflt_core.data import folders, published
from difflt_core.data.crops import centre_crops
from difflt_core.data.folders import folder_fingerprint, images_in, left_out, scan_folder
from difflt_core.data.image_files import listed, read_image
from difflt_core.data.long_tail import (
    class_sizes,
    left_out_indices,
    load_split,
    long_tail_indices,
)
from difflt_core.data.sources import READERS, build_data
from difflt_core.engine.code_version import code_version
from difflt_core.experiments.results import accuracy


def first_five(n_classes, per_class, ratio, c):
    labels = np.repeat(np.arange(n_classes), per_class)
    kept = long_tail_indices(labels, class_sizes(n_classes, per_class, ratio))
    return (kept[labels[kept] == c][:5] - c * per_class).tolist()


@pytest.mark.parametrize("ratio", [200, 100, 50, 10])
def test_golden_indices(ratio):
    """Long-tail protocol: positions inside the class of the first five images kept."""
    assert first_five(100, 500, ratio, 0) == [90, 254, 283, 445, 461]
    assert first_five(100, 500, ratio, 1) == [277, 307, 436, 88, 261]
    last = [348, 153, 363, 361, 299]
    assert first_five(100, 500, ratio, 99) == last[: class_sizes(100, 500, ratio)[99]]
    assert first_five(10, 5000, ratio, 0) == [398, 3833, 4836, 4572, 636]
    assert first_five(10, 5000, ratio, 1) == [597, 332, 521, 3935, 4800]
    assert first_five(10, 5000, ratio, 9) == [2204, 3816, 2206, 2507, 1926]


def test_a_cut_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match="class 1: expected 1 to 4 images after the cut, got 0"):
        long_tail_indices(np.repeat([0, 1], 4), [4, 0])
    with pytest.raises(ValueError, match="class 0: expected 1 to 4 images after the cut, got 5"):
        long_tail_indices(np.repeat([0, 1], 4), [5, 1])


def _write_cifar(folder, monkeypatch, n=4):
    """cifar-10-batches-py with n images per class and batch, and the hashes torchvision wants."""
    from torchvision.datasets import CIFAR10

    base = folder / "cifar-10-batches-py"
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name, content):
        data = pickle.dumps(content)
        (base / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    def batch():
        return {
            "data": rng.integers(0, 256, (10 * n, 3072), np.uint8),
            "labels": list(range(10)) * n,
        }

    train = [write(f"data_batch_{i}", batch()) for i in range(1, 6)]
    test = [write("test_batch", batch())]
    names = write("batches.meta", {"label_names": [f"class {c}" for c in range(10)]})
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", test)
    monkeypatch.setattr(
        CIFAR10, "meta", {"filename": names[0], "key": "label_names", "md5": names[1]}
    )
    return base


@pytest.fixture
def cifar(tmp_path):
    data = {"name": "cifar10", "n_classes": 10, "n_max": 20, "imb_ratio": 10, "image_size": 32}
    return vary(load_config("smoke"), {f"data.{k}": v for k, v in data.items()})


def test_cifar10_from_its_own_files(cifar, tmp_path, monkeypatch):
    _write_cifar(tmp_path / "data", monkeypatch)
    p = Pipeline(cifar, tmp_path, "cpu", False, tmp_path / "data")
    train, val, test = (load_split(p.data(), split) for split in ("train", "val", "test"))
    assert train.class_counts.tolist() == class_sizes(10, 20, 10)
    assert train.images.shape[1:] == (32, 32, 3) and len(val.images) == 0 and len(test.images) == 40
    assert train.class_names[3] == "class 3"


def test_a_damaged_cifar_file_is_refused_before_it_is_read(cifar, tmp_path, monkeypatch):
    base = _write_cifar(tmp_path / "data", monkeypatch)
    (base / "data_batch_2").write_bytes(b"cos\nsystem\n(S'touch /tmp/evil'\ntR.")
    with pytest.raises(FileNotFoundError, match="missing or damaged"):
        Pipeline(cifar, tmp_path, "cpu", False, tmp_path / "data").data()


def test_cifar10_at_16_pixels_has_validation_images_from_outside_the_cut(
    cifar, tmp_path, monkeypatch
):
    _write_cifar(tmp_path / "data", monkeypatch)
    small = vary(cifar, {"data.n_max": 10, "data.n_val": 10, "data.image_size": 16})
    p = Pipeline(small, tmp_path, "cpu", False, tmp_path / "data")
    splits = {split: load_split(p.data(), split) for split in ("train", "val", "test")}
    assert {s.images.shape[1:] for s in splits.values()} == {(16, 16, 3)}
    assert splits["val"].class_counts.tolist() == [10] * 10
    seen = {image.tobytes() for image in splits["train"].images}
    assert not any(image.tobytes() in seen for image in splits["val"].images)
    other = load_split(p.vary({"data_seed": 1}).data(), "train")
    assert other.class_counts.tolist() == splits["train"].class_counts.tolist()
    assert not np.array_equal(other.images, splits["train"].images)


def test_what_a_cut_leaves_out():
    labels = np.repeat([0, 1], 10)
    left = left_out_indices(labels, [6, 2], 3)
    assert np.bincount(labels[left]).tolist() == [3, 3]
    for counts in ([6, 6], [6, 2], [3, 1]):  # of any ratio
        assert not set(left) & set(long_tail_indices(labels, counts))
    assert len(left_out_indices(labels, [6, 2], 5)) == 0  # class 0 has only four


def _write_fashion(folder, n=60, zipped=True):
    """Fashion-MNIST's four files, with n images each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in ("train", "t10k"):
        labels = np.arange(n, dtype=np.uint8) % 10
        heads = np.array([2051, n, 28, 28], ">i4"), np.array([2049, n], ">i4")
        bodies = rng.integers(0, 256, (n, 784), np.uint8), labels
        for kind, head, body in zip(("images-idx3", "labels-idx1"), heads, bodies, strict=True):
            data = head.tobytes() + body.tobytes()
            path = folder / f"{name}-{kind}-ubyte"
            if zipped:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(data))
            else:
                path.write_bytes(data)


@pytest.fixture
def fashion(monkeypatch, tmp_path):
    """A pipeline on files of 60 images, in a place without Debian's package."""
    parts = {"train": ("train", 60), "test": ("t10k", 60)}
    monkeypatch.setattr(published, "_FASHION_PARTS", parts)
    monkeypatch.setattr(published, "DEBIAN_FASHION", tmp_path / "debian")
    config = load_config("fashion", n_max=4, imb_ratio=2)
    config = vary(config, {"data.n_val": 2})
    return Pipeline(config, tmp_path, "cpu", False, tmp_path / "data")


@pytest.mark.parametrize("place, zipped", [("data", True), ("data/FashionMNIST/raw", False)])
def test_fashion_mnist_from_its_own_files(fashion, tmp_path, place, zipped):
    _write_fashion(tmp_path / place, zipped=zipped)
    train, val, test = (load_split(fashion.data(), split) for split in ("train", "val", "test"))
    assert train.class_counts.tolist() == class_sizes(10, 4, 2)
    assert train.images.shape[1:] == (16, 16, 1) and len(val.images) == 20
    assert len(test.images) == 60 and train.class_names[0] == "T-shirt/top"


def test_fashion_mnist_files_that_are_missing_or_damaged_are_named(fashion, tmp_path):
    with pytest.raises(FileNotFoundError, match="Debian's package dataset-fashion-mnist"):
        fashion.data()
    _write_fashion(tmp_path / "data", zipped=False)
    short = tmp_path / "data" / "t10k-images-idx3-ubyte"
    short.write_bytes(short.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=f"{short.name}: expected magic .* 47056 bytes, got .*47055"
    ):
        fashion.data()
    _write_fashion(tmp_path / "data")
    short.unlink()
    zipped = short.with_name(f"{short.name}.gz")
    zipped.write_bytes(zipped.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{zipped.name} cannot be read"):
        fashion.data()
    whole = gzip.compress(bytes(range(256)) * 64)
    zipped.write_bytes(whole[:10] + bytes([whole[10] ^ 1]) + whole[11:])  # no block of this type
    with pytest.raises(ValueError, match=f"{zipped.name} cannot be read .*invalid"):
        fashion.data()
    _write_fashion(tmp_path / "data", zipped=False)
    labels = short.with_name("t10k-labels-idx1-ubyte")
    labels.write_bytes(labels.read_bytes()[:-1] + bytes([200]))
    with pytest.raises(ValueError, match="labels of t10k should be 0 to 9, one is 200"):
        fashion.data()
    assert not list((tmp_path / "runs").rglob("train_images.npy"))


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
@pytest.mark.parametrize(
    "damage", [lambda d: d[:-1], lambda d: d + b"0", lambda d: b"", lambda d: d[:8]]
)
def test_a_file_of_fashion_mnist_of_another_length_is_named(fashion, tmp_path, name, damage):
    _write_fashion(tmp_path / "data", zipped=False)
    path = tmp_path / "data" / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        ValueError, match=rf"{name}: expected magic number .* bytes, got .* remove it"
    ):
        fashion.data()
    assert not list((tmp_path / "runs").rglob("*_images.npy"))


def test_fashion_mnist_where_debians_package_put_it(fashion, tmp_path):
    _write_fashion(tmp_path / "debian")
    assert load_split(fashion.data(), "train").class_counts.tolist() == class_sizes(10, 4, 2)


def test_fashion_mnist_that_cannot_be_fetched_is_said(fashion, monkeypatch):
    def no_network(*_, **__):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", no_network)
    monkeypatch.setenv("DIFFLT_DOWNLOAD", "1")
    with pytest.raises(FileNotFoundError, match="fashion_mnist: .* cannot be fetched"):
        Pipeline(fashion.config, fashion.store.root, "cpu", False, fashion.store.root / "d").data()


def test_the_profile_of_fashion_trains_every_stage(fashion, tmp_path):
    """One channel through generator, classifier and both branches of SAU, in a few steps."""
    _write_fashion(tmp_path / "data")
    parts = ("extractor", "diffusion", "classifier", "sau")
    changes = {f"{part}.n_steps": 4 for part in parts}
    changes |= {"sampling.n_steps": 2, "synthetic.filtered": False}
    p = fashion.vary(changes | {f"{part}.batch_size": 8 for part in parts})
    assert p.generate().array("images").shape[1:] == (16, 16, 1)
    for trained in (p.train_classifier(), p.train_sau()):
        assert 0 <= accuracy(p, trained)["overall"] <= 100


def test_mnist_is_not_fashion_mnist(fashion, tmp_path):
    _write_fashion(tmp_path / "data", zipped=False)
    labels = tmp_path / "data" / "train-labels-idx1-ubyte"
    content = bytearray(labels.read_bytes())
    content[8:18] = bytes([5, 0, 4, 1, 9, 2, 1, 3, 1, 4])
    labels.write_bytes(content)
    with pytest.raises(
        ValueError, match="MNIST's handwritten digits, whose files have the same names"
    ):
        fashion.data()


def test_a_reader_of_one_data_set_is_no_part_of_another_ones_version():
    table = "difflt_core.data.sources.READERS"
    versions = {name: code_version(build_data, {table: name}) for name in READERS}
    assert versions["cifar10"] == versions["cifar100"] and len(set(versions.values())) == 5


def _picture(path, seed, mode="RGB", size=(40, 36)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def _folder(root, counts, split=""):
    for c, n in enumerate(counts):
        for i in range(n):
            _picture(root / split / f"kind {c}" / f"{i:02}.png", 100 * c + i + 1000 * len(split))


def config(**changes):
    base = vary(load_config("folder"), {"data.image_size": 16})
    return vary(base, {f"data.{k}": v for k, v in changes.items()})


def pipeline(root, tmp_path, **changes):
    return Pipeline(config(**changes), tmp_path / "out", "cpu", False, root)


def test_class_folders_are_split_by_class_and_seed(tmp_path):
    _folder(tmp_path / "my images", [20, 10, 3, 1])
    p = pipeline(tmp_path, tmp_path, path="my images")
    counts = {s: load_split(p.data(), s).class_counts.tolist() for s in ("train", "val", "test")}
    assert np.sum(list(counts.values()), axis=0).tolist() == [20, 10, 3, 1]
    assert counts["test"] == [4, 2, 1, 0] and counts["train"][3] == 1
    assert load_split(p.data(), "train").images.shape[1:] == (16, 16, 3)
    assert load_split(p.data(), "train").class_names == ("kind 0", "kind 1", "kind 2", "kind 3")


def test_no_seed_trains_or_chooses_on_the_test_images_of_a_folder(tmp_path):
    """So that what is tuned on one data_seed says nothing about the test part of another."""
    _folder(tmp_path / "d", [20, 10])
    parts = [pipeline(tmp_path / "d", tmp_path).vary({"data_seed": s}).data() for s in (0, 1)]
    files = [{s: set(load_split(p, s).files) for s in ("train", "val", "test")} for p in parts]
    assert files[0]["test"] == files[1]["test"]
    assert files[0]["val"] != files[1]["val"] and not files[1]["train"] & files[0]["test"]


def test_folders_of_splits_and_a_cut_to_a_long_tail(tmp_path):
    for split, counts in (("train", [12, 12, 12]), ("val", [2, 2, 2]), ("test", [3, 3, 3])):
        _folder(tmp_path / "d", counts, split)
    p = pipeline(tmp_path / "d", tmp_path, n_max=12, imb_ratio=4)
    counts = {s: load_split(p.data(), s).class_counts.tolist() for s in ("train", "val", "test")}
    assert counts == {"train": [12, 6, 3], "val": [2, 2, 2], "test": [3, 3, 3]}
    test = load_split(p.data(), "test")
    assert test.files[3:5] == ("test/kind 1/00.png", "test/kind 1/01.png")
    for name, image in zip(test.files, test.images, strict=True):
        assert np.array_equal(read_image(tmp_path / "d" / name, (16, 16, 3))[0], image)


def test_a_folder_without_a_test_part_gives_a_fifth_of_its_training_part(tmp_path):
    for split, counts in (("train", [20, 10, 1]), ("val", [2, 2, 2])):
        _folder(tmp_path / "d", counts, split)
    p = pipeline(tmp_path / "d", tmp_path)
    counts = {s: load_split(p.data(), s).class_counts.tolist() for s in ("train", "val", "test")}
    assert counts == {"train": [16, 8, 1], "val": [2, 2, 2], "test": [4, 2, 0]}
    files = [set(load_split(p.data(), s).files) for s in ("train", "test")]
    assert not files[0] & files[1]


def test_a_cut_folder_has_a_balanced_set_where_every_class_has_enough(tmp_path):
    for name, last in (("enough", 12), ("too few", 3)):
        for split, counts in (("train", [12, 12, last]), ("test", [3, 3, 3])):
            _folder(tmp_path / name, counts, split)
    cut = {"n_max": 12, "imb_ratio": 4}
    assert not pipeline(tmp_path / "enough", tmp_path).has_oracle
    assert not pipeline(tmp_path / "too few", tmp_path, **cut).has_oracle
    p = pipeline(tmp_path / "enough", tmp_path, **cut)
    assert p.has_oracle
    assert load_split(p.balanced("a test").data(), "train").class_counts.tolist() == [12, 12, 12]
    with pytest.raises(ValueError, match="needs the images that the long tail leaves out"):
        pipeline(tmp_path / "too few", tmp_path, **cut).balanced("a test")


def test_bad_files_are_listed_and_others_converted(tmp_path):
    root = tmp_path / "d"
    _folder(root, [4, 4])
    _picture(root / "kind 0" / "grey.png", 7, "L")
    (root / "kind 1" / "broken.jpg").write_bytes(b"not a picture")
    whole = (root / "kind 1" / "00.png").read_bytes()
    (root / "kind 1" / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(
        root / "kind 1" / "half.jpg"
    )
    photo = (root / "kind 1" / "half.jpg").read_bytes()
    (root / "kind 1" / "half.jpg").write_bytes(photo[: len(photo) // 2])
    with pytest.raises(ValueError, match="3 files cannot be read") as fault:
        pipeline(root, tmp_path).data()
    assert all(name in str(fault.value) for name in ("broken.jpg", "cut.png", "half.jpg"))
    made = {path.name for path in (tmp_path / "out").rglob("*")}
    assert not made & {"manifest.json", "train_images.npy"}, "half of a data set is left"
    (root / "kind 1" / "broken.jpg").unlink()
    (root / "kind 1" / "cut.png").unlink()
    (root / "kind 1" / "half.jpg").unlink()
    with pytest.warns(UserWarning, match=r"Colour mode L, converted to RGB: 1\n .*grey\.png"):
        found = pipeline(root, tmp_path).data()
    assert {"manifest.json", "train_images.npy"} <= {path.name for path in found.path.rglob("*")}


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_of_a_folder_with_a_bad_file_nothing_is_left(tmp_path, split):
    root = tmp_path / "d"
    for part in ("train", "val", "test"):
        _folder(root, [3, 3], part)
    whole = (root / split / "kind 0" / "00.png").read_bytes()
    (root / split / "kind 0" / "00.png").write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=f"1 files cannot be read.*\n.*{split}/kind 0/00.png"):
        pipeline(root, tmp_path).data()
    left = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert not {name for name in left if name.endswith((".npy", ".json"))}, left


def test_a_folder_that_changes_under_a_run_is_refused(tmp_path):
    """What was planned for one folder is never filled with another."""
    root = tmp_path / "d"
    _folder(root, [4, 4])
    p = pipeline(root, tmp_path)
    p.vary({"data.image_size": 8}).data()
    _picture(root / "kind 0" / "new.png", 7)
    with pytest.raises(ValueError, match="d: has changed since this run first looked at it; start"):
        p.data()
    assert pipeline(root, tmp_path).data().json("info")["counts"]["train"]


def test_links_and_hidden_files(tmp_path):
    """A class folder may be a link; a loop is not followed, and what is hidden is not there."""
    root = tmp_path / "d"
    _folder(root, [4])
    _folder(tmp_path / "elsewhere", [5])
    (root / "linked").symlink_to(tmp_path / "elsewhere" / "kind 0")
    for place, target in (("kind 0/up", root), ("linked/me", "me"), ("me", "me")):
        (root / place).symlink_to(target)
    before = folder_fingerprint(root)
    _picture(root / "kind 0" / ".ipynb_checkpoints" / "00.png", 1)
    _picture(root / "kind 0" / ".hidden.png", 1)
    (root / "kind 0" / "Thumbs.db").write_bytes(b"a file manager's")
    assert folder_fingerprint(root) == before != folder_fingerprint(root, every_file=True)
    counts = pipeline(root, tmp_path).data().json("info")["counts"]
    assert [sum(c) for c in zip(*counts.values(), strict=True)] == [4, 5]
    _picture(tmp_path / "elsewhere" / "kind 0" / "more.png", 1)
    assert folder_fingerprint(root) != before


def test_a_million_files(tmp_path, monkeypatch):
    """Of two simulated classes: split, by names alone, and listed by their ends."""
    n = 500_000

    def many(folder, linked=0):
        for i in range(n):
            yield SimpleNamespace(name=f"{i}.jpg", path=f"{folder}/{i}.jpg")

    for name in "ab":
        (tmp_path / name).mkdir()
    monkeypatch.setattr(folders, "_files_below", many)
    found = scan_folder(tmp_path, load_config("folder").data, 0)
    sizes = {split: np.bincount(labels).tolist() for split, labels in found.labels.items()}
    assert np.sum(list(sizes.values()), axis=0).tolist() == [n, n]
    assert sizes["test"] == [100_000] * 2 and found.files["train"][0] == "a/0.jpg"
    assert len(listed(found.files["train"]).splitlines()) == 21


def _deep_png(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a colour, which Pillow reads and does not write."""
    H, W, _ = pixels.shape
    rows = (pixels.astype(">u2") * 257).tobytes()
    lines = b"".join(b"\0" + rows[6 * W * i : 6 * W * (i + 1)] for i in range(H))
    parts = {b"IHDR": struct.pack(">IIBBBBB", W, H, 16, 2, 0, 0, 0), b"IDAT": zlib.compress(lines)}
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in {**parts, b"IEND": b""}.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_odd_files_and_names_are_read_or_named(tmp_path):
    root, modes = tmp_path / "d", ("RGB", "L", "CMYK", "I;16", "P", "RGBA", "LA", "1")
    for c, name in enumerate(("with space", "Größe", "<b>", "数字")):
        for i, mode in enumerate(modes):
            pixels = np.random.default_rng(10 * c + i).integers(0, 256, (20, 30, 3), np.uint8)
            (root / name).mkdir(parents=True, exist_ok=True)
            if mode == "I;16":
                image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 256)
            else:
                image = Image.fromarray(pixels).convert(mode)
            image.save(root / name / f"{i} {mode.replace(';', '')}.tif")
        Image.new("RGB", (1, 1), (200, 10, 10)).save(root / name / "tiny.png")
        (root / name / "deep.png").write_bytes(_deep_png(pixels))
        frames = [Image.new("RGB", (9, 9), (40 * k, 0, 0)) for k in range(3)]
        frames[0].save(root / name / "moving.gif", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="unusual files:") as said:
        p = pipeline(root, tmp_path)
        train = load_split(p.data(), "train")
    text = "".join(str(warning.message) for warning in said)
    kinds = [f"Colour mode {mode}, converted to RGB" for mode in modes if mode != "RGB"]
    named = (
        "Smaller than .* enlarged",
        "Animated, the first picture is taken",
        "16 bits deep, read as 8",
    )
    for kind in (*kinds, *named):
        assert re.search(rf"^{kind}: [48]\n  .*", text, re.M), (kind, text)
    for name in ("Größe/2 CMYK.tif", "数字/tiny.png", "<b>/moving.gif"):
        assert name in text
    assert train.class_names == ("<b>", "Größe", "with space", "数字")
    counts = sum(load_split(p.data(), s).class_counts for s in ("train", "val", "test"))
    assert counts.tolist() == [len(modes) + 3] * 4
    by_name = dict(zip(train.files, train.images, strict=True))
    sixteen = [image for name, image in by_name.items() if "I16" in name]
    assert all(image.std() > 20 for image in sixteen)  # its upper byte, not all white


def test_a_changed_folder_is_another_dataset(tmp_path):
    root = tmp_path / "d"
    _folder(root, [4, 4])
    before = pipeline(root, tmp_path).data()
    assert pipeline(root, tmp_path).data().key == before.key
    _picture(root / "kind 0" / "new.png", 99)
    assert pipeline(root, tmp_path).data().key != before.key


def test_wrong_folders_are_named(tmp_path):
    root = tmp_path / "d"
    _folder(root, [3], "train")
    with pytest.raises(ValueError, match="expected at least two class folders, got 1"):
        scan_folder(root, DataConfig(name="folder", n_classes=None), 0)
    (root / "train" / "kind 1").mkdir()
    with pytest.raises(ValueError, match="class 'kind 1' has no training image"):
        scan_folder(root, config().data, 0)
    _folder(root, [3, 3], "train")
    _folder(root, [1, 1, 1], "test")
    with pytest.raises(ValueError, match=r"unknown classes \['kind 2'\]"):
        scan_folder(root, config().data, 0)
    shutil.rmtree(root / "test" / "kind 2")
    (root / "test" / ".ipynb_checkpoints").mkdir()
    assert scan_folder(root, config().data, 0).class_names == ("kind 0", "kind 1")
    with pytest.raises(ValueError, match="n_classes: expected the 2 class folders of .*, got 3"):
        scan_folder(root, vary(config(), {"data.n_classes": 3}).data, 0)
    with pytest.raises(ValueError, match="n_max: 9 cuts nothing without imb_ratio"):
        vary(config(), {"data.n_max": 9})
    with pytest.raises(FileNotFoundError, match="one folder per class at .*nowhere"):
        pipeline(tmp_path / "nowhere", tmp_path).data()


def test_a_class_that_is_called_train_is_not_taken_for_the_training_part(tmp_path):
    root = tmp_path / "d"
    for name in ("bus", "train"):
        for i in range(12):
            _picture(root / name / f"{i}.png", i)
    with pytest.raises(ValueError, match="beside it are images in bus; move .* or rename train/"):
        scan_folder(root, config().data, 0)
    _folder(tmp_path / "e", [3, 3], "train")
    (tmp_path / "e" / "notes").mkdir()
    assert len(scan_folder(tmp_path / "e", config().data, 0).class_names) == 2


@pytest.mark.skipif(sys.platform == "darwin", reason="has no such names")
def test_a_name_that_is_not_utf8_is_named(tmp_path):
    for name in (b"K\xe4se", b"bread"):
        folder = os.fsencode(tmp_path) + b"/d/" + name
        os.makedirs(folder)
        _picture(Path(os.fsdecode(folder)) / "a.png", 1)
    with pytest.raises(ValueError, match=r"names are not UTF-8, as b'K\\xe4se'; rename them"):
        scan_folder(tmp_path / "d", config().data, 0)


def test_pictures_are_read_the_right_way_up_and_as_deep_as_they_are(tmp_path):
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[:4] = 250  # the top is bright
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be seen turned clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    seen, _ = read_image(tmp_path / "turned.png", (20, 20, 3))
    assert seen[:, -4:].min() > 200 and seen[:, :-4].max() < 50
    Image.fromarray(pixels).save(tmp_path / "odd.png", exif=b"Exif\x00\x00nothing of the kind")
    assert read_image(tmp_path / "odd.png", (20, 20, 3))[0][:4].min() > 200  # as it is stored
    values = np.linspace(3000, 30000, 400).reshape(20, 20).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    files = [tmp_path / "turned.png", tmp_path / "deep.png"]
    crops = next(centre_crops(files, 16, "cpu", 0))  # (2, 3, 16, 16) in [-1, 1]
    assert crops[0, :, :, -1].mean() > crops[0, :, :, 0].mean() + 0.5
    assert -1 < crops[1].min() < crops[1].max() < 0  # 12 to 117 of 255


def test_a_damaged_file_of_any_format_is_named(tmp_path, monkeypatch):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")

    def damaged(*_, **__):
        raise RuntimeError("Failed to decode image")

    monkeypatch.setattr(Image.Image, "convert", damaged)
    assert read_image(tmp_path / "a.png", (9, 9, 3)) == (None, "Failed to decode image")


POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 20 20
%%EndComments
(no program may be started by this) print
showpage
"""


def test_a_picture_is_read_by_pillow_alone(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("called"))
    (tmp_path / "a.jpg").write_bytes(POSTSCRIPT)
    assert read_image(tmp_path / "a.jpg", (9, 9, 3)) == (None, "not an image")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "b.mpo", save_all=True)
    assert read_image(tmp_path / "b.mpo", (9, 9, 3))[0].shape == (9, 9, 3)
    for name in ("c.eps", "d.pdf", "e.mpg", "f.h5"):
        (tmp_path / name).write_bytes(POSTSCRIPT)
    assert [path.name for path in images_in(tmp_path)] == ["a.jpg", "b.mpo"]
    assert left_out(tmp_path) == ["c.eps", "d.pdf", "e.mpg", "f.h5"]


def test_the_same_picture_in_train_and_test_is_said(tmp_path):
    root = tmp_path / "d"
    for split in ("train", "test"):
        for c in (0, 1):
            _picture(root / split / f"kind {c}" / "same.png", c)
            _picture(root / split / f"kind {c}" / "own.png", 10 * c + len(split))
    with pytest.warns(UserWarning, match="2 images are in both train and test"):
        pipeline(root, tmp_path).data()


@pytest.mark.parametrize("arch", ["small_cnn", "resnet32"])
def test_the_whole_method_on_a_folder(tmp_path, arch):
    _folder(tmp_path / "d", [30, 12, 5])
    tiny = {
        "diffusion.n_steps": 4,
        "diffusion.batch_size": 8,
        "extractor.n_steps": 4,
        "classifier.n_steps": 4,
    }
    tiny |= {f"{part}.arch": arch for part in ("extractor", "classifier")}
    tiny |= {"extractor.precision": "bf16", "extractor.schedule": "step", "sampling.n_steps": 2}
    tiny |= {"data.many_above": 15, "data.few_below": 8}
    p = Pipeline(vary(config(), tiny), tmp_path / "out", "cpu", False, tmp_path / "d")
    assert 0 <= accuracy(p, p.train_classifier())["overall"] <= 100
    assert p.generate().array("images").shape[1:] == (16, 16, 3)


@pytest.mark.parametrize("name, n_max", [("cifar10", 5000), ("cifar100", 500)])
@pytest.mark.parametrize("ratio", [100, 10])
def test_profiles_of_the_paper_train_200_epochs_at_any_ratio(name, n_max, ratio):
    config = load_config(name, imb_ratio=ratio)
    p = Pipeline(config, "", "cpu", False)
    n = sum(class_sizes(config.data.n_classes, n_max, ratio))
    assert p.class_counts().sum() == n
    config = p.config
    assert config.extractor.in_steps(n).n_steps == 200 * -(-n // 128)
    assert config.extractor.in_steps(n).warmup_steps == 5 * -(-n // 128)
    assert config.diffusion.alpha == 0.1 and config.diffusion.tau == 1
    assert config.classifier.omega == 0.3


def test_epochs_are_of_the_set_that_is_trained_on(cifar, tmp_path, monkeypatch):
    _write_cifar(tmp_path / "data", monkeypatch)
    short = {"diffusion.n_steps": 2, "diffusion.batch_size": 8, "sampling.n_steps": 1}
    recipe = {"epochs": 2.0, "warmup_epochs": 0.5, "batch_size": 16, "width": 4}
    lengths = {f"{part}.{k}": v for part in ("extractor", "classifier") for k, v in recipe.items()}
    config = vary(cifar, {**short, **lengths, "filtering.keep": "all", "data.image_size": 8})
    p = Pipeline(config, tmp_path, "cpu", False, tmp_path / "data")
    n_real = sum(class_sizes(10, 20, 10))
    assert len(p.train_extractor().array("loss")) == 2 * -(-n_real // 16)
    assert len(p.train_on_real().array("loss")) == 2 * -(-n_real // 16)
    assert len(p.train_classifier().array("loss")) == 2 * -(-200 // 16)
    in_steps = p.vary({"classifier.n_steps": 3})  # instead of the epochs
    assert in_steps.config.classifier.epochs is None
    assert len(in_steps.train_classifier().array("loss")) == 3
    longer = p.vary({"sau.n_steps": 52}).as_long_as_sau()  # the classifier has 2 * 13
    assert longer == {"classifier.n_steps": 52, "classifier.warmup_steps": 12}
    assert p.vary({"sau.n_steps": 52} | longer).as_long_as_sau() == {}
    of_sau = p.vary({"sau.epochs": 2.0, "sau.batch_size": 16})  # of the filled set too
    assert of_sau.as_long_as_sau() == {}
    rates = of_sau.rates_of_sau()
    assert rates["classifier.lr"] == config.sau.lr and rates["classifier.nesterov"] is False
    assert of_sau.vary(rates).rates_of_sau() == {}
    filtered = p.vary({"filtering.keep": "aid"})  # which changes the images, not the length
    assert len(filtered.train_classifier().array("loss")) == 2 * -(-200 // 16)
    share = n_real / 200
    assert p.as_long_on_real() == {
        "equal updates": {"extractor.n_steps": 26, "extractor.warmup_steps": 6},
        "equal epochs": {
            "extractor.n_steps": round(share * 26),
            "extractor.warmup_steps": round(share * 6),
        },
    }
