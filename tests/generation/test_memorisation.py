"""Nearest training images against a plain loop; copies are found, honest images are not accused."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from difflt_core import load_config
from difflt_core.data.digits import render_digits
from difflt_core.generation.memorisation import Memorisation, memorisation, nearest_training
from difflt_core.reporting.figures import nearest_distances, nearest_pairs

RNG = np.random.default_rng(0)
TRAIN = RNG.integers(0, 256, (70, 4, 5, 3), np.uint8)
IMAGES = RNG.integers(0, 256, (23, 4, 5, 3), np.uint8)


def test_nearest_against_a_plain_loop():
    distance, index = nearest_training(IMAGES, TRAIN)
    assert distance.shape == index.shape == (23,)
    assert distance.dtype == np.float64 and index.dtype == np.int64
    for image, d, i in zip(IMAGES, distance, index, strict=True):
        rms = np.sqrt(((TRAIN.astype(float) - image) ** 2).mean(axis=(1, 2, 3)))
        assert d == pytest.approx(rms.min(), rel=1e-12) and i == rms.argmin()


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_blocks_change_nothing(rows):
    whole, blocks = nearest_training(IMAGES, TRAIN), nearest_training(IMAGES, TRAIN, rows=rows)
    assert (whole[0] == blocks[0]).all() and (whole[1] == blocks[1]).all()


def test_one_image_a_copy_and_the_largest_difference():
    distance, index = nearest_training(TRAIN[42:43], TRAIN, rows=10)
    assert distance.tolist() == [0] and index.tolist() == [42]
    twice = np.concatenate([TRAIN, TRAIN])
    assert nearest_training(TRAIN, twice, rows=9)[1].tolist() == list(range(70))  # the first
    black, white = np.zeros((1, 64, 64, 3), np.uint8), np.full((1, 64, 64, 3), 255, np.uint8)
    assert nearest_training(black, white)[0] == 255
    assert nearest_training(IMAGES[:0], TRAIN)[0].shape == (0,)


def test_memory_mapped_images_are_read(tmp_path):
    np.save(tmp_path / "train.npy", TRAIN)
    mapped = np.load(tmp_path / "train.npy", mmap_mode="r")
    assert (nearest_training(IMAGES, mapped)[0] == nearest_training(IMAGES, TRAIN)[0]).all()


@pytest.mark.parametrize(
    "generated, held_out, train, message",
    [
        (IMAGES[:0], IMAGES, TRAIN, "at least one image in generated"),
        (IMAGES, IMAGES[:0], TRAIN, "at least one image in held_out"),
        (IMAGES, IMAGES, TRAIN[:0], "at least one training image"),
        (IMAGES / 255, IMAGES, TRAIN, "expected uint8 images 0..255, got float64 and uint8"),
        (IMAGES, IMAGES[:, 1:], TRAIN, r"one shape \(H, W, C\), got \(3, 5, 3\) and \(4, 5, 3\)"),
    ],
)
def test_what_cannot_be_compared_is_refused(generated, held_out, train, message):
    with pytest.raises(ValueError, match=message):
        memorisation(generated, held_out, train)


def test_threshold_share_and_pairs_by_hand():
    held_out = np.arange(199, 0, -1.0)  # the nearest 1 % of 199 are two: 1 and 2
    found = Memorisation(np.array([3.0, 2.0, 0.5, 9.0]), np.array([7, 8, 9, 7]), held_out)
    assert (found.n_nearest, found.threshold, found.n_near, found.share) == (2, 2, 2, 50)
    assert found.expected == 1 and found.pairs(2) == [(2, 9, 0.5), (1, 8, 2.0)]
    assert len(found.pairs()) == 4
    assert found.words() == (
        "50.0 % of 4 generated images come within 2.0 grey levels (root mean square) of a training "
        f"image, as the nearest 2 of 199 held-out images do; new images: 1.0 ± {found.spread:.1f} %"
    )
    few = Memorisation(held_out, held_out, held_out[:3])
    assert few.n_nearest == 1 and few.expected == 25  # one of three: 1 % cannot be told


def test_spread_is_that_of_draws():
    draws = RNG.random((4000, 199 + 50))
    found = [Memorisation(d[199:], d[199:], d[:199]) for d in draws]
    shares = [f.share for f in found]
    assert np.mean(shares) == pytest.approx(found[0].expected, abs=0.1)
    assert np.std(shares) == pytest.approx(found[0].spread, rel=0.1)


def test_copies_are_found_and_fresh_digits_are_not_accused():
    digits = {s: images for s, images, _ in render_digits(load_config("demo").data, seed=0)}
    train, held_out, fresh = digits["train"], digits["val"], digits["test"]
    honest = memorisation(fresh, held_out, train)
    assert abs(honest.share - 1) < 3 * honest.spread
    noise = RNG.normal(0, 5, train.shape)
    copies = np.clip(train + noise, 0, 255).astype(np.uint8)
    found = memorisation(copies, held_out, train)
    assert found.share > 99 and (found.nearest == np.arange(len(train))).mean() > 0.99


def test_pictures_say_what_they_show():
    found = memorisation(np.concatenate([IMAGES, TRAIN[:2]]), IMAGES, TRAIN)
    figure, ax = plt.subplots()
    nearest_distances(ax, found)
    assert f"{found.share:.1f} %" in ax.get_title(loc="left")
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert {"generated (25)", "held-out (23)"} < set(labels)
    heights = sum(bar.get_height() for bar in ax.containers[0])
    assert heights == pytest.approx(100)
    pairs = nearest_pairs(np.concatenate([IMAGES, TRAIN[:2]]), TRAIN, found.pairs(3), n_columns=2)
    assert [ax.get_title() for ax in pairs.axes][:2] == ["0.0", "0.0"] and len(pairs.axes) == 4
    left, right = np.split(pairs.axes[0].images[0].get_array(), [6], axis=1)
    assert (left[:, :5] == right).all()  # a copy beside itself
    for f in (figure, pairs):
        plt.close(f)
