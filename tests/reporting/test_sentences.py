"""Sentences follow the numbers, whichever way they point."""

import numpy as np
import pandas as pd
import pytest

from difflt_core.reporting.sentences import (
    against,
    bullets,
    contrasts,
    correlated,
    means,
    ranking,
    sections,
    verdicts,
)


def frame(**values):
    """One row per variant and seed, from each variant's values in the order of the seeds."""
    rows = [(name, s, v) for name, of in values.items() for s, v in enumerate(of)]
    return pd.DataFrame(rows, columns=["method", "seed", "few"])


RUNS = frame(
    base=[40, 41, 42], up=[50, 51, 52.3], down=[30, 31, 32.3], same=[41, 40, 42], once=[45]
)


@pytest.mark.parametrize(
    "name,word", [("up", "higher"), ("down", "lower"), ("same", "not decided")]
)
def test_a_direction_is_claimed_where_the_interval_leaves_out_0(name, word):
    (sentence,) = against(RUNS, name, "base", {"few": "few-shot"})
    assert sentence.startswith(f"*{name}* against *base*, few-shot: **{word}**, ")
    assert "95 % interval" in sentence and sentence.endswith("of 3 seeds).")


def test_one_seed_claims_nothing():
    assert against(RUNS, "once", "base", {"few": "few-shot"}) == [
        "*once* against *base*, few-shot: +5.0 points (one seed)."
    ]


def test_verdicts_sort_the_variants():
    names = ["up", "down", "same", "once"]
    assert verdicts(RUNS, names, "base", "few", "few-shot") == (
        "few-shot, against *base*: higher with *up* (+10.1, higher in 3 of 3); "
        "lower with *down* (-9.9, higher in 0 of 3); not decided: *same* (+0.0, higher in 1 of 3); one seed alone: *once* (+5.0)."
    )
    unknown = frame(base=[1, 2], a=[np.nan, np.nan])
    assert verdicts(unknown, ["a"], "base", "few", "x") == "x, against *base*: not measured: *a*."
    assert verdicts(unknown, [], "base", "few", "x") == "x, against *base*: nothing to compare."


def test_contrasts_leave_a_variants_own_column_empty():
    table = contrasts(RUNS, ["up", "base", "once"], ["base", "up"], {"few": "few-shot"})
    assert list(table) == ["few-shot, against base", "few-shot, against up"]
    assert table.loc["base", "few-shot, against base"] == ""
    assert table.loc["up", "few-shot, against base"] == "+10.1 (+9.7 to +10.5), 3 of 3"
    assert table.loc["once", "few-shot, against base"] == "+5.0"


def test_means_are_ranked_and_unknown_ones_left_out():
    assert list(means(RUNS, "few").index) == ["up", "once", "base", "same", "down"]
    assert ranking(RUNS, "few", names=["base", "up"]) == "*up* (51.1), *base* (41.0)"
    assert ranking(frame(a=[np.nan]), "few") == "not measured"


def test_a_row_with_fewer_seeds_is_ranked_behind():
    runs = frame(base=[40, 41, 42], up=[50, 51, 52], twice=[60, 61], once=[70.0])
    text = "*up* (51.0), *base* (41.0); on 2 seeds: *twice* (60.5); on one seed: *once* (70.0)"
    assert ranking(runs, "few") == text and ranking(runs, "few", names=["once"]) == "*once* (70.0)"


def test_a_correlation_says_in_how_many_seeds_it_is_negative():
    runs = pd.DataFrame({"seed": [0] * 3 + [1] * 3, "FID": [1, 2, 3] * 2})
    runs["accuracy"] = [3, 2, 1, 11, 12, 13]
    assert "negative in 1 of 2 seeds" in correlated(runs, "FID", "accuracy")
    assert "+0.00 within the seeds" in correlated(runs, "FID", "accuracy")
    assert "no correlation" in correlated(runs.assign(accuracy=np.nan), "FID", "accuracy")


def test_lists_in_markdown():
    assert sections({"A": ["x."], "B": ["y."]}) == "**A**\n\n- X.\n\n**B**\n\n- Y."
    assert bullets(["few-shot: 1.", "Overall: 2."]) == "- Few-shot: 1.\n- Overall: 2."
