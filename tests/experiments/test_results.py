"""What is measured of a variant, and experiments at several ratios of the largest class to the smallest:
which ratios, which seeds, what the frame of all holds."""

from types import SimpleNamespace

import numpy as np
import pytest

from difflt_core import Pipeline, load_config, vary
from difflt_core.experiments import results
from difflt_core.experiments.results import (
    Variant,
    agreement,
    agreement_by_type,
    at_ratios,
    features_of_class,
    given_ratios,
    given_variants,
    noise_share,
    type_shares,
    wide_of_ratios,
)
from difflt_core.recognition.classifier import extract, load_classifier
from difflt_core.recognition.geometry import relative_distance
from difflt_core.selection.sample_types import TYPES, sample_types

VARIANTS = {"cross-entropy": Variant({}, "train_extractor")}


@pytest.mark.parametrize(
    "profile, changes, given, wanted",
    [
        ("demo", {}, None, {"50": (0, 1, 2, 3, 4), "10": (0,)}),
        ("demo", {}, [2.0], {"50": (0, 1, 2, 3, 4), "2": (0,)}),
        ("demo", {"imb_ratio": 100}, None, {"100": (0, 1, 2, 3, 4), "20": (0,)}),
        ("cifar100", {}, None, dict.fromkeys(["100", "50", "10"], (0, 1, 2))),
        ("cifar100", {"imb_ratio": 20}, [], {"20": (0, 1, 2)}),
        ("photos", {}, None, {"50": (0, 1, 2)}),
        ("folder", {}, [100.0], {"as it is": (0, 1)}),
    ],
)
def test_ratios_and_their_seeds(profile, changes, given, wanted):
    config = load_config(profile, **changes)
    found = at_ratios(Pipeline(config, "", "cpu", False), VARIANTS, given)
    assert {r: experiment.seeds for r, experiment in found.items()} == wanted
    assert next(iter(found.values())).pipeline.config.data.imb_ratio == config.data.imb_ratio


@pytest.mark.parametrize("given", [100, "50", ["50x"], [0.5], []])
def test_ratios_that_are_none_are_named(given):
    demo = load_config("demo")
    with pytest.raises(ValueError, match="ratios: expected a list of numbers >= 1"):
        given_ratios(given, demo)
    assert given_ratios([50, "10"], demo) == [50, 10] and given_ratios(None, demo) is None


def test_ratios_that_the_data_cannot_have_are_named():
    with pytest.raises(ValueError, match="imb_ratio: 1000 with n_max=400"):
        given_ratios([10, 1000], load_config("demo"))
    folder = load_config("folder")
    with pytest.raises(ValueError, match=r"ratios: these data are taken as they are, got \[100\]"):
        given_ratios([100], folder)
    assert given_ratios([100], vary(folder, {"data.imb_ratio": 50.0})) == [100]


def test_rows_that_somebody_asks_for():
    known = {"a": Variant(), "b": Variant(), "c": Variant()}
    assert list(given_variants(["c", "a"], known)) == ["a", "c"]
    assert given_variants(None, known) == known
    with pytest.raises(ValueError, match="unknown variant 'bb'; did you mean 'b'"):
        given_variants(["bb"], known)
    for wrong in ("a", [1], 3):
        with pytest.raises(ValueError, match="variants: expected a list of names, got"):
            given_variants(wrong, known)


def test_the_frame_of_all_ratios_says_which_is_which(tiny, tmp_path):
    p = Pipeline(vary(tiny, {"seeds": (0,)}), tmp_path, "cpu", False)
    own = f"{tiny.data.imb_ratio:g}"
    runs = wide_of_ratios(at_ratios(p, VARIANTS), "accuracy", by="method")
    assert runs.columns[:3].tolist() == ["r", "method", "seed"]
    assert runs["r"].tolist() == [own, f"{tiny.data.imb_ratio / 5:g}"]
    assert runs["overall"].between(0, 100).all()


def test_shares_of_types_are_those_of_the_images(trained):
    kinds = np.asarray(trained.type_samples().array("type"))
    found = type_shares(trained)
    assert list(found) == list(TYPES) and sum(found.values()) == pytest.approx(100)
    for k, name in enumerate(TYPES):
        assert found[name] == pytest.approx(100 * (kinds == k).mean())


@pytest.mark.parametrize("branches, share", [("both", 37.5), ("unaware", np.nan)])
def test_noise_is_counted_over_the_whole_training(branches, share):
    curve = np.array([[0.1, 0.2, 1, 4], [0.1, 0.2, 2, 4]])  # noisy and synthetic images come last
    sau = SimpleNamespace(branches=branches)
    p = SimpleNamespace(
        config=SimpleNamespace(sau=sau),
        train_sau=lambda: SimpleNamespace(array={"loss": curve}.__getitem__),
    )
    assert noise_share(p) == pytest.approx(share, nan_ok=True)


def test_agreement_is_of_the_class_an_image_is_made_for(trained, monkeypatch):
    labels = np.asarray(trained.generate().array("labels"))
    oracle = np.where(np.arange(len(labels)) % 4 == 0, (labels + 1) % 10, labels)  # a quarter wrong
    right = oracle == labels
    monkeypatch.setattr(results, "load_classifier", lambda *_: None)
    monkeypatch.setattr(results, "predict", lambda _, images: oracle[: len(images)])
    monkeypatch.setattr(Pipeline, "train_oracle", lambda _: None)
    assert agreement(trained) == pytest.approx(100 * right.mean())
    rows = agreement_by_type(trained)
    assert rows["images"].sum() == len(labels)
    known = rows.dropna()
    total = (known["images"] * known["agreement"]).sum() / known["images"].sum()
    assert total == pytest.approx(100 * right.mean())
    few = rows[rows["made for"] == "few-shot classes"]["images"].sum()
    assert few == np.isin(labels, [6, 7, 8, 9]).sum()  # 12, 10, 7, 6 in training


def test_features_of_a_class_are_its_own(trained):
    made = trained.generate()
    features, kinds = features_of_class(trained, 9, 5)
    rows = np.flatnonzero(np.asarray(made.array("labels")) == 9)[:5]
    phi0 = load_classifier(trained.train_extractor())
    wanted, _ = extract(phi0, made.array("images")[rows])
    np.testing.assert_allclose(features, wanted, rtol=1e-4, atol=1e-5)
    centres, radii = (np.asarray(trained.type_samples().array(n)) for n in ("centres", "radii"))
    d = relative_distance(wanted, np.full(5, 9), centres, radii)
    assert kinds.tolist() == sample_types(d, trained.config.filtering.aid_factor).tolist()
