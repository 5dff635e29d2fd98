"""Numbers as tables write them."""

import numpy as np
import pytest

from difflt_core.reporting.numbers import (
    mean_and_interval,
    mean_and_spread,
    mean_spread,
    n_digits,
)


@pytest.mark.parametrize(
    "values, digits",
    [
        ([84.8, 9.7], 1),
        ([0.43, 3.5], 2),
        ([0.43, 0.05], 3),
        ([0.05, np.nan], 4),
        ([-0.00004], 4),
        ([12.0, 3.42, 3.21, 3.37], 2),  # the large one takes no digit from the others
        ([0.0, 0.0, 0.0, 12.5], 1),
        ([0.0, 0.0], 1),
        ([2884, 2884], 0),
        ([np.nan], 1),
    ],
)
def test_decimals_tell_a_columns_numbers_apart(values, digits):
    assert n_digits(values) == digits


def test_mean_and_spread():
    assert mean_spread([1, 3]) == pytest.approx((2, 2**0.5))
    mean, spread = mean_spread([4])
    assert mean == 4 and np.isnan(spread)


def test_a_constant_count_has_no_spread():
    assert mean_and_spread([2884, 2884], 0) == "2884"
    assert mean_and_spread([2884, 2880], 0) == "2882 ± 3"
    assert mean_and_spread([0.4, 0.5], 2) == "0.45 ± 0.07"
    assert mean_and_spread([0.4], 2) == "0.40" and mean_and_spread([np.nan], 2) == ""


@pytest.mark.parametrize(
    "numbers, told",
    [
        ((0.0046, -0.048, 0.057), ("+0.00", "-0.05 to +0.06")),
        ((-0.86, -1.68, -0.03), ("-0.86", "-1.68 to -0.03")),
        ((1.3, 0.5, 2.1), ("+1.3", "+0.5 to +2.1")),
        ((0.0, 0.0, 0.0), ("+0.0", "+0.0 to +0.0")),
    ],
)
def test_an_interval_shows_on_which_side_of_0_its_ends_lie(numbers, told):
    assert mean_and_interval(*numbers) == told
