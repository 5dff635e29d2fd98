"""A hostile folder, looked at before a run: every oddity is named, nothing is written."""

import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from difflt_core import load_config
from difflt_core.data.sources import fingerprint
from difflt_core.profiles import DISK_GB
from difflt_core.reporting.preflight import _disk_gb, look_at, main

RNG = np.random.default_rng(0)
CLASSES = {"Bär <b>": 12, "a cat": 6, "猫": 3, "one": 1}


def picture(size=(40, 40), mode="RGB") -> Image.Image:
    pixels = RNG.integers(0, 256, (*size[::-1], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "my föl der"
    for split, share in (("train", 1), ("test", 0.5)):
        for name, n in CLASSES.items():
            (root / split / name).mkdir(parents=True)
            for i in range(max(1, int(share * n))):
                picture().save(root / split / name / f"{i} ä.png")
    here = root / "train" / "a cat"
    picture(mode="L").save(here / "grey.png")
    picture(mode="CMYK").save(here / "cmyk.jpg")
    picture().save(root / "test" / "no class.png")
    Image.fromarray(RNG.integers(0, 65536, (40, 40)).astype(np.uint16)).save(here / "16bit.png")
    picture((1, 1)).save(here / "tiny.png")
    picture((300, 40)).save(here / "long.png")
    picture().save(here / "moves.gif", save_all=True, append_images=[picture(), picture()])
    picture().save(here / "stops.gif", save_all=True, append_images=[picture(), picture()])
    moves = (here / "stops.gif").read_bytes()
    (here / "stops.gif").write_bytes(moves[: len(moves) * 2 // 5])
    (here / "zip.jpg").write_bytes(b"PK\x03\x04" + bytes(50))
    (here / "empty.png").write_bytes(b"")
    for name in ("phone.HEIC", "phone 2.heic", "README"):
        (here / name).write_bytes(b"no image that is known")
    whole = (here / "0 ä.png").read_bytes()
    (here / "cut.png").write_bytes(whole[: len(whole) // 2])
    (here / "again.png").write_bytes(whole)
    (root / "train" / "猫" / "of a cat.png").write_bytes((here / "1 ä.png").read_bytes())
    (root / "test" / "a cat" / "leak.png").write_bytes((here / "2 ä.png").read_bytes())
    (root / "test" / "one" / "a cat.png").write_bytes((here / "3 ä.png").read_bytes())
    os.symlink(root / "train", root / "train" / "a cat" / "loop")
    return root


@pytest.fixture(scope="module")
def found(hostile):
    return look_at(hostile, load_config("folder").data, 0)


def test_classes_and_counts(found):
    assert set(found.class_names) == set(CLASSES)
    n = dict(zip(found.class_names, found.counts["train"].tolist(), strict=True))
    assert n == {"Bär <b>": 12, "a cat": 6 + 11, "猫": 4, "one": 1}
    assert found.counts["test"].sum() == 6 + 3 + 1 + 1 + 1 + 1 and found.counts["val"].sum() == 0


def test_what_cannot_be_read(found):
    assert {os.path.basename(f) for f in found.unreadable} == {"zip.jpg", "empty.png", "cut.png"}


def test_the_same_picture_is_found_by_what_it_shows(found):
    def base(groups):
        return [{f.split("/")[0] + "/" + os.path.basename(f) for f in g} for g in groups]

    assert base(found.twice) == [{"train/0 ä.png", "train/again.png"}]
    of_both = {"train/3 ä.png", "test/a cat.png"}  # a leak, and of two classes
    assert base(found.leaks) == [{"train/2 ä.png", "test/leak.png"}, of_both]
    assert base(found.two_classes) == [{"train/1 ä.png", "train/of a cat.png"}, of_both]
    assert found.loose == ["test/no class.png"]


def test_odd_files_are_named(found):
    told = {kind: {os.path.basename(f) for f in files} for kind, files in found.odd.items()}
    assert told["Colour mode L, converted to RGB"] == {"grey.png"}
    assert told["Colour mode CMYK, converted to RGB"] == {"cmyk.jpg"}
    assert told["Smaller than 32 x 32 pixels, enlarged"] == {"tiny.png"}
    assert told["More than three times as long as wide, cropped"] == {"long.png"}
    assert told["Animated, the first picture is taken"] == {"moves.gif"}
    assert told["Cannot be read beyond its first picture, which is taken"] == {"stops.gif"}
    assert any("I;16" in kind for kind in told)


def test_the_report_says_it_all_and_nothing_is_written(hostile, capsys):
    before = sorted(hostile.rglob("*"))
    argv = ["--data-dir", str(hostile.parent), "--set", f"path={hostile.name}"]
    assert main(argv) == 1  # something cannot be read
    text = capsys.readouterr().out
    for part in (
        "4 classes; training 34",
        "a leak): 2",
        "In no class folder, so not read: 1",
        "r = 17",
        "zip.jpg",
        "of their own: one.",
        "extension: 2 .heic, 1 no extension",
    ):
        assert part in text, part
    assert "Classes by training images: many" in text and "Bär <b>" in text
    assert sorted(hostile.rglob("*")) == before


def _without_test_classes(root):
    (root / "test").mkdir()
    picture().save(root / "test" / "0001.jpg")


def _of_other_kinds(root):
    for i in range(3):
        (root / "train" / "one" / f"{i}.heic").write_bytes(b"no image that is known")
    (root / "train" / "one" / "0.png").unlink()


def _with_valid(root):
    shutil.copytree(root / "train", root / "valid")


def _of_other_names(root):
    (root / "train").rename(root / "Training")
    shutil.copytree(root / "Training", root / "Test")


def _with_bytes(root):
    here = os.fsencode(root / "train" / "one")
    os.rename(here + b"/0.png", here + b"/caf\xe9.png")


@pytest.mark.parametrize(
    "harm, said",
    [
        (
            _without_test_classes,
            "test: expected images in class folders, as in train/, got 1 .jpg; put",
        ),
        (
            _of_other_kinds,
            "class 'one': expected images in .*one, got 3 .heic; convert them to JPEG",
        ),
        (_with_valid, "valid: the validation part is called val/ here; rename it"),
        (
            _of_other_names,
            "Test, Training look like parts of a data set, .*train/ at least: rename",
        ),
        (_with_bytes, "1 names are not UTF-8, as b'.*caf.*; rename them"),
    ],
)
def test_what_would_end_a_run_late_is_refused_by_all_before_it(tmp_path, capsys, harm, said):
    for name in ("one", "two"):
        (tmp_path / "d" / "train" / name).mkdir(parents=True)
        picture().save(tmp_path / "d" / "train" / name / "0.png")
    data = load_config("folder", path="d").data
    assert fingerprint(data, tmp_path)
    harm(tmp_path / "d")
    with pytest.raises(ValueError, match=said):
        fingerprint(data, tmp_path)  # of a run
    assert main(["--data-dir", str(tmp_path), "--set", "path=d"]) == 1
    assert re.search(said, capsys.readouterr().err)


def test_the_disk_grows_with_what_is_generated():
    config = load_config("folder")
    small, large = (_disk_gb(config, np.array(n)) for n in ([50, 10], [1300] + 999 * [5]))
    assert small == pytest.approx(DISK_GB["folder"], abs=0.01) and large > 10 * small


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert main(["--data-dir", str(tmp_path), "--set", "path=nowhere"]) == 1
    assert "there is no such folder" in capsys.readouterr().err
