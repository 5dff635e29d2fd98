"""Sentences of a notebook's "What we see", made of the runs of its tables: true whatever came out.

`runs` is always one row per variant and seed, with the column `by` that names the variant and a
column "seed". A direction is claimed where the 95 % interval of the paired differences leaves out 0.
Names of variants are set in italics, for they hold commas.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from .differences import Difference, paired_difference, within_correlation
from .numbers import mean_and_interval, n_digits, seeds_in_words

__all__ = [
    "against",
    "bullets",
    "contrasts",
    "correlated",
    "does_it_help",
    "means",
    "ranking",
    "sections",
    "verdicts",
]

_WORDS = {"larger": "higher", "smaller": "lower", "undecided": "not decided"}


def against(
    runs: pd.DataFrame, a: str, b: str, values: dict[str, str], by: str = "method"
) -> list[str]:
    """How variant a stands to variant b: a sentence for each value.

    Args:
        values: a column of runs, and what the sentence calls it, e.g. {"few": "few-shot"}.
    """
    found = {label: paired_difference(runs, a, b, by, v) for v, label in values.items()}
    return [f"*{a}* against *{b}*, {label}: {_claim(d)}{d}." for label, d in found.items()]


def verdicts(
    runs: pd.DataFrame, names: Iterable[str], b: str, value: str, label: str, by: str = "method"
) -> str:
    """Which variants have more of a value than variant b and which less, with the mean difference
    and the seeds in which it has more: "few-shot, against *b*: higher with *a* (+5.0, higher in 3 of
    3); not decided: *c* (-0.3, higher in 1 of 3)."

    Args:
        names: the variants that are held against b. label: what the sentence calls the value.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        d = paired_difference(runs, name, b, by, value)
        higher = f", higher in {d.n_ahead} of {d.n}" if d.n > 1 else ""
        shown = f"*{name}* ({d.mean:+z.1f}{higher})" if d.n else f"*{name}*"
        groups.setdefault(_group(d), []).append(shown)
    order = ("higher with", "lower with", "not decided:", "one seed alone:", "not measured:")
    parts = [f"{group} {', '.join(groups[group])}" for group in order if group in groups]
    return f"{label}, against *{b}*: {'; '.join(parts) or 'nothing to compare'}."


def contrasts(
    runs: pd.DataFrame,
    names: Iterable[str],
    references: Iterable[str],
    values: dict[str, str],
    by: str = "method",
) -> pd.DataFrame:
    """Differences of variants (rows) to each reference (columns) in words: mean, 95 % interval, and
    in how many seeds the variant has more. Empty where a variant is its own reference.

    Args:
        values: a column of runs, and what the head of the table calls it.
    """
    names, columns = list(names), {}
    for reference in references:
        for value, label in values.items():
            cells = [
                ""
                if name == reference
                else _cell(paired_difference(runs, name, reference, by, value))
                for name in names
            ]
            columns[f"{label}, against {reference}"] = cells
    return pd.DataFrame(columns, index=pd.Index(names, name=by))


def means(
    runs: pd.DataFrame, value: str, by: str = "method", names: Iterable[str] | None = None
) -> pd.Series:
    """Mean of a value over the runs of each variant, the highest first; without those that have
    none. names: of which variants; None is all."""
    chosen = runs if names is None else runs[runs[by].isin(list(names))]
    found = chosen.groupby(by, sort=False)[value].mean().dropna()
    return found.sort_values(ascending=False, kind="stable")


def ranking(
    runs: pd.DataFrame, value: str, by: str = "method", names: Iterable[str] | None = None
) -> str:
    """The same in words, "*a* (81.9), *b* (80.5)", or "not measured"; variants with fewer seeds than
    others have come after them."""
    found, digits = means(runs, value, by, names), n_digits(runs[value])
    n_seeds = runs.dropna(subset=[value]).groupby(by)["seed"].nunique()[found.index]
    groups: dict[int, list[str]] = {}
    for name, mean in found.items():
        groups.setdefault(n_seeds[name], []).append(f"*{name}* ({mean:.{digits}f})")
    first, *rest = sorted(groups, reverse=True) or [0]
    text = ", ".join(groups.get(first, [])) or "not measured"
    return text + "".join(f"; on {seeds_in_words(n)}: {', '.join(groups[n])}" for n in rest)


def correlated(runs: pd.DataFrame, x: str, y: str) -> str:
    """The correlation of two columns: within the seeds, pooled, and in how many seeds it is
    negative."""
    pooled, within, by_seed = within_correlation(runs, x, y)
    known = [r for r in by_seed if not np.isnan(r)]
    if np.isnan(within) or not known:
        return f"{x} and {y}: no correlation to be had (not measured, or without any spread)."
    negative = sum(r < 0 for r in known)
    return (
        f"{x} and {y}: correlation {within:+z.2f} within the seeds, {pooled:+z.2f} pooled; "
        f"negative in {negative} of {len(known)} seeds."
    )


def does_it_help(runs: pd.DataFrame) -> str:
    """Whether generated images are worth it on one's own data, first of all where they are not, and
    where the repeats do not decide.

    Args:
        runs: rows for the methods cross-entropy, BSCE and DiffuLT with the columns rare and all: mean
            accuracy in % of the rare classes, and of all classes.
    """
    rare = paired_difference(runs, "DiffuLT", "cross-entropy", value="rare")
    over = {v: paired_difference(runs, "DiffuLT", "BSCE", value=v) for v in ("all", "rare")}
    gain = f"{_plus_minus(rare, ' points')} on the rare classes against plain training"
    against_loss = (
        f"{_plus_minus(over['all'])} over all classes and {_plus_minus(over['rare'])} on the rare ones "
        "against BSCE, a loss that costs nothing"
    )
    if not rare.n:
        return (
            "Not decided: no test image of the rare classes. Add some (a class of one image has none), or "
            f"give them in test/. Generated images: {gain}; {against_loss}."
        )
    if over["all"].verdict == rare.verdict == "larger":
        return f"Generated images help: {gain}; {against_loss}."
    if "smaller" in (over["all"].verdict, over["rare"].verdict):
        return f"Use BSCE instead. Generated images: {gain}; {against_loss}."
    if rare.verdict == "smaller":
        return f"Generated images do not help: {gain}; {against_loss}."
    more = ",".join(map(str, range(2 * max(2, rare.n))))
    return (
        f'Not decided by so few repeats (--set "seeds=[{more}]" has more). '
        f"Generated images: {gain}; "
        f"{against_loss}."
    )


def _plus_minus(d: Difference, unit: str = "") -> str:
    if not d.n:
        return "not measured"
    spread = f" ± {d.high - d.mean:.1f}{unit}" if d.n > 1 else f"{unit} (one repeat)"
    return f"{d.mean:+z.1f}{spread}"


def bullets(lines: Iterable[str]) -> str:
    """Markdown: a list of sentences, each with a capital at its head."""
    return "\n".join(f"- {line[:1].upper()}{line[1:]}" for line in lines)


def sections(parts: dict[str, Iterable[str]]) -> str:
    """Markdown: a list of sentences below each bold head."""
    return "\n\n".join(f"**{head}**\n\n{bullets(lines)}" for head, lines in parts.items())


def _claim(d: Difference) -> str:
    """The verdict of an interval, where there is one."""
    return f"**{_WORDS[d.verdict]}**, " if d.n > 1 else ""


def _group(d: Difference) -> str:
    if d.n < 2:
        return "one seed alone:" if d.n else "not measured:"
    return {"larger": "higher with", "smaller": "lower with"}.get(d.verdict, "not decided:")


def _cell(d: Difference) -> str:
    if d.n < 2:
        return f"{d.mean:+z.1f}" if d.n else ""
    mean, ends = mean_and_interval(d.mean, d.low, d.high)
    return f"{mean} ({ends}), {d.n_ahead} of {d.n}"
