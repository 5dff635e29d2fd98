"""Distances between feature sets against independent implementations."""

import numpy as np
import pytest
import scipy.linalg

from difflt_core.metrics import confusion, fid, inception_score, kid, precision_recall

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


def test_fid_refuses_what_has_no_covariance():
    with pytest.raises(
        ValueError, match=r"at least two features of equal width, got shapes \(1, 16\)"
    ):
        fid(REAL[:1], FAKE)


def test_kid_against_the_unbiased_estimate():
    """One subset of everything: the estimate has no randomness left."""
    x, y = REAL[:300], FAKE
    kernel = [(a @ b.T / 16 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    off = [(k.sum() - np.trace(k)) / (300 * 299) for k in kernel[:2]]
    assert kid(x, y, n_subsets=1, subset_size=300) == pytest.approx(
        sum(off) - 2 * kernel[2].mean(), rel=1e-6
    )


def test_precision_and_recall():
    assert precision_recall(REAL, REAL) == (100, 100)
    assert precision_recall(REAL, REAL + 100) == (0, 0)
    narrow = REAL[:5].repeat(40, axis=0)  # five images, over and over: precise, and most is missing
    precision, recall = precision_recall(REAL, narrow)
    assert precision == 100 and recall < 5


def test_inception_score_of_certain_and_uncertain_classifiers():
    assert inception_score(
        50 * np.eye(8).repeat(10, axis=0)[RNG.permutation(80)], 1
    ) == pytest.approx(8)
    assert inception_score(np.zeros((80, 8))) == pytest.approx(1)


def test_confusion_rows_are_shares():
    table = confusion(np.array([0, 1, 1, 1]), np.array([0, 0, 1, 1]), 3)
    assert table[:2].tolist() == [[50, 50, 0], [0, 100, 0]] and np.isnan(table[2]).all()
