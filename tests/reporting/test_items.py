"""Tables and figures: every format, provenance beside each, unknown cells empty."""

import html
import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from difflt_core import Pipeline, Report, load_config, vary
from difflt_core.generation.memorisation import nearest_training
from difflt_core.reporting.feature_space import feature_facets
from difflt_core.reporting.figures import nearest_pairs, noise_by_epoch, seed_lines
from difflt_core.reporting.items import (
    COLOURS,
    GENERATORS,
    PAPERS_GENERATORS,
    over_seeds,
    paper_rows,
    summarise,
    with_unfinished,
)


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


@pytest.mark.parametrize(
    "profile, changes, label",
    [
        ("demo", {}, "digits (embedded), n_max 400, r = 50"),
        ("photos", {}, "CIFAR-10, 16 px, n_max 1000, r = 50"),
        ("photos", {"dataset": "folder", "path": "x/My photos"}, "My photos, 16 px, n_max 1000"),
        ("fashion", {}, "Fashion-MNIST, 16 px, n_max 1000, r = 100"),
        ("folder", {"path": ""}, "folder, 32 px, as it is"),
        ("folder", {"path": "own-images-2024"}, "own-images-2024, 32 px, as it is"),
        ("demo", {"dataset": "folder", "path": "own-images-1f"}, "digits (embedded) as a folder"),
        ("demo", {}, "digits (embedded), n_max 400, r = 50, profile demo, 5 draws"),
        (
            "demo",
            {"tau": 1, "keep": "all"},
            "digits (embedded), n_max 400, r = 50, profile demo with tau = 1, keep = all, 5",
        ),
        (
            "cifar10-fast",
            {"diffusion.lr": 5e-4, "n_classifier_steps": 900},
            "CIFAR-10, 32 px, n_max 5000, r = 100, profile cifar10-fast with diffusion.lr = 0.0005, "
            "n_classifier_steps = 900; not",
        ),
        (
            "folder",
            {"path": "mine", "imb_ratio": 9},
            "mine, 32 px, r = 9, profile folder; not",
        ),
        (
            "cifar10",
            {"n_classifier_steps": 1500},  # what the setting is where the profile has epochs
            "CIFAR-10, 32 px, n_max 5000, r = 100, profile cifar10 with n_classifier_steps = 1500; not",
        ),
    ],
)
def test_the_label_says_which_images(tmp_path, profile, changes, label):
    config = load_config(profile, **changes)
    report = Report(Pipeline(config, tmp_path, "cpu", False), tmp_path)
    assert report.label.startswith(label) and report.label.endswith("not comparable with the paper")


def test_the_header_cuts_no_name_and_shows_it_as_text(report, monkeypatch):
    name = "photographs of <birds> at the lake & in the reeds, 2019 to 2026, seen from the hide"
    monkeypatch.setattr(Report, "label", name)
    assert html.escape(name) in report.header().to_html()


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


OURS = pd.DataFrame({"overall": ["80.0", "70.0"]}, index=pd.Index(["DiffuLT", "mine"], name="m"))


def test_the_papers_columns_stand_beside_ours(tmp_path):
    report = Report(Pipeline(load_config("cifar100"), tmp_path, "cpu", False), tmp_path)
    known = paper_rows("table07")[["overall", "few"]]
    table = report.with_paper(OURS, known)
    assert list(table.index) == ["DiffuLT", "mine"] and table.index.name == "m"
    assert list(table) == ["overall", "paper: overall", "paper: few"] and list(OURS) == ["overall"]
    assert table.iloc[0, 1:].tolist() == [51.5, 29.7] and table.iloc[1, 1:].isna().all()
    report.table("table99", table, "Accuracy in %")
    head, _, note = _parts(report)
    assert note == "paper: measured on CIFAR100-LT, r = 100, ResNet-32.\n"
    assert "not comparable" not in head
    below = (report.folder / "table99.tex").read_text().split(r"\end{tabular}")[1]
    assert "ResNet-32" in below and below.endswith("\\end{table}\n")


@pytest.mark.parametrize(
    "profile, changes",
    [
        ("cifar10", {}),  # another data set
        ("cifar100", {"data.imb_ratio": 10.0}),  # another r
        ("cifar100", {"classifier.arch": "resnet32x4"}),  # another backbone
        ("cifar100", {"diffusion.tau": 2.0}),  # another recipe
        ("demo", {}),
        ("demo", {"data.imb_ratio": 100.0}),
    ],
)
def test_no_number_of_the_paper_stands_beside_one_of_something_else(tmp_path, profile, changes):
    config = vary(load_config(profile), changes)
    report = Report(Pipeline(config, tmp_path, "cpu", False), tmp_path)
    table = report.with_paper(OURS, paper_rows("table07"))
    assert list(table) == ["overall"] and not report.comparable
    report.table("table99", table, "Accuracy in %")
    head, rows, note = _parts(report)
    assert "51.5" not in rows + note and "none stands here" in note
    assert head.count("not comparable with the paper") == 1


@pytest.mark.parametrize("profile", ["cifar100", "imagenet"])
def test_where_the_data_lie_and_which_seeds_are_not_part_of_the_recipe(tmp_path, profile):
    config = vary(load_config(profile), {"data.path": "elsewhere", "seeds": (7,), "data_seed": 3})
    assert Report(Pipeline(config, tmp_path, "cpu", False), tmp_path).comparable


def test_rows_of_several_ratios_have_the_papers_numbers_at_its_own(tmp_path):
    config = vary(load_config("cifar100"), {"data.imb_ratio": 10.0})
    report = Report(Pipeline(config, tmp_path, "cpu", False), tmp_path)
    rows = pd.concat([OURS.iloc[:1]] * 2)
    table = report.with_paper(rows, paper_rows("table07")[["overall"]], [100.0, 50])
    assert table["paper: overall"].tolist()[0] == 51.5 and np.isnan(table.iloc[1, 1])


def _parts(report, item="table99"):
    """Caption, table and what stands below it, of an item's Markdown."""
    return (report.folder / f"{item}.md").read_text().split("\n\n")


def test_a_table_without_the_papers_columns_says_nothing_of_it(report):
    report.table("table99", pd.DataFrame({"few": [1.0]}), "Accuracy in %")
    assert len(_parts(report)) == 2


@pytest.mark.parametrize("direction, best", [("max", 2), ("min", 1)])
def test_the_best_of_a_column_is_bold_in_the_texts_alone(report, direction, best):
    runs = pd.DataFrame({"method": ["none", "a", "b"] * 2, "seed": [0] * 3 + [1] * 3})
    runs["few"] = [np.nan, 9.0, 20.0, np.nan, 11.0, 24.0]
    table = summarise(runs, "method", ["few"])
    report.table("table99", table, "Few", values=runs)
    plain = (report.folder / "table99.csv").read_bytes()
    shown = report.table("table99", table, "Few", values=runs, best={"few": direction})
    rows = _parts(report)[1].splitlines()[2:]
    assert [row.count("**") for row in rows] == [2 if i == best else 0 for i in range(3)]
    text = {1: "10.0 ± 1.4", 2: "22.0 ± 2.8"}[best]
    assert f"**{text}**" in rows[best] and shown["few"].tolist() == ["", "10.0 ± 1.4", "22.0 ± 2.8"]
    tex = (report.folder / "table99.tex").read_text()
    bold = r"\textbf{" + text.replace("±", r"$\pm$") + "}"
    assert tex.count(r"\textbf") == 1 and bold in tex
    assert (report.folder / "table99.csv").read_bytes() == plain


def test_a_row_of_one_seed_is_not_in_the_running(report):
    table = pd.DataFrame(
        {"few": ["77.8", "70.0 ± 1.0", "72.0 ± 1.0"], "one": ["3.0", "2.0", "1.0"]}
    )
    report.table("table99", table, "Few", best={"few": "max", "one": "max"})
    rows = _parts(report)[1]
    assert "**72.0 ± 1.0**" in rows and "**77.8**" not in rows and "**3.0**" in rows


def test_equal_cells_are_best_together_and_nothing_is_where_all_are_equal(report):
    table = pd.DataFrame({"few": ["9.0", "8.0", "9.0"], "many": ["1.0"] * 3}, index=list("abc"))
    report.table("table99", table, "Few", best={"few": "max", "many": "max"})
    text = (report.folder / "table99.md").read_text()
    assert text.count("**9.0**") == 2 and "**1.0**" not in text


@pytest.mark.parametrize("best", [{"fwe": "max"}, {"few": "highest"}])
def test_best_names_a_column_and_a_direction(report, best):
    (column, direction), table = *best.items(), pd.DataFrame({"few": [1.0, 2.0]})
    expected = f"expected 'max' or 'min' for one of few, got '{direction}' for '{column}'"
    with pytest.raises(ValueError, match=expected):
        report.table("table99", table, "Few", best=best)


def test_numbers_keep_their_digits_and_counts_have_no_spread(report):
    runs = pd.DataFrame(
        {
            "method": ["a", "b", "c"] * 2,
            "seed": [0] * 3 + [1] * 3,
            "kept": [2884, 2884, 12] * 2,
            "drawn": pd.array([2884, 5, None] * 2, dtype="Int64"),
            "few": [0.0] * 6,
        }
    )
    table = summarise(runs, "method", ["kept", "drawn", "few"])
    assert table["kept"].tolist() == ["2884", "2884", "12"]
    assert table["drawn"].tolist() == ["2884", "5", ""] and table.loc["a", "few"] == "0.0 ± 0.0"
    table["gain"], table["paper: overall"] = [0.275, -0.36, 1.0], [46.0, np.nan, 44.8]
    shown = report.table("table99", table, "Gain", values=runs)
    assert shown["gain"].tolist() == ["0.275", "-0.360", "1.000"]
    assert shown["paper: overall"].tolist() == ["46.0", "", "44.8"]
    assert shown["gain"].tolist()[1] in _parts(report)[1]


def test_noise_is_counted_over_whole_epochs():
    curve = np.zeros((7, 4))
    curve[:, 2], curve[:, 3] = [1, 1, 0, 2, 2, 2, 4], 4
    assert noise_by_epoch(curve, 3).tolist() == pytest.approx([100 * 2 / 12, 100 * 6 / 12])
    assert noise_by_epoch(curve, 10).tolist() == pytest.approx([100 * 12 / 28])


def test_the_generators_are_in_words(trained, tmp_path):
    words = Report(
        trained.vary({"diffusion.plain_share": 0.9, "diffusion.schedule": "trapezoid"}), tmp_path
    ).generators
    recipe = trained.config.diffusion
    assert (
        f"EDM's preconditioning, {recipe.n_steps:,} steps of training, L_CBDM and L_AID in the last 10 %"
        in words
    )
    assert f"{trained.config.sampling.n_steps} steps of dpm++ 2m" in words
    eps = Report(
        trained.vary({"diffusion.parameterisation": "eps", "diffusion.cbdm_labels": "prior"}),
        tmp_path,
    )
    assert (
        "DDPM's noise prediction" in eps.generators
        and "y' from the training labels" in eps.generators
    )


def test_an_item_of_the_first_seed_has_one_draw(trained, tmp_path):
    whole = Report(Pipeline(load_config("demo"), tmp_path, "cpu"), tmp_path)
    assert "5 draws" in whole.label and "draws" not in whole.first_seed().label


def test_a_caption_counts_the_seeds():
    assert over_seeds((0, 1, 2)) == "mean ± standard deviation over 3 seeds"
    assert over_seeds((4,)) == "one seed"
    assert over_seeds((0, 1), [(0, 1), (0, 1)]) == "mean ± standard deviation over 2 seeds"
    assert over_seeds((0, 1), [(0, 1), (0,)]).endswith("over 2 seeds (other ratios: one)")


def test_markdown_shows_signs_as_they_are_and_class_names_as_text(report):
    table = pd.DataFrame({"few": [1.0]}, index=["<b>&amp; a|b"])
    report.table("table99", table, "few: n < 20, many: n > 100, R&D")
    head, rows, *_ = _parts(report)
    assert "few: n < 20, many: n > 100, R&D" in head and "&gt;" not in head
    assert "&lt;b>&amp;amp; a\\|b" in rows
    tex = (report.folder / "table99.tex").read_text()
    assert r"few: n $<$ 20, many: n $>$ 100, R\&D" in tex


def test_a_class_may_have_any_name_in_a_table(report):
    """`self` is an argument of pandas' assign, and a row of LaTeX that begins with [ an option of the one
    above."""
    runs = pd.DataFrame({"method": ["[a]", "*b"], "seed": [0, 0], "self": [1, 2]})
    report.table("table98", summarise(runs, "method", ["self"]), "caption")
    assert (report.folder / "table98.md").read_text().count("| 1") == 1
    lines = (report.folder / "table98.tex").read_text().splitlines()
    assert sum(line.startswith(("{}[a]", "{}*b")) for line in lines) == 2


def test_figure_1_has_generators_that_stop_early():
    every = with_unfinished(1000)
    assert list(PAPERS_GENERATORS) == list(paper_rows("table01").dropna().index)
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
    seed_lines(ax, runs, "FID", "accuracy", "model", "FID", "accuracy in %")
    assert [list(line.get_xdata()) for line in ax.lines] == [[1, 2, 3], [10, 20, 30]]
    assert list(ax.lines[0].get_ydata()) == [90, 80, 70]
    names = ["DDPM", "CBDM tau=1", "DiffuLT", "seed 0", "seed 1"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == names
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "FID, log scale"
    plt.close(figure)


def test_figure_1_has_a_facet_for_each_generator():
    rng = np.random.default_rng(0)
    figure = plt.figure(layout="constrained")
    drawn = {
        "DDPM": (rng.normal(size=(7, 5)), np.array([0, 0, 1, 1, 2, 2, 2])),
        "DiffuLT": (np.zeros((0, 5)), np.zeros(0, int)),  # none for this class
    }
    feature_facets(figure, rng.normal(size=(6, 5)), rng.normal(size=(2, 5)), drawn, "class 9")
    shown = {ax.get_title(loc="left"): ax for ax in figure.axes if ax.get_visible()}
    assert list(shown) == ["real", "DDPM", "DiffuLT"]
    n_points = [[len(c.get_offsets()) for c in ax.collections] for ax in shown.values()]
    assert n_points == [[6, 2], [6, 2, 2, 3], [6, 0, 0, 0]]  # grey, then stars or ID, AID, OOD
    plt.close(figure)


def test_a_column_without_a_number_is_left_out_and_named(report):
    table = pd.DataFrame({"few": [1.0, 2.0], "agreement": [np.nan] * 2}, index=["a", "b"])
    best = {"few": "max", "agreement": "max"}
    assert list(report.table("table99", table, "Accuracy in %", best=best)) == ["few"]
    written = (report.folder / "table99.md").read_text()
    assert "| agreement" not in written and "Not measured on these data: agreement." in written


def test_pairs_are_drawn_into_a_part_of_a_figure():
    images, figure = np.zeros((2, 4, 4, 1), np.uint8), plt.figure(layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    assert nearest_pairs(images, images, [(0, 1, 2.5)], 2, figure=bottom) is bottom
    assert not top.axes and bottom.axes[0].get_title() == "2.5"
    plt.close(figure)


def test_a_mirrored_match_is_drawn_as_it_matched():
    train = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1)
    images = np.concatenate([train, train[:, :, ::-1]])
    distances, nearest = nearest_training(images, train, mirrored=True)
    assert distances.tolist() == [0, 0]
    figure = nearest_pairs(images, train, [(i, nearest[i], distances[i]) for i in range(2)], 2)
    for ax in figure.axes:
        drawn = ax.images[0].get_array()
        assert np.array_equal(drawn[:, :4], drawn[:, -4:])
    plt.close(figure)
