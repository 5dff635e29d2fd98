"""What a table's runs say: the difference of two variants over the seeds they share, in words.

A sentence of a notebook takes its numbers from here, so that it is true at any profile and setting.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from .numbers import mean_and_interval

__all__ = ["Difference", "interval", "paired_difference", "within_correlation"]


@dataclass(frozen=True)
class Difference:
    """a - b over n seeds that both have: mean, and the ends of its 95 % interval (t distribution;
    nan for one seed). In the unit of the values, which for accuracies is percentage points."""

    mean: float
    low: float
    high: float
    n: int
    n_ahead: int  # seeds in which a is larger

    @property
    def verdict(self) -> str:
        """ "larger", "smaller", or "undecided" where the interval holds 0 or cannot be had."""
        if self.low > 0:
            return "larger"
        return "smaller" if self.high < 0 else "undecided"

    def __str__(self) -> str:
        if self.n == 0:
            return "not measured"
        if self.n == 1:
            return f"{self.mean:+z.1f} points (one seed)"
        seeds = f"larger in {self.n_ahead} of {self.n} seeds"
        mean, ends = mean_and_interval(self.mean, self.low, self.high)
        return f"{mean} points (95 % interval {ends}; {seeds})"


def paired_difference(
    runs: pd.DataFrame, a: str, b: str, by: str = "method", value: str = "overall"
) -> Difference:
    """How much more variant a has than variant b of a value, seed by seed.

    Args:
        runs: one row per variant and seed, with the columns by, "seed" and value. a, b: entries of
            the column by.

    Raises:
        KeyError: no such variant in runs.
    """
    for name in (a, b):
        if name not in set(runs[by]):
            raise KeyError(f"{by}: expected one of {sorted(set(runs[by]))}, got {name!r}")
    wide = runs[runs[by].isin([a, b])].pivot_table(index="seed", columns=by, values=value)
    wide = wide.reindex(columns=[a, b]).dropna()
    return interval(wide[a] - wide[b])


def interval(effects) -> Difference:
    """Mean and 95 % interval of one effect for each seed, float (n,)."""
    effects = np.asarray(effects, float)
    n, mean = len(effects), float(effects.mean()) if len(effects) else float("nan")
    half = float("nan")
    if n > 1:
        from scipy import stats

        half = float(stats.t.ppf(0.975, n - 1) * effects.std(ddof=1) / np.sqrt(n))
    return Difference(mean, mean - half, mean + half, n, int((effects > 0).sum()))


def within_correlation(runs: pd.DataFrame, x: str, y: str) -> tuple[float, float, list[float]]:
    """Correlation of two columns of runs: pooled over the seeds, within them (each seed's own mean
    taken off), and that of each seed; nan where a column does not vary."""
    centred = runs[[x, y]] - runs.groupby("seed")[[x, y]].transform("mean")
    by_seed = [_correlation(rows[x], rows[y]) for _, rows in runs.groupby("seed")]
    return _correlation(runs[x], runs[y]), _correlation(centred[x], centred[y]), by_seed


def _correlation(x, y) -> float:
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) < 3 or x.std() < 1e-12 or y.std() < 1e-12:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])
