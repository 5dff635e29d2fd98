"""What holds the repository together: one pinned set, the README's commands, evidence that names
its source."""

import json
import re
import subprocess
import sys
import tomllib

import pytest

from difflt_core import load_config
from difflt_core.engine import provenance
from difflt_core.engine.provenance import ROOT, locked
from difflt_core.profiles import PROFILES
from difflt_core.reporting.runner import find_notebooks

README = (ROOT / "README.md").read_text(encoding="utf-8")
RUN_LOCK, LOCK = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("requirements.lock", "requirements-test.lock")
)


def _tracked():
    run = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in run.stdout.splitlines()]


def test_a_notebook_that_was_only_run_is_no_change(tmp_path, monkeypatch):
    def git(*words):
        own = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *own, *words], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    path = tmp_path / "notebooks" / "05.ipynb"
    path.parent.mkdir()
    cell = {"cell_type": "code", "source": ["1 + 1"], "outputs": [], "execution_count": None}
    git("init")
    for changes, ending in (
        ({}, ""),
        ({"outputs": ["2"], "execution_count": 1}, ""),
        ({"source": ["1 + 2"]}, "-dirty"),
    ):
        path.write_text(json.dumps({"cells": [cell | changes]}))
        if not changes:
            git("add", ".")
            git("commit", "-m", "a")
        provenance.commit.cache_clear()
        assert re.fullmatch(f"[0-9a-f]{{40}}{ending}", provenance.commit()), changes
    provenance.commit.cache_clear()


def test_conda_and_pip_install_the_same_pinned_set():
    lines = [line.strip() for line in (ROOT / "environment.yml").read_text().splitlines()]
    pip = lines[lines.index("- pip:") + 1 :]
    assert [line for line in pip if line.startswith("- ")] == ["- -r requirements-test.lock"]
    conda = lines[lines.index("dependencies:") + 1 : lines.index("- pip:")]
    assert [re.split("[<>=]", line)[0] for line in conda] == ["- python", "- pip"]


def test_a_run_and_its_tests_have_the_same_versions():
    run, tests = (
        dict(re.findall(r"^([a-z0-9.-]+)==([^ ;\\]+)", lock, re.M)) for lock in (RUN_LOCK, LOCK)
    )
    assert run.items() <= tests.items()
    tools = {"pytest", "pytest-xdist", "hypothesis", "mypy", "ruff", "transformers", "onnx"}
    assert not tools & run.keys()
    assert {"torch", "jupyterlab", "papermill", "distributed", "nbstripout"} <= run.keys()


def test_the_lock_pins_every_direct_dependency_with_hashes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(re.findall(r"^([a-z0-9.-]+)==([^ ;\\]+)", LOCK, re.M))
    extras = project["optional-dependencies"].values()
    for requirement in (*project["dependencies"], *(r for extra in extras for r in extra)):
        name, _, exact = requirement.partition(";")[0].partition("==")
        assert re.split("[<>=]", name)[0] in pinned
        assert not exact or pinned[name] == exact
    entries = re.split(r"\n(?=[a-z])", LOCK.strip())
    assert all("--hash=sha256:" in e for e in entries if re.match(r"[a-z0-9.-]+==", e))


def test_the_listed_licences_are_those_of_the_lock():
    rows = (ROOT / "figures" / "licences.md").read_text(encoding="utf-8").splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [(name, version) for name, version, _ in cells] == sorted(locked())


@pytest.mark.parametrize(
    "command",
    [("ruff", "check", "-q"), ("ruff", "format", "--check", "-q"), ("mypy",)],
    ids=["lint", "format", "types"],
)
def test_the_code_is_clean(command):
    """As CONTRIBUTING.md has it; the type checker looks at the public face (pyproject.toml)."""
    run = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_design_card():
    assert all(
        (ROOT / name).exists()
        for name in (
            "notebooks",
            "difflt_core",
            "figures",
            "environment.yml",
            "run_all.sh",
            "tests",
            "README.md",
        )
    )
    packages = (
        "torch",
        "torchvision",
        "jupyterlab",
        "papermill",
        "matplotlib",
        "seaborn",
        "nbstripout",
        "pytest",
    )
    assert all(re.search(rf"^{name}==", LOCK, re.M) for name in packages)


def test_no_package_index_is_named():
    pattern = re.compile(
        r"(--index-url|--extra-index-url|--find-links) \S+|https?://[^\s]*(pypi|/simple)"
    )
    for path in _tracked():
        if (
            path.suffix in (".py", ".sh", ".yml", ".toml", ".lock", ".ipynb", ".md", ".cff", "")
            and path.is_file()
        ):
            assert not pattern.search(path.read_text(encoding="utf-8", errors="ignore")), path


def test_the_docker_image_installs_the_lock_or_the_lock_without_cuda():
    """Its own commands, run here: what CPU_WHEELS leaves out are CUDA's packages and torch itself."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = re.findall(r"^COPY (?:--\S+ )*(\S+) \S+$", text, re.M)
    assert copied == ["requirements.lock", "."] and (ROOT / copied[0]).is_file()
    torch, rest = (
        subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True).stdout
        for command in (re.search(r"\$\((grep .*)\)", text)[1], re.search(r"awk .*(?= >)", text)[0])
    )
    every, left = (set(re.findall(r"^([a-z0-9.-]+)==", lock, re.M)) for lock in (RUN_LOCK, rest))
    assert [line.split("==")[0] for line in torch.split()] == ["torch", "torchvision"]
    gone = every - left
    assert {
        "torch",
        "torchvision",
        "triton",
        "nvidia-cudnn-cu13",
    } <= gone and "torch-fidelity" in left
    assert all(re.match("torch|triton|nvidia-|cuda-", name) for name in gone)
    assert rest.count("--hash=sha256:") < RUN_LOCK.count("--hash=sha256:")
    assert all("--hash=sha256:" in entry for entry in re.split(r"\n(?=[a-z])", rest.strip()))


def test_ci_runs_the_readmes_test_command():
    assert "exec ./run_all.sh --test" in (ROOT / ".ci" / "run").read_text()
    assert "./run_all.sh --test" in README and "\n./run_all.sh\n" in README


def test_the_readme_and_the_docs_point_at_files_that_exist():
    for page in (*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^):]+)\)", text) + re.findall(r'src="([^":]+)"', text):
            path, _, anchor = target.partition("#")
            there = page.parent / path if path else page
            assert there.exists(), f"{page.name}: {target}"
            if anchor:
                assert anchor in _anchors(there.read_text(encoding="utf-8")), (
                    f"{page.name}: {target}"
                )


def _anchors(text: str) -> list[str]:
    """Of the headings of a page, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]


def test_the_readme_lists_every_item_and_notebook():
    for notebook in find_notebooks():
        assert notebook.path.stem in README
        assert all(item in README for item in notebook.items)


def test_committed_evidence_says_where_it_comes_from(committed):
    records = sorted(p for p in (committed / "figures").rglob("*.json"))
    assert records
    for path in records:
        record = json.loads(path.read_text())
        commit = record["environment"]["commit"]
        assert re.fullmatch(r"[0-9a-f]{40}", commit), f"{path}: made from a changed checkout"
        assert record["environment"]["hardware"] and record["environment"]["packages"]
        if not {"benchmark", "faults"} & set(path.parts) and path.stem != "claims":
            papers = record["config"]["data"]["name"] in ("cifar100", "imagenet_lt")
            assert papers or record["comparable_with_paper"] is False, path
            assert all(a["commit"] and a["hardware"] for a in record["artifacts"].values())


@pytest.mark.parametrize("item", ["demo/table07", "photos/table07", "claims"])
def test_the_readmes_tables_are_the_committed_ones(item, committed):
    """Cell by cell: in the README the columns are not padded."""
    written = (committed / "figures" / f"{item}.md").read_text(encoding="utf-8")
    head, _, *rows = re.sub(r" +", " ", written).split("\n\n")[1].splitlines()
    assert len(rows) >= 5
    tables = [part.split("\n\n")[0] for part in README.split(f"\n{head}\n")[1:]]
    assert rows in [table.splitlines()[1:] for table in tables]


def test_the_map_of_the_code_names_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.split("## The rooms")[1].split("\n\n")[2]
    for path in (ROOT / "difflt_core").rglob("[a-z]*.py"):
        if path.parent.name != "benchmarks":
            assert f"`{path.stem}`" in table, path.name


def test_the_generators_readings_are_the_profiles():
    """docs/readings.md has a row for every profile, with its values."""
    text = (ROOT / "docs" / "readings.md").read_text(encoding="utf-8")
    rows = [
        [c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"
    ]
    names, told = (
        [],
        {"sampling steps": ("sampling", "n_steps"), "guidance": ("sampling", "guidance")},
    )
    for who, *cells in rows[2:]:
        for profile in who.replace("`", "").split(", "):
            names.append(profile)
            config = load_config(profile)
            for column, cell in zip(rows[0][1:], cells, strict=True):
                part, name = told.get(column, ("diffusion", column))
                value = getattr(getattr(config, part), name)
                assert cell == (value if isinstance(value, str) else f"{value:g}"), (
                    profile,
                    column,
                )
    assert sorted(names) == sorted(PROFILES)


def test_the_stated_faults_are_the_counted_ones():
    rows = json.loads((ROOT / "figures" / "faults" / "faults.json").read_text())["rows"]
    counted = {}
    for fault, _, tried, lost in rows:
        before = counted.get(fault, (0, 0))
        counted[fault] = (before[0] + tried, before[1] + lost)
    text = (ROOT / "docs" / "reproducibility.md").read_text(encoding="utf-8")
    section = text.split("## Faults, tried and counted")[1].split("\n## ")[0]
    said = re.findall(r"^\| ([^|]+) \| [^|]+ \| (\d+) \| (\d+) \|$", section, re.M)
    assert {fault: (int(tried), int(lost)) for fault, tried, lost in said} == counted
