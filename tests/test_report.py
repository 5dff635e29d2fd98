"""Tables and figures: every format, provenance beside each, unknown cells empty."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from difflt_core import Report
from difflt_core.figures import nearest_pairs, seed_lines
from difflt_core.metrics import group_accuracy, mean_spread
from difflt_core.report import COLOURS, GENERATORS, paper_rows, summarise, with_unfinished


@pytest.fixture
def report(trained, tmp_path):
    return Report(trained, tmp_path)


def test_a_table_is_written_in_four_forms(report):
    runs = pd.DataFrame(
        {"method": ["a", "a", "b_c"], "seed": [0, 1, 0], "few": [10.0, 20.0, np.nan]}
    )
    table = summarise(runs, "method", ["few"])
    report.table("table99", table, "Accuracy in %", values=runs)
    files = {p.suffix: p.read_text() for p in report.folder.iterdir()}
    assert set(files) == {".csv", ".md", ".tex", ".json"}
    assert "15.0 ± 7.1" in files[".md"] and "not comparable with the paper" in files[".md"]
    assert (
        r"15.0 $\pm$ 7.1" in files[".tex"] and r"b\_c" in files[".tex"] and r"\%" in files[".tex"]
    )
    assert "a,0,10.0000" in files[".csv"]
    record = json.loads(files[".json"])
    assert record["comparable_with_paper"] is False and record["config"]["profile"] == "smoke"
    assert record["artifacts"] and {"commit", "seeds", "elapsed_s", "environment"} <= set(record)
    assert record["elapsed_s"] > 0 and record["environment"]["packages"]["torch"].startswith("2.")


def test_a_figure_is_the_same_file_twice(report):
    def draw():
        fig, ax = plt.subplots()
        ax.plot([0, 1])
        report.figure("figure99", fig, "A line")
        plt.close(fig)
        return {p.name: p.read_bytes() for p in report.folder.iterdir() if p.suffix != ".json"}

    first = draw()
    assert set(first) == {"figure99.png", "figure99.pdf"} and draw() == first


def test_unknown_cells_of_the_paper_are_empty():
    known = paper_rows("table07")
    assert known.loc["DiffuLT", "overall"] == 51.5 and known.loc["cross-entropy", "overall"] == 38.3
    assert known.isna().any().any() and "CIFAR100" in known.attrs["setting"]


def test_the_papers_columns_stand_beside_ours(report, monkeypatch):
    ours = pd.DataFrame(
        {"overall": ["80.0", "70.0"]}, index=pd.Index(["DiffuLT", "mine"], name="m")
    )
    known = paper_rows("table07")[["overall", "few"]]
    table = report.with_paper(ours, known)
    assert list(table.index) == ["DiffuLT", "mine"] and table.index.name == "m"
    names = ["overall", "paper: overall (not comparable)", "paper: few (not comparable)"]
    assert list(table) == names and list(ours) == ["overall"]
    assert table.iloc[0, 1:].tolist() == [51.5, 29.7] and table.iloc[1, 1:].isna().all()
    monkeypatch.setattr(Report, "comparable", True)
    assert list(report.with_paper(ours, known)) == ["overall", "paper: overall", "paper: few"]


def test_figure_1_has_generators_that_stop_early():
    every = with_unfinished(1000)
    assert list(every)[2:] == list(GENERATORS) and set(every) <= set(COLOURS)
    steps = [changes.get("diffusion.n_steps") for changes in every.values()]
    assert steps[:3] == [125, 333, None]
    assert min(c["diffusion.n_steps"] for c in list(with_unfinished(2).values())[:2]) == 1


def test_figure_1_draws_a_line_for_each_seed():
    runs = pd.DataFrame(
        {
            "model": ["DDPM", "CBDM tau=1", "DiffuLT"] * 2,
            "seed": [0] * 3 + [1] * 3,
            "FID": [3.0, 1.0, 2.0, 30.0, 10.0, 20.0],
            "accuracy": [70.0, 90.0, 80.0, 75.0, 95.0, 85.0],
        }
    )
    figure, ax = plt.subplots()
    pooled, within = seed_lines(ax, runs, "FID", "accuracy", "model", "FID", "accuracy in %")
    assert [list(line.get_xdata()) for line in ax.lines] == [[1, 2, 3], [10, 20, 30]]
    assert list(ax.lines[0].get_ydata()) == [90, 80, 70]
    assert within < -0.7 < pooled and f"{within:.2f}" in ax.get_title(loc="left")
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["DDPM", "CBDM tau=1", "DiffuLT"]
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "FID, log scale"
    plt.close(figure)


def test_pairs_are_drawn_into_a_part_of_a_figure():
    images, figure = np.zeros((2, 4, 4, 1), np.uint8), plt.figure(layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    assert nearest_pairs(images, images, [(0, 1, 2.5)], 2, figure=bottom) is bottom
    assert not top.axes and bottom.axes[0].get_title() == "2.5"
    plt.close(figure)


def test_mean_and_sample_deviation():
    assert mean_spread([1, 2, 3]) == (2.0, 1.0)
    assert np.isnan(mean_spread([4])[1])


def test_group_accuracy_by_hand():
    labels = np.array([0, 0, 1, 1, 2, 2])
    predicted = np.array([0, 0, 1, 0, 0, 0])
    result = group_accuracy(predicted, labels, [200, 50, 5])
    assert result == {"overall": 50.0, "many": 100.0, "medium": 50.0, "few": 0.0}
    assert np.isnan(group_accuracy(predicted, labels, [200, 200, 200])["few"])
