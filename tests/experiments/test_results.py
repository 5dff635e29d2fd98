"""Experiments at several ratios of the largest class to the smallest: which ratios, which seeds, what
the frame of all holds."""

import pytest

from difflt_core import Pipeline, load_config
from difflt_core.experiments.results import Variant, at_ratios, wide_of_ratios

VARIANTS = {"cross-entropy": Variant({}, "train_extractor")}


@pytest.mark.parametrize(
    "profile, given, wanted",
    [
        ("demo", None, {50.0: (0, 1, 2, 3, 4), 10.0: (0,)}),
        ("demo", [50, 2], {50: (0, 1, 2, 3, 4), 2: (0,)}),
        ("cifar100", None, {100.0: (0, 1, 2), 50.0: (0, 1, 2), 10.0: (0, 1, 2)}),
        ("photos", None, {50.0: (0, 1, 2)}),
        ("folder", [100], {None: (0, 1)}),  # a folder is as it is
    ],
)
def test_ratios_and_their_seeds(profile, given, wanted):
    found = at_ratios(Pipeline(load_config(profile), "", "cpu", False), VARIANTS, given)
    assert {r: experiment.seeds for r, experiment in found.items()} == wanted
    assert [e.pipeline.config.data.imb_ratio for e in found.values()] == list(wanted)


def test_the_frame_of_all_ratios_says_which_is_which(tiny, tmp_path):
    p = Pipeline(tiny, tmp_path, "cpu", False)
    own = f"{tiny.data.imb_ratio:g}"
    runs = wide_of_ratios(at_ratios(p, VARIANTS, seeds=tiny.seeds[:1]), "accuracy", by="method")
    assert runs.columns[:3].tolist() == ["r", "method", "seed"]
    assert runs["r"].tolist() == [own, f"{tiny.data.imb_ratio / 5:g}"]
    assert runs["overall"].between(0, 100).all()
