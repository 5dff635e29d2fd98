"""Accuracy by class and confusion, against numbers by hand."""

import numpy as np
import pytest

from difflt_core.recognition.accuracy import class_accuracy, confusion, group_accuracy
from difflt_core.reporting.numbers import mean_spread

LABELS, PREDICTED = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])


def test_confusion_rows_are_shares():
    table = confusion(PREDICTED, LABELS, 3)
    assert table[:2].tolist() == [[50, 50, 0], [0, 100, 0]] and np.isnan(table[2]).all()


def test_class_and_group_accuracy():
    assert class_accuracy(PREDICTED, LABELS, 2).tolist() == [50, 100]
    found = group_accuracy(PREDICTED, LABELS, [200, 5])
    assert (found["overall"], found["many"], found["few"]) == (75, 50, 100)
    assert np.isnan(found["medium"])


def test_mean_and_spread():
    assert mean_spread([1, 3]) == pytest.approx((2, 2**0.5))
    mean, spread = mean_spread([4])
    assert mean == 4 and np.isnan(spread)
