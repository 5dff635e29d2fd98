"""The page of everything a profile has made: what is there, what is missing, what failed, and
nothing that data could smuggle in."""

import html
import json
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from difflt_core.reporting.page import write_page
from difflt_core.reporting.runner import Notebook

HOSTILE = "<script>alert('1')</script> & \"<b> a|b"


class Page(HTMLParser):
    """Tags, link targets and text of a page."""

    def __init__(self, path):
        super().__init__()
        self.path, self.tags, self.links, self.anchors, self.text = path, [], [], set(), ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.links += [values[a] for a in ("href", "src") if a in values]
        self.anchors |= {values["id"]} if "id" in values else set()

    def handle_data(self, data):
        self.text += data


def _notebook(folder, name, items):
    path = folder / f"{name}.ipynb"
    path.write_text(json.dumps({"cells": [], "metadata": {"difflt": {"items": items}}}))
    return Notebook(path)


def _item(figures, name, kinds, comparable=False, **changes):
    for kind in kinds:
        (figures / f"{name}.{kind}").write_text("")
    stage = {"elapsed_s": 3700, "commit": "b" * 40 + "-dirty", "hardware": "a GPU"}
    record = {
        "caption": f"caption of {name}",
        "label": "digits",
        "comparable_with_paper": comparable,
        "commit": "a" * 40,
        "seeds": [0, 1],
        "elapsed_s": 3700,
        "environment": {"hardware": "a CPU"},
        "artifacts": {"diffusion/1": stage},
    }
    (figures / f"{name}.json").write_text(json.dumps(record | changes))


@pytest.fixture
def made(tmp_path):
    """Three notebooks: one finished under a hostile name, one failed, one never run."""
    runs, figures = tmp_path / "runs" / "demo", tmp_path / "figures" / "demo"
    runs.mkdir(parents=True)
    figures.mkdir(parents=True)
    finished = _notebook(tmp_path, "42_<b>&#?", ["table98", "figure99"])
    failed = _notebook(tmp_path, "43_failed", ["table99"])
    waiting = _notebook(tmp_path, "44_waiting", ["table97"])
    _item(figures, "table98", ("csv", "md", "tex"), comparable=True)
    cell = html.escape(HOSTILE, quote=False).replace("|", "\\|")  # as Report.table writes it
    table = f"**table98.** face\n\n| class | few |\n|:---|:---|\n| {cell} | 15.0 ± 7.1 |\n"
    (figures / "table98.md").write_text(table, encoding="utf-8")
    _item(figures, "figure99", ("png", "pdf"), caption=HOSTILE, label=HOSTILE)
    for name in (finished.path.stem, "43_failed"):
        (runs / f"{name}.html").write_text("")
        (runs / f"{name}.done.json").write_text('{"elapsed_s": 61.4}')
    error = {"output_type": "error", "ename": "ValueError", "evalue": f"{HOSTILE}\nsecond line"}
    copy = {"cells": [{"outputs": []}, {}, {"outputs": [error]}]}
    (runs / "43_failed.ipynb").write_text(json.dumps(copy))
    return [finished, failed, waiting], tmp_path


def test_what_is_made_is_shown_with_its_provenance(made):
    text = Page(write_page(*made, "demo")).text
    assert "2 of 4 items are made, 1 of them comparable with the paper" in text
    assert "their stages (1) took 1 h 1 min, added up" in text
    for part in ("caption of table98", "15.0 ± 7.1", "0, 1", "a CPU", "a GPU", "1 min 1 s"):
        assert part in text, part
    assert "commit aaaaaaaaaaaa\n" in text and "commit bbbbbbbbbbbb-dirty\n" in text
    assert len(re.findall(r"\bnot comparable with the paper", text)) == 1


def test_the_best_of_a_column_is_emphasised(made):
    table = "| class | few |\n|:---|:---|\n| a | **15.0 ± 7.1** |\n| ** | 1.0 |\n"
    (made[1] / "figures" / "demo" / "table98.md").write_text(table, encoding="utf-8")
    text = write_page(*made, "demo").read_text(encoding="utf-8")
    assert "<td><strong>15.0 ± 7.1</strong></td>" in text and "<td>**</td><td>1.0</td>" in text


def test_what_is_missing_is_named_with_its_command(made):
    text = Page(write_page(*made, "demo")).text
    for item, number in (("table99", "43"), ("table97", "44")):
        assert f"Not made yet: {item}. To make: ./run_all.sh --profile demo --only {number}" in text
    assert text.count("Not run to its end here.") == 1


def test_a_failed_notebook_says_why_and_not_how_long(made):
    text = Page(write_page(*made, "demo")).text
    assert f"Its last run failed: ValueError: {HOSTILE}\n" in text and "second line" not in text
    assert text.count("Its last run took") == 1


def test_data_are_text_and_nothing_comes_from_outside(made):
    page = Page(write_page(*made, "demo"))
    assert page.text.count(HOSTILE) == 4  # a caption, a label, a cell, an error
    written = page.path.read_text(encoding="utf-8")
    assert "alert" not in written[written.index("<script>") :]
    assert not {"b", "link", "iframe"} & set(page.tags)
    assert page.tags.count("script") == 1  # the template's own
    assert "42_<b>&#?" in page.text and str(made[1]) not in page.path.read_text(encoding="utf-8")


def test_every_link_is_relative_and_leads_somewhere(made):
    page = Page(write_page(*made, "demo"))
    local = [link for link in page.links if not link.startswith("#")]
    assert all((page.path.parent / unquote(link)).is_file() for link in local)
    assert not any(re.match(r"/|\w+:", link) for link in local)
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.anchors
    names = {unquote(link).rpartition("/")[2] for link in local}
    assert {"42_<b>&#?.html", "43_failed.html", "table98.csv", "figure99.png"} <= names


def test_the_same_files_give_the_same_bytes(made):
    first = write_page(*made, "demo").read_bytes()
    assert write_page(*made, "demo").read_bytes() == first


def test_claims_come_first(made):
    figures = made[1] / "figures" / "demo"
    _item(figures, "claims", ("csv", "md"))
    table = "**claims.** face\n\n| claim | verdict |\n|:---|:---|\n| AID > ID | supported |\n"
    (figures / "claims.md").write_text(table, encoding="utf-8")
    text = Page(write_page(*made, "demo")).text
    assert "2 of 4 items are made" in text and "caption of claims" in text
    assert text.index("AID > ID") < text.index("caption of table98")


def test_damaged_records_are_what_is_not_made(made):
    notebooks, out = made
    (out / "figures" / "demo" / "table98.json").write_text("{")
    (out / "runs" / "demo" / "43_failed.ipynb").write_text("damaged")
    assert "1 of 4 items are made" in Page(write_page(notebooks, out, "demo")).text
