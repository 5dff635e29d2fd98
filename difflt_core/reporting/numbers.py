"""How numbers are written in tables and sentences: as many digits as tell them apart."""

import numpy as np

__all__ = ["mean_and_interval", "mean_and_spread", "mean_spread", "n_digits", "seeds_in_words"]


def n_digits(values) -> int:
    """Decimals for a column of numbers: 0 for integers, which are counts; else 1 from 10 on, and one
    more for each power of ten that the middle one of them, zeros not counted, lies below; 4 at most.

    The middle and not the largest: one large number would take the others' digits.
    """
    values = np.asarray(values)
    if np.issubdtype(values.dtype, np.integer):
        return 0
    known = np.abs(values[np.isfinite(values) & (values != 0)])
    middle = np.median(known) if len(known) else 10
    return next((d for d, limit in ((1, 10), (2, 1), (3, 0.1)) if middle >= limit), 4)


def mean_and_spread(values, digits: int = 1) -> str:
    """ "mean ± standard deviation", the mean alone for one value or a constant; "" where a value is
    missing: a caption says over how many seeds a mean is."""
    mean, spread = mean_spread(values)
    if np.isnan(mean):
        return ""
    if np.isnan(spread) or (digits == 0 and spread == 0):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def mean_and_interval(mean: float, low: float, high: float, digits: int = 1) -> tuple[str, str]:
    """ "+1.3" and "+0.5 to +2.1", the ends of its interval; with one more digit where an end that is
    not 0 would be written as 0, so that it is seen on which side of 0 it lies."""
    if any(end and round(end, digits) == 0 for end in (low, high)):
        digits += 1
    shown, *ends = (f"{value:+z.{digits}f}" for value in (mean, low, high))
    return shown, " to ".join(ends)


def mean_spread(values) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1; nan for one value)."""
    values = np.asarray(list(values), dtype=np.float64)
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def seeds_in_words(n: int) -> str:
    """ "3 seeds", or "one seed"."""
    return f"{n} seeds" if n > 1 else "one seed"
