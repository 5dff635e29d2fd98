"""Differences and correlations over seeds, against numbers worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from difflt_core.reporting.differences import paired_difference, within_correlation


def runs(a, b):
    rows = [{"method": "a", "seed": s, "overall": v} for s, v in enumerate(a)]
    return pd.DataFrame(rows + [{"method": "b", "seed": s, "overall": v} for s, v in enumerate(b)])


def test_difference_by_hand():
    found = paired_difference(runs([5, 7, 9], [4, 4, 4]), "a", "b")
    half = 4.302653 * 2 / np.sqrt(3)  # t of 2 degrees of freedom, sd of 1, 3, 5
    assert (found.mean, found.n, found.n_ahead) == (3, 3, 3)
    assert (found.low, found.high) == (pytest.approx(3 - half), pytest.approx(3 + half))
    assert found.verdict == "undecided"
    assert str(found) == "+3.0 points (95 % interval -2.0 to +8.0; larger in 3 of 3 seeds)"


def test_verdicts():
    clear = paired_difference(runs([5, 5.1, 5.2], [4, 4, 4]), "a", "b")
    assert clear.verdict == "larger"
    assert paired_difference(runs([4, 4, 4], [5, 5.1, 5.2]), "a", "b").verdict == "smaller"


def test_seeds_that_only_one_has_do_not_count():
    found = paired_difference(runs([5, 6], [4]), "a", "b")
    assert found.n == 1 and str(found) == "+1.0 points (one seed)" and found.verdict == "undecided"
    assert str(paired_difference(runs([np.nan], [4]), "a", "b")) == "not measured"


def test_pairs_are_of_a_seed_whatever_the_order():
    rows = [("a", 2, 9.0), ("a", 0, 5.0), ("a", 1, 7.0), ("b", 0, 4.0), ("b", 2, 6.0)]
    found = paired_difference(pd.DataFrame(rows, columns=["method", "seed", "overall"]), "a", "b")
    assert (found.mean, found.n) == (2.0, 2)  # 5 - 4 and 9 - 6


def test_an_unknown_variant_is_named():
    with pytest.raises(KeyError, match=r"expected one of \['a', 'b'\], got 'c'"):
        paired_difference(runs([1], [2]), "a", "c")


def test_correlation_within_seeds_ignores_what_seeds_differ_in():
    x = np.array([1, 2, 3, 11, 12, 13])
    frame = pd.DataFrame({"seed": [0] * 3 + [1] * 3, "x": x, "y": [3, 2, 1, 23, 22, 21]})
    pooled, within, by_seed = within_correlation(frame, "x", "y")
    assert pooled > 0.9 and within == pytest.approx(-1) and by_seed == pytest.approx([-1, -1])
    assert np.isnan(within_correlation(frame.assign(y=1), "x", "y")[1])
