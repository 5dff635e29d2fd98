"""The embedded digits: split by source image, deterministic, and independent of the nuisance of
other classes."""

import numpy as np
import pytest

from difflt_core import Pipeline, vary
from difflt_core.data.digits import _digit_sources
from difflt_core.data.long_tail import load_split, to_float
from difflt_core.experiments.results import accuracy


def test_no_source_image_is_in_two_splits():
    sources = _digit_sources(0)
    for c in range(10):
        seen = [
            {image.tobytes() for image in sources[split][c]} for split in ("train", "val", "test")
        ]
        assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
        assert sum(len(sources[split][c]) for split in sources) > 170


def test_shapes_counts_and_ranges(tiny, trained):
    train, test = (load_split(trained.data(), split) for split in ("train", "test"))
    assert train.images.shape == (sum(train.class_counts), 8, 8, 1)
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int64
    assert (
        train.class_counts[0] == tiny.data.n_max and train.class_counts[-1] == tiny.data.n_max // 10
    )
    assert set(test.class_counts) == {tiny.data.n_test}
    x = to_float(train.images)
    assert x.shape == (len(train.labels), 1, 8, 8) and x.min() >= -1 and x.max() <= 1


def test_same_seed_same_images_other_seed_other_images(tiny, tmp_path):
    def images(folder, **changes):
        return (
            Pipeline(vary(tiny, changes), tmp_path / folder, "cpu", False)
            .data()
            .array("train_images")
        )

    assert np.array_equal(images("a"), images("b"))
    assert not np.array_equal(images("a"), images("a", data_seed=1))


def test_no_seed_trains_or_chooses_on_the_test_digits(tiny, trained):
    """So that what is tuned on one data_seed says nothing about the test set of another."""
    test = [image.tobytes() for c in range(10) for image in _digit_sources(0)["test"][c]]
    other = _digit_sources(1)
    assert [image.tobytes() for c in range(10) for image in other["test"][c]] == test
    seen = {image.tobytes() for s in ("train", "val") for c in range(10) for image in other[s][c]}
    assert not seen & set(test)
    again = trained.vary({"data_seed": 1}).data().array("test_images")
    assert np.array_equal(again, trained.data().array("test_images"))


def test_a_smaller_tail_is_part_of_a_larger_one(tiny, tmp_path):
    """Another ratio changes how many images a class keeps, not which."""

    def last_class(ratio):
        p = Pipeline(vary(tiny, {"data.imb_ratio": ratio}), tmp_path, "cpu", False)
        train = load_split(p.data(), "train")
        return train.images[train.labels == 9]

    few, more = last_class(10), last_class(5)
    assert len(few) < len(more)
    assert np.array_equal(few, more[: len(few)])


@pytest.mark.parametrize("ratio", [1, 60])
def test_extreme_ratios_train(tiny, tmp_path, ratio):
    """Balanced data leave nothing to generate; one image in the rarest class has no radius of its
    own."""
    p = Pipeline(vary(tiny, {"data.imb_ratio": ratio}), tmp_path, "cpu", False)
    result = accuracy(p, p.train_classifier())
    assert 0 <= result["overall"] <= 100
    assert len(p.generate().array("images")) == (
        0 if ratio == 1 else 600 - sum(load_split(p.data(), "train").class_counts)
    )
