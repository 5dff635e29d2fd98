"""The long-tail protocol against hand-checked counts (docs/protocol.md)."""

import numpy as np
import pytest

from difflt_core.data.long_tail import class_sizes, shot_groups


@pytest.mark.parametrize(
    "ratio, counts",
    [
        (200, [5000, 2775, 1540, 854, 474, 263, 146, 81, 45, 25]),
        (100, [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]),
        (50, [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100]),
        (10, [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500]),
    ],
)
def test_cifar10_counts(ratio, counts):
    assert class_sizes(10, 5000, ratio) == counts


@pytest.mark.parametrize(
    "ratio, total, least", [(200, 9502, 2), (100, 10847, 5), (50, 12608, 10), (10, 19573, 50)]
)
def test_cifar100_totals(ratio, total, least):
    counts = class_sizes(100, 500, ratio)
    assert (sum(counts), min(counts)) == (total, least)


def test_step_profile():
    assert class_sizes(4, 100, 10, "step") == [100, 100, 10, 10]


def test_inverse_ratio_is_refused():
    with pytest.raises(ValueError, match="imb_ratio: expected >= 1, got 0.01"):
        class_sizes(10, 5000, 0.01)


@pytest.mark.parametrize(
    "ratio, sizes",
    [(200, (30, 31, 39)), (100, (35, 35, 30)), (50, (41, 41, 18)), (10, (69, 31, 0))],
)
def test_group_sizes_of_cifar100(ratio, sizes):
    groups = shot_groups(class_sizes(100, 500, ratio))
    assert tuple(len(groups[g]) for g in ("many", "medium", "few")) == sizes
    assert np.array_equal(np.sort(np.concatenate(list(groups.values()))), np.arange(100))
