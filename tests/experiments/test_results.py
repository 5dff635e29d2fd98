"""Experiments at several ratios of the largest class to the smallest: which ratios, which seeds, what
the frame of all holds."""

import pytest

from difflt_core import Pipeline, load_config, vary
from difflt_core.experiments.results import Variant, at_ratios, given_ratios, wide_of_ratios

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
    with pytest.raises(ValueError, match="ratios: expected a list of numbers >= 1"):
        given_ratios(given)
    assert given_ratios([50, "10"]) == [50, 10] and given_ratios(None) is None


def test_the_frame_of_all_ratios_says_which_is_which(tiny, tmp_path):
    p = Pipeline(vary(tiny, {"seeds": (0,)}), tmp_path, "cpu", False)
    own = f"{tiny.data.imb_ratio:g}"
    runs = wide_of_ratios(at_ratios(p, VARIANTS), "accuracy", by="method")
    assert runs.columns[:3].tolist() == ["r", "method", "seed"]
    assert runs["r"].tolist() == [own, f"{tiny.data.imb_ratio / 5:g}"]
    assert runs["overall"].between(0, 100).all()
