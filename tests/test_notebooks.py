"""Every notebook: its structure, and an execution of all of them at smoke size in a clean
folder."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys

import nbformat
import pandas as pd
import pytest

from difflt_core import load_config
from difflt_core.benchmarks.cost import planned
from difflt_core.config import PARAMETERS
from difflt_core.engine.provenance import ROOT
from difflt_core.profiles import IMAGENET_SAMPLE, PROFILES
from difflt_core.reporting.claims import CLAIMS
from difflt_core.reporting.runner import _OF_THEIR_DATA, find_notebooks

NOTEBOOKS = find_notebooks()
COMMON = {"profile", "device", "out", "data_dir"}
# Parameters of one notebook: what is shown, and which repeats a table has.
LOCAL = {
    "published",
    "n_shown",
    "ratios",
    "all_seeds_of_all_rows",
    "all_seeds_of_variants",
    "variants",
}


# a result, which belongs into a cell that computes it
TYPED = re.compile(r"\d+[.,]\d|\d+ (%|points?)|±")


def cells(notebook, kind):
    return [c for c in notebook.content["cells"] if c["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


@pytest.fixture(params=NOTEBOOKS, ids=lambda n: n.path.stem)
def notebook(request):
    return request.param


def test_numbers_and_items_are_unique():
    assert len({n.number for n in NOTEBOOKS}) == len(NOTEBOOKS) >= 3
    items = [item for n in NOTEBOOKS for item in n.items]
    assert len(set(items)) == len(items)


def test_git_holds_no_output(notebook):
    """In git's index: JupyterLab saves outputs into the file. The form is nbstripout's own."""
    name = f"notebooks/{notebook.path.name}"
    run = subprocess.run(["git", "show", f":{name}"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("not a git checkout, or a new notebook")
    book = nbformat.reads(run.stdout, 4)
    code = [c for c in book.cells if c.cell_type == "code"]
    assert all(c.outputs == [] and c.execution_count is None for c in code)
    assert nbformat.writes(book) + "\n" == run.stdout


def test_first_cell_says_what_time_and_the_papers_value(notebook):
    first = source(notebook.content["cells"][0])
    assert first.startswith(f"# {notebook.number} ")
    for part in (
        "**Regenerates**",
        "**Needs**",
        "**Writes**",
        "| profile |",
        "**The paper's value**",
        *notebook.items,
    ):
        assert part in first, part
    assert not TYPED.search(first.split("**Regenerates**")[0]), "a number that was typed"


def test_parameters_are_commented_literals(notebook):
    (cell,) = [c for c in cells(notebook, "code") if "parameters" in c["metadata"].get("tags", [])]
    for line, node in zip(source(cell).splitlines(), ast.parse(source(cell)).body, strict=True):
        ast.literal_eval(node.value)
        assert "  # " in line, line
    assert COMMON | {"overrides"} <= set(notebook.parameters)
    assert set(notebook.parameters) <= COMMON | LOCAL | {"overrides"} | set(PARAMETERS)


def test_every_parameter_is_used(notebook):
    code = cells(notebook, "code")
    body = "\n".join(source(c) for c in code if "parameters" not in c["metadata"].get("tags", []))
    used = {n.id for n in ast.walk(ast.parse(body)) if isinstance(n, ast.Name)}
    assert set(notebook.parameters) - {"data_dir"} <= used


def test_no_class_or_function_is_defined(notebook):
    for cell in cells(notebook, "code"):
        assert not any(
            isinstance(n, ast.FunctionDef | ast.ClassDef) for n in ast.walk(ast.parse(source(cell)))
        )


def test_accuracies_of_saus_network_are_not_the_papers(tmp_path):
    (ten,) = [n for n in NOTEBOOKS if n.number == "10"]
    parameters, first, *_ = map(source, cells(ten, "code"))
    given = f"\nprofile, device, out = 'cifar100', 'cpu', {str(tmp_path)!r}"
    names = {}
    for text in (parameters + given, first):
        exec(text, names)
    assert names["report"].config.classifier.arch == "resnet32x4"
    assert not names["report"].comparable


def test_what_we_see_asks_and_the_cell_below_computes_the_answer(notebook):
    every = notebook.content["cells"]
    (at,) = [i for i, c in enumerate(every) if source(c).startswith("## What we see")]
    asked, answer = source(every[at]), every[at + 1]
    assert len(asked) > 150 and "?" in asked
    assert not TYPED.search(asked), "a number that was typed"
    assert answer["cell_type"] == "code" and "\nMarkdown(" in source(answer)
    assert not [c for c in every[at + 2 :] if c["cell_type"] == "markdown"]


def test_a_profile_that_a_notebook_refuses_does_not_run_it(notebook):
    meta = notebook.content["metadata"]["difflt"]
    assert set(meta.get("not_in", [])) < set(PROFILES)
    if notebook.number == "06":
        assert set(meta["not_in"]) == set(PROFILES) - set(IMAGENET_SAMPLE) - {"imagenet"}
    refused = {profile for profile in PROFILES if not notebook.runs_by_default(profile)}
    assert refused == set(meta.get("not_in", []))
    check = _OF_THEIR_DATA.get(notebook.number)
    for profile in PROFILES if check else ():
        try:
            check(load_config(profile))
        except ValueError:
            assert profile in refused


def test_a_line_of_code_is_at_most_100_wide(notebook):
    for cell in cells(notebook, "code"):
        assert max(map(len, source(cell).splitlines())) <= 100


def test_ends_with_the_paths(notebook):
    assert source(cells(notebook, "code")[-1]) == "print(report.paths())"


def test_metadata_gives_minutes_for_each_profile(notebook):
    meta = notebook.content["metadata"]["difflt"]
    assert "smoke" in meta["minutes"]
    assert ("demo" in meta["minutes"]) == ("demo" not in meta.get("not_in", []))


def test_the_minutes_are_one_everywhere(notebook):
    """In the metadata, which --list shows, the first cell and the README."""
    minutes, readme = (
        notebook.content["metadata"]["difflt"]["minutes"],
        (ROOT / "README.md").read_text("utf-8"),
    )
    (row,) = [
        line for line in readme.splitlines() if line.endswith(" |") and notebook.path.name in line
    ]
    told = row.split("|")[-2].strip().split(", ")
    assert told == [minutes["smoke"], minutes.get("demo", "`folder`")]
    if "demo" in minutes:
        face = source(cells(notebook, "markdown")[0])
        assert re.search(rf"^\| `demo` \|.*\| {minutes['demo']} minutes?\b", face, re.M)


@pytest.mark.parametrize("number", ["00", "12"])
def test_a_notebook_that_comes_alone_fetches_the_rest(number, tmp_path, monkeypatch):
    """As on Colab: the first cell of code clones the address, installs its lock, and finds it."""
    (notebook,) = [n for n in NOTEBOOKS if n.number == number]
    cell = source(cells(notebook, "code")[0])
    monkeypatch.chdir(tmp_path)
    exec(cell, {})  # difflt_core is here: nothing is done
    assert not list(tmp_path.iterdir())

    here = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "difflt_core" else here(name)
    )
    with pytest.raises(ModuleNotFoundError, match="set `repository` in this cell"):
        exec(cell, {})
    ran, paths = [], list(sys.path)
    monkeypatch.setattr(subprocess, "check_call", ran.append)
    monkeypatch.setattr(sys, "path", paths)
    exec(cell.replace('repository = ""', 'repository = "git://host/difflt"'), {})
    assert ran[0][:2] == ["git", "clone"] and ran[0][-2:] == ["git://host/difflt", "difflt"]
    assert ran[1][:3] == [sys.executable, "-m", "pip"]
    assert (ROOT / ran[1][-1].removeprefix("difflt/")).is_file()
    assert paths[0] == str(tmp_path / "difflt")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """./run_all.sh --profile smoke in an empty folder whose name has a space and a letter beyond
    ASCII."""
    out = tmp_path_factory.mktemp("clean") / "a föl der"
    return out, _run_all(out)


def _run_all(out):
    command = ["./run_all.sh", "--profile", "smoke", "--device", "cpu", "--out", str(out)]
    env = os.environ | {"PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_all_notebooks_run_at_smoke_size(smoke):
    out, run = smoke
    assert run.returncode == 0, run.stderr[-2000:]
    for n in NOTEBOOKS:
        assert (out / "runs" / "smoke" / f"{n.path.stem}.html").stat().st_size > 10_000
        for item in n.items:
            kinds = (
                ("csv", "md", "tex", "json") if item.startswith("table") else ("png", "pdf", "json")
            )
            assert all(
                (out / "figures" / "smoke" / f"{item}.{kind}").stat().st_size > 0 for kind in kinds
            ), item
            record = json.loads((out / "figures" / "smoke" / f"{item}.json").read_text())
            assert record["comparable_with_paper"] is False
    assert "total:" in run.stdout and "%|" in run.stderr  # a summary, and progress bars


def test_the_cost_counts_what_a_run_builds(smoke):
    """benchmarks.cost notes, without building, the very stages that the notebooks then build; but for
    06 and 12, whose files it does not have."""
    out, _ = smoke
    manifests = out.glob("runs/cache/*/*/manifest.json")
    recipes = {p.parent.name: json.loads(p.read_text())["recipe"] for p in manifests}
    noted = {key for n in NOTEBOOKS if n.number not in ("06", "12") for key in planned(n, "smoke")}
    assert len(noted) > 50 and noted <= recipes.keys()
    names = {k: r["config"]["data"]["name"] for k, r in recipes.items() if r["stage"] == "data"}
    for key in recipes.keys() - noted:
        assert names[recipes[key]["inputs"].get("data", key)] in ("imagenet_lt", "folder")


def test_the_cost_needs_neither_data_nor_weights():
    """Of the notebook that looks for both before it trains."""
    (fid,) = (n for n in NOTEBOOKS if n.number == "01")
    found = [node.stage.name for node in planned(fid, "cifar10", seeds=[0]).values()]
    assert {"diffusion", "samples", "classifier"} <= set(found) and len(found) > 20


def test_published_recipes_train_as_long_as_their_authors():
    """On CIFAR100-LT's 10,847 images, and on those that it is filled up to; phi_0 keeps its own."""
    other = next(n for n in NOTEBOOKS if n.number == "08")
    found: dict[str, set] = {}
    for node in planned(other, "cifar100", published=True, seeds=[0], ratios=[100]).values():
        settings = node.config.get("classifier")
        if settings:
            found.setdefault(settings["method"], set()).add(settings["n_steps"])
    on_all = 50_000 // 128 + 1
    assert found["ldam"] == {200 * 85} and found["paco"] == {400 * 85}
    assert found["gpaco"] == {400 * 85, 400 * on_all} and found["ride"] == {200 * 85, 200 * on_all}
    assert found["bsce"] == {13_000} and found["ce"] == {200 * 85, 200 * on_all}


def test_smoke_tables_hold_accuracies_of_every_seed(smoke):
    out, _ = smoke
    runs = pd.read_csv(out / "figures" / "smoke" / "table07.csv")
    runs = runs[runs["r"] == 10]  # at r = 2 no class is few-shot
    assert {"cross-entropy", "BSCE", "DiffuLT"} <= set(runs["method"])
    assert set(runs["seed"]) == {0, 1}
    assert runs[["overall", "many", "medium", "few"]].apply(lambda c: c.between(0, 100)).all().all()


def test_every_claim_finds_its_rows(smoke):
    """A variant that is renamed in a notebook would leave its claim "not measured"."""
    out, _ = smoke
    for claim in CLAIMS:
        rows = pd.read_csv(out / "figures" / "smoke" / f"{claim.item}.csv")
        claim.effect(rows)  # raises KeyError without them


def test_smoke_notebooks_say_what_they_see(smoke):
    out, _ = smoke
    for n in NOTEBOOKS:
        book = json.loads((out / "runs" / "smoke" / n.path.name).read_text())
        outputs = [o for c in book["cells"] for o in c.get("outputs", ())]
        texts = ["".join(o.get("data", {}).get("text/markdown", "")) for o in outputs]
        (said,) = [t for t in texts if t]
        assert said.count("- ") >= 3 and not re.search(r"\bnan\b", said), n.path.stem


def test_a_second_run_changes_no_byte(smoke):
    out, _ = smoke
    before = {p: p.read_bytes() for p in (out / "figures").rglob("*.*")}
    run = _run_all(out)
    assert run.returncode == 0 and run.stdout.count("finished") >= len(NOTEBOOKS)
    assert {p: p.read_bytes() for p in (out / "figures").rglob("*.*")} == before


def test_a_third_run_finds_every_artifact_when_notebooks_are_forced(smoke):
    """The tables come out the same, byte for byte, from cached stages."""
    out, _ = smoke
    tables = {p: p.read_bytes() for p in (out / "figures").rglob("table*.csv")}
    built = {p: p.stat().st_mtime_ns for p in (out / "runs" / "cache").rglob("manifest.json")}
    command = [
        "./run_all.sh",
        "--profile",
        "smoke",
        "--device",
        "cpu",
        "--out",
        str(out),
        "--only",
        "04",
        "--force",
        "--jobs",
        "1",
    ]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    assert {p: p.read_bytes() for p in (out / "figures").rglob("table*.csv")} == tables
    assert {
        p: p.stat().st_mtime_ns for p in (out / "runs" / "cache").rglob("manifest.json")
    } == built
