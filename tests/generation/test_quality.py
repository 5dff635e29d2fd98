"""How good generated images are: distances against independent formulas, what is measured on which
images, in words; Inception weights read safely."""

import hashlib
import io
import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from difflt_core import load_config, vary
from difflt_core.data.digits import render_digits
from difflt_core.data.long_tail import load_split, shortfall
from difflt_core.generation.quality import (
    INCEPTION,
    Quality,
    balanced_rows,
    class_fid,
    fid,
    held_out,
    inception_features,
    kid,
    load_inception,
    precision_recall,
)

RNG = np.random.default_rng(0)
REAL = RNG.normal(size=(400, 16))
FAKE = RNG.normal(size=(300, 16)) @ np.diag(np.linspace(0.5, 2, 16)) + 0.3


def test_fid_against_scipys_matrix_root():
    difference = REAL.mean(0) - FAKE.mean(0)
    a, b = np.cov(REAL.T), np.cov(FAKE.T)
    by_hand = difference @ difference + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert fid(REAL, FAKE) == pytest.approx(by_hand, rel=1e-4)
    assert fid(REAL, REAL) == pytest.approx(0, abs=1e-6)


def test_fid_of_shifted_sets_is_the_squared_shift():
    assert fid(REAL, REAL + 2) == pytest.approx(16 * 4, rel=1e-6)


@pytest.mark.parametrize("distance", [fid, kid, precision_recall])
def test_one_image_or_another_width_is_refused(distance):
    message = r"at least two features of equal width, got shapes \({}, 16\) and \(300, {}\)"
    with pytest.raises(ValueError, match=message.format(1, 16)):
        distance(REAL[:1], FAKE)
    with pytest.raises(ValueError, match=message.format(400, 15)):
        distance(REAL, FAKE[:, :15])


def test_kid_against_the_unbiased_estimate():
    """A subset of everything: the estimate has no randomness left."""
    x, y = REAL[:300], FAKE
    kernel = [(a @ b.T / 16 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    off = [(k.sum() - np.trace(k)) / (300 * 299) for k in kernel[:2]]
    assert kid(x, y) == pytest.approx(sum(off) - 2 * kernel[2].mean(), rel=1e-6)


def test_kid_of_subsets_is_the_same_again_and_near_that_of_all():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = kid(REAL, FAKE, subset_size=100)
    assert first == kid(REAL, FAKE, subset_size=100) != kid(REAL, FAKE, subset_size=100, seed=1)
    assert first == pytest.approx(kid(REAL, FAKE), rel=0.2)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()


def test_precision_and_recall():
    assert precision_recall(REAL, REAL) == (100, 100)
    assert precision_recall(REAL, REAL + 100) == (0, 0)
    narrow = REAL[:5].repeat(40, axis=0)  # five images, over and over: precise, and most is missing
    precision, recall = precision_recall(REAL, narrow)
    assert precision == 100 and recall < 5


def test_precision_and_recall_against_the_definition():
    def covered(reference, queries, k=5):
        own = np.linalg.norm(reference[:, None] - reference, axis=2)
        radius = np.sort(own, axis=1)[:, k]  # column 0 is the point itself
        return 100 * (np.linalg.norm(queries[:, None] - reference, axis=2) <= radius).any(1).mean()

    found = precision_recall(REAL, FAKE)
    assert found == pytest.approx((covered(REAL, FAKE), covered(FAKE, REAL)), rel=1e-6)
    assert found[0] != found[1]


def test_precision_needs_more_images_than_neighbours():
    with pytest.raises(ValueError, match="expected more than k = 5 images, got 5"):
        precision_recall(REAL, FAKE[:5])


def test_class_fid_is_each_classs_own_where_images_suffice():
    a, b = np.arange(400) % 3, np.arange(300) % 3
    b[b == 1] = 0
    b[1:49:3] = 1  # 16 images: one fewer than D + 1
    found = class_fid(REAL, a, FAKE, b, 4)  # class 3 has none
    assert found.dtype == np.float64 and np.isnan(found).tolist() == [False, True, False, True]
    assert found[2] == fid(REAL[a == 2], FAKE[b == 2])
    b[49] = 1
    assert np.isfinite(class_fid(REAL, a, FAKE, b, 4)[1])


def _digits():
    """Real digits {split: (features (N, 16), labels)}: the mean of each 2x2 block of pixels."""
    data = vary(load_config("demo"), {"data.n_test": 400}).data
    for split, images, labels in render_digits(data, seed=0):
        blocks = images.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4)) / 255
        yield split, (blocks.reshape(-1, 16), labels)


def test_wrong_labels_cost_class_fid_and_would_gain_fid_on_a_fill_set():
    """Why quality is measured on balanced labels, and by class: with real digits on both sides."""
    digits = dict(_digits())
    real, real_y = digits["val"]
    order = np.random.default_rng(0).permutation(len(digits["test"][1]))
    fake, right = (a[order] for a in digits["test"])
    wrong = np.arange(len(fake)) % 10  # as many of each class, and they say nothing
    by_class = [class_fid(real, real_y, fake, y, 10) for y in (right, wrong)]
    assert (by_class[1] > by_class[0]).all() and by_class[1].mean() > 3 * by_class[0].mean()
    n = shortfall(np.bincount(digits["train"][1]))
    fill = [np.concatenate([fake[y == c][: n[c]] for c in range(10)]) for y in (right, wrong)]
    assert fid(real, fill[1]) < 0.9 * fid(real, fill[0])


class Drawn:
    """An artifact, and a pipeline that has drawn it."""

    def __init__(self, images, labels):
        self.arrays = {"images": images, "labels": labels}

    def array(self, name):
        return self.arrays[name]


@pytest.fixture(scope="module")
def drawn(trained):
    val = load_split(trained.data(), "val")
    return Drawn(255 - val.images, val.labels)


@pytest.fixture(scope="module")
def variant(trained, drawn):
    return SimpleNamespace(config=trained.config, data=trained.data, quality_samples=lambda: drawn)


def test_the_default_is_phi0_against_held_out_images(trained, drawn, variant):
    quality, val = Quality(trained), load_split(trained.data(), "val")
    real, fake = quality.features(val.images), quality.features(drawn.array("images"))
    precision, recall = precision_recall(real, fake)
    expected = {"FID": fid(real, fake), "KID": kid(real, fake)}
    expected |= {"precision": precision, "recall": recall}
    assert quality.scores(variant) == expected  # of quality_samples, not of generate
    assert quality.scores(drawn) == expected
    assert quality.scores(drawn.array("images"), drawn.array("labels")) == expected
    assert quality.scores(val.images, val.labels)["FID"] == pytest.approx(0, abs=1e-6)
    n = len(val.labels)
    assert quality.words(7) == (
        f"features of the first seed's phi_0, 7 generated images with balanced labels against {n} of val"
    )


def test_another_draw_has_a_reference_of_its_own(trained, drawn):
    """What one draw of the long tail leaves out another one trains on."""
    quality, other = Quality(trained), trained.vary({"seed": 1})
    assert other.data().key != trained.data().key
    theirs = SimpleNamespace(config=other.config, data=other.data, quality_samples=lambda: drawn)
    real = quality.features(load_split(other.data(), "val").images)
    assert quality.scores(theirs)["FID"] == fid(real, quality.features(drawn.array("images")))
    assert quality.scores(theirs)["FID"] != quality.scores(drawn)["FID"]


def test_words_know_how_many_images_are_drawn(trained):
    quality = Quality(trained)
    quality.config = SimpleNamespace(n_per_class=3, features="phi_0", reference="held-out")
    assert ", 30 generated images with balanced labels" in quality.words()


def test_class_fid_of_a_pipeline(trained, drawn, variant):
    quality = Quality(trained)
    D = quality.real.shape[1]
    assert np.isnan(quality.class_fid(variant)).all()  # 10 images of a class
    many = Drawn(*(drawn.array(n).repeat(D, axis=0) for n in ("images", "labels")))
    quality.reference = replace(
        quality.reference, images=many.array("images"), labels=many.array("labels")
    )
    del quality.real
    np.testing.assert_allclose(quality.class_fid(many), np.zeros(10), atol=1e-6)


def test_only_balanced_labels_are_scored(trained, drawn):
    quality, images, labels = Quality(trained), drawn.array("images"), drawn.array("labels")
    with pytest.raises(ValueError, match="each class, got 9 to 10; score quality_samples"):
        quality.scores(images[1:], labels[1:])
    with pytest.raises(ValueError, match="each class, got 0 to 10"):
        quality.class_fid(images[10:], labels[10:])
    with pytest.raises(ValueError, match="expected images with their labels, got images alone"):
        quality.scores(images)
    with pytest.raises(ValueError, match="a label for each image, got 100 for 99"):
        quality.scores(images[1:], labels)


@pytest.mark.parametrize("kind, per_class", [("long-tailed train", None), ("balanced train", 60)])
def test_other_reference_sets(trained, kind, per_class):
    quality = Quality(trained.vary({"metrics.reference": kind}))
    counts = quality.reference.class_counts
    train = load_split(trained.data(), "train").class_counts
    assert counts.tolist() == (train.tolist() if per_class is None else [per_class] * 10)
    words = f"against {counts.sum()} of {kind}"
    if per_class is None:
        words += f", which are not balanced ({train.min()} to {train.max()} of a class)"
    assert quality.words(5).endswith(words)


def test_without_a_validation_part_the_test_part_is_held_out(tmp_path):
    images, labels = np.zeros((2, 2, 2, 1), np.uint8), np.zeros(2, np.int64)
    arrays = {"test_images": images, "test_labels": labels}
    arrays |= {"val_images": images[:0], "val_labels": labels[:0]}
    facts = {"array": arrays.get, "json": lambda _: {"class_names": ["a"]}}
    data = SimpleNamespace(**facts, key="", path=tmp_path)
    assert held_out(data).split == "test"
    arrays |= {"val_images": images, "val_labels": labels}
    assert held_out(data).split == "val"


def test_too_few_images_are_named_before_anything_is_trained(trained):
    few = Quality(trained.vary({"metrics.n_per_class": 1}))
    few.reference = SimpleNamespace(labels=[0] * 4, class_names=["a"] * 7)
    with pytest.raises(ValueError, match="fid_reference: .* expect more than 5 images, got 4"):
        few.check()
    few.reference = SimpleNamespace(labels=[0] * 9, class_names=["a"] * 5)
    with pytest.raises(ValueError, match="metrics.n_per_class: .* got 5; take more data"):
        few.check()


def test_balanced_rows_are_the_first_of_each_class():
    assert balanced_rows([2, 0, 0, 2, 0]).tolist() == [0, 1, 2, 3]
    assert balanced_rows([2, 0, 0, 0]).tolist() == [0, 1] and not len(balanced_rows([]))


def test_memorisation_compares_with_balanced_held_out_images(trained, variant):
    train = load_split(trained.data(), "train").images
    found = Quality(trained).memorisation(variant)
    assert len(found.generated) == 100 and len(found.held_out) == 100
    copies = Drawn(train[:1].repeat(10, axis=0), np.arange(10))
    variant = SimpleNamespace(**vars(variant) | {"quality_samples": lambda: copies})
    assert Quality(trained).memorisation(variant).share == 100


def test_memorisation_compares_classes_that_both_have(trained, variant, monkeypatch):
    """A class without validation images is compared with its test images."""
    arrays = {s: load_split(trained.data(), s) for s in ("train", "val", "test")}
    few = arrays["val"].labels < 2
    arrays["val"] = replace(
        arrays["val"], images=arrays["val"].images[few], labels=arrays["val"].labels[few]
    )
    some = arrays["test"].labels != 9
    arrays["test"] = replace(
        arrays["test"], images=arrays["test"].images[some], labels=arrays["test"].labels[some]
    )
    monkeypatch.setattr("difflt_core.generation.quality.load_split", lambda _, name: arrays[name])
    made, others = Quality(trained).compared(variant)
    assert len(made) == 90 and len(others) % 9 == 0 and len(others) > 0


def test_what_would_fail_after_training_is_said_before(trained):
    Quality(trained.vary({"metrics.features": "phi_0"})).check()
    with pytest.raises(FileNotFoundError, match=r"run with --download .*, or use phi_0"):
        Quality(trained.vary({"metrics.features": "inception"})).check()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random Inception weights, named like the real one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        empty = io.BytesIO()
        torch.save({}, empty)
        empty.seek(0)
        net = FeatureExtractorInceptionV3("random", ["2048"], empty)
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:8]
    path = tmp_path_factory.mktemp("weights") / f"weights-random-{digest}.pth"
    path.write_bytes(buffer.getvalue())
    return path


def test_inception_features_do_not_depend_on_the_batch(weights):
    net = load_inception(weights)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    features = inception_features(net, images, batch_size=2)
    assert features.shape == (3, 2048) and features.dtype == np.float32
    np.testing.assert_allclose(features, inception_features(net, images), rtol=1e-3, atol=1e-4)
    assert inception_features(net, images[:0]).shape == (0, 2048)


def test_weights_that_are_missing_changed_or_a_pickle_are_refused(weights, tmp_path):
    with pytest.raises(FileNotFoundError, match="inception needs its weights at .*or use phi_0"):
        load_inception(tmp_path / INCEPTION)
    changed = tmp_path / weights.name
    changed.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="expected a sha256 that begins with"):
        load_inception(changed)
    hostile = pickle.dumps(print)  # a function, not tensors
    path = tmp_path / f"weights-{hashlib.sha256(hostile).hexdigest()[:8]}.pth"
    path.write_bytes(hostile)
    with pytest.raises(pickle.UnpicklingError):
        load_inception(path)


def test_a_run_without_the_weights_says_so(trained):
    quality = Quality(trained.vary({"metrics.features": "inception"}))
    with pytest.raises(FileNotFoundError, match=INCEPTION):
        quality.features(np.zeros((1, 8, 8, 1), np.uint8))


def test_precision_and_recall_of_a_stated_subset():
    g = np.random.default_rng(0)
    real, fake = g.normal(size=(3000, 4)), g.normal(size=(2500, 4))
    all_rows, some = precision_recall(real, fake), precision_recall(real, fake, at_most=1000)
    assert some != all_rows and np.allclose(some, all_rows, atol=5)
    assert precision_recall(real, fake, at_most=1000) == some
    with pytest.raises(ValueError, match="more than k = 5"):
        precision_recall(real, fake, at_most=5)
