"""Accuracy by class and confusion, against numbers by hand."""

import numpy as np

from difflt_core.recognition.accuracy import calibration, class_accuracy, confusion, group_accuracy

LABELS, PREDICTED = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])


def test_confusion_rows_are_shares():
    table = confusion(PREDICTED, LABELS, 3)
    assert table[:2].tolist() == [[50, 50, 0], [0, 100, 0]] and np.isnan(table[2]).all()


def test_class_and_group_accuracy():
    assert class_accuracy(PREDICTED, LABELS, 2).tolist() == [50, 100]
    found = group_accuracy(PREDICTED, LABELS, [200, 5])
    assert (found["overall"], found["many"], found["few"]) == (75, 50, 100)
    assert np.isnan(found["medium"])
    untested = group_accuracy(PREDICTED, LABELS, [200, 5, 1])  # no test image of the third
    assert untested["few"] == 100


def test_calibration_of_a_classifier_that_is_right_as_often_as_it_says():
    draw = np.random.default_rng(0)
    p = draw.uniform(0.5, 1, 50_000)
    probabilities = np.stack([p, 1 - p], axis=1)
    labels = (draw.random(len(p)) > p).astype(int)  # class 0 with probability p
    found, error = calibration(probabilities, labels)
    assert error < 0.5 and found["images"].sum() == len(p)
    assert np.isnan(found["accuracy"][:5]).all()  # nothing is below one half
    np.testing.assert_allclose(found["accuracy"][5:], found["confidence"][5:], atol=1.5)


def test_calibration_of_one_that_is_too_sure_and_of_none():
    probabilities, labels = np.array([[1.0, 0.0]] * 4), np.array([0, 1, 1, 1])
    found, error = calibration(probabilities, labels)
    assert error == 75 and found["images"][-1] == 4 and found["accuracy"][-1] == 25
    assert calibration(np.zeros((0, 2)), [])[1] == 0
