"""The command line: every wrong use is one clear message and exit status 2; every failure is 1."""

import contextlib
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import pytest

from difflt_core import Pipeline, bootstrap, notebooks
from difflt_core.engine.artifacts import Store
from difflt_core.engine.provenance import ROOT
from difflt_core.engine.upkeep import upkeep
from difflt_core.experiments import method
from difflt_core.options import build_parser, set_environment
from difflt_core.profiles import DISK_GB, PROFILES
from difflt_core.reporting import baseline, choose, export, runner


def test_programs_refuse_what_only_a_run_takes(capsys):
    """--dry-run would have trained, --hours would have been ignored."""
    for module, more in ((method, []), (export, ["--to", "x"]), (baseline, []), (choose, [])):
        hours = [] if module is export else ["--hours=2"]  # export takes the lengths it fixed
        for option in ("--dry-run", "--gc", "--only=05", *hours):
            with pytest.raises(SystemExit):
                module.main(["--profile", "smoke", *more, option])
            assert f"unrecognized arguments: {option}" in capsys.readouterr().err


def test_hours_measure_this_machine_alone(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("DIFFLT_SCHEDULER", "tcp://10.0.0.1:8786")
    assert call("--profile", "smoke", "--only", "12", "--hours", "2", "--out", str(tmp_path)) == 2
    assert "--hours: measures this machine, and a cluster would train" in capsys.readouterr().err


def call(*argv):
    return runner.main(list(argv))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--only", "77"], "no notebook 77; there are 00_overview"),
        (["--set", "tua=1"], "unknown parameter 'tua'; did you mean 'tau'?"),
        (["--set", "tau=high"], "tau: input should be a valid number"),
        (
            ["--set", "imb_ratio=0.01"],
            "imb_ratio: input should be greater than or equal to 1, got '0.01'",
        ),
        (["--set", "ratios=100x"], "ratios: expected a number, a list or True, got '100x'"),
        (
            ["--set", "ratios=[100]", "--only", "07"],
            "ratios is a parameter of notebook 05 or 08 or 10, which does not run",
        ),
        (["--set", "seeds=[0,0]"], "seeds: expected each once, got [0, 0]"),
        (["--hours", "2"], "--hours: fits the trainings of notebook 12 into them; expected"),
        (
            ["--profile", "photos", "--set", "dataset=digits"],
            "n_classes: digits need it, up to 10; got none",
        ),
        (
            ["--set", "diffusion.lt=1"],
            "unknown setting 'diffusion.lt'; did you mean 'diffusion.lr'?",
        ),
        (["--set", "omega=-1"], "omega: input should be greater than or equal to 0"),
        (["--set", "n_classes=11"], "n_classes: digits has 10 classes, got 11"),
        (
            ["--set", "imb_ratio=1000"],
            "leaves the rarest class without an image; use imb_ratio < 400",
        ),
        (["--set", "ratios=[10, 1000]"], "imb_ratio: 1000 with n_max=400"),
        (["--set", "ratios=50"], "ratios: expected a list of numbers >= 1, as [100, 10], got 50"),
        (["--profile", "imagenet", "--set", "n_max=9"], "imagenet_lt is used as its lists have it"),
        (["--profile", "cifar10", "--set", "n_classes=9"], "n_classes: cifar10 is used whole"),
        (["--set", "path=mine"], "path: the digits are embedded, got 'mine'"),
        (["--profile", "photos", "--only", "05,06"], "or the digits of smoke or demo, got photos"),
        (["--set", "dataset=folder"], "or the digits of smoke or demo, got demo with folder"),
        (["--profile", "fashion", "--only", "12"], "about a folder of images; got fashion_mnist"),
        (["--gc", "remove", "--dry-run"], "--dry-run: is of a run, not of --verify or --gc"),
    ],
)
def test_wrong_values_are_named(argv, message, capsys, tmp_path):
    assert call("--out", str(tmp_path), *argv) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) <= 3
    assert not list(tmp_path.iterdir()), "a refused run left files"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--profile", "dmeo"], "invalid choice: 'dmeo'"),
        (["--only", "first"], "expected notebook numbers like 01,05, got 'first'"),
        (["--set", "tau"], "expected NAME=VALUE, got 'tau'"),
        (["--set", "diffusion.=1"], "expected NAME=VALUE, got 'diffusion.=1'"),
        (["--jobs", "0"], "expected a whole number from 1 on, got '0'"),
        (["--hours", "0"], "expected hours above 0, like 2 or 0.5, got '0'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_options_end_in_usage(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        call(*argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="uses /proc, which nobody can write to"
)
@pytest.mark.parametrize(
    "profile, message",
    [
        ("cifar10", "cifar10: expected the folder {}/cifar-10-batches-py"),
        ("cifar100", "cifar100: expected the folder {}/cifar-100-python"),
        ("folder", "expected a directory with one folder per class at {}"),
        ("imagenet", "imagenet_lt: expected the unpacked ILSVRC2012 at {}, with train/ and val/"),
    ],
)
def test_missing_data_are_named(profile, message, capsys, tmp_path):
    nowhere = tmp_path / "nowhere"
    assert call("--profile", profile, "--data-dir", str(nowhere), "--out", str(tmp_path / "o")) == 1
    assert message.format(nowhere) in capsys.readouterr().err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="nobody can write to /proc")
def test_a_folder_nobody_can_write_to(capsys):
    assert call("--out", "/proc/nowhere") == 1
    assert (
        "cannot write to /proc/nowhere" in (error := capsys.readouterr().err)
        and "--out DIR" in error
    )


def test_no_space_left(capsys, tmp_path, monkeypatch):
    usage = notebooks.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(notebooks.shutil, "disk_usage", lambda _: usage._replace(free=10**7))
    assert call("--out", str(tmp_path)) == 1
    assert "0.01 GB free" in (error := capsys.readouterr().err) and "free some space" in error


def test_inception_weights_are_missed_before_the_first_notebook(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "fingerprint", lambda *_: "cifar")
    where = [
        "--profile",
        "cifar100",
        "--dry-run",
        "--out",
        str(tmp_path),
        "--data-dir",
        str(tmp_path),
    ]
    assert call(*where, "--only", "01,05") == 1
    assert "fid_features: inception needs its weights at" in capsys.readouterr().err
    assert call(*where, "--only", "05") == call(*where, "--only", "01", "--download") == 0


def test_cuda_without_a_gpu(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert call("--device", "cuda", "--out", str(tmp_path)) == 2
    assert "use --device cpu or auto" in capsys.readouterr().err


def test_dry_run_shows_the_plan_and_leaves_nothing(capsys, tmp_path):
    out = ("--out", str(tmp_path / "new" / "out"))
    assert call("--dry-run", "--only", "05", "--set", "seeds=[3,4]", *out) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("05_long_tail_results.ipynb") and "'seeds': [3, 4]" in shown
    assert not list(tmp_path.iterdir())


def test_list_names_every_notebook_item_and_parameter():
    shown = notebooks.listing()
    for notebook in notebooks.find_notebooks():
        assert notebook.path.stem in shown and all(item in shown for item in notebook.items)
    assert "imb_ratio" in shown


def test_every_profile_of_the_command_line_runs():
    assert set(PROFILES) == set(DISK_GB)


def test_help_needs_no_package():
    """It answers before anything is installed: with site-packages switched off."""
    run = subprocess.run(
        [sys.executable, "-S", "-m", "difflt_core.bootstrap", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and f"--profile {{{','.join(PROFILES)}}}" in run.stdout.replace(
        "\n", ""
    )
    assert all(option in run.stdout for option in build_parser()._option_string_actions)


def test_paths_are_relative_to_where_it_is_called(tmp_path):
    (tmp_path / "link.sh").symlink_to(ROOT / "run_all.sh")
    command = ["bash", "link.sh", "--dry-run", "--profile", "smoke", "--only", "00"]
    command += ["--out", "results", "--data-dir", "../mine"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert f"'out': '{tmp_path / 'results'}'" in run.stdout
    assert f"'data_dir': '{tmp_path.parent / 'mine'}'" in run.stdout


@pytest.mark.parametrize("option", ["--list", "--dry-run"])
def test_the_plan_needs_no_environment_and_makes_none(option, tmp_path):
    """Of a checkout without one, on a Python without packages."""
    home = tmp_path / "checkout"
    kept = shutil.ignore_patterns(".venv*", ".git", "runs", "figures", "__pycache__", "data")
    shutil.copytree(ROOT, home, ignore=kept)
    plain = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [sys.executable, "-S", "-m", "difflt_core.bootstrap", option, "--set", "tau=1"]
    run = subprocess.run(command, cwd=home, env=plain, capture_output=True, text=True)
    assert run.returncode == 0 and "05_long_tail_results" in run.stdout, run.stderr
    assert not (home / ".venv").exists()


def test_a_notebooks_own_parameter_reaches_it_alone(capsys, tmp_path):
    options = ("--profile", "smoke", "--set", "ratios=[20, 10]", "--out", str(tmp_path))
    assert call("--dry-run", "--only", "05,07", *options) == 0
    first, second = capsys.readouterr().out.strip().splitlines()
    assert "'ratios': [20, 10]" in first and "ratios" not in second
    assert method.main([*options, "--device", "cpu"]) == 2
    assert "ratios is a parameter of notebook 05 or 08 or 10 alone" in capsys.readouterr().err


def test_a_parameter_without_a_place_of_its_own_goes_into_overrides():
    book = next(n for n in notebooks.find_notebooks() if n.number == "05")
    given = {"seeds": [3], "tau": 1.0, "diffusion.lr": 3e-4}
    rest = {"tau": 1.0, "diffusion.lr": 3e-4}
    assert book.arguments(given) == {"seeds": [3], "overrides": rest}


@pytest.mark.parametrize("module, more", [(method, []), (baseline, ["--set", "method=bsce"])])
def test_missing_data_are_a_line_of_a_program(module, more, tmp_path, capsys):
    where = ["--data-dir", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert module.main(["--profile", "cifar10", *where, *more]) == 1
    assert "expected the folder" in capsys.readouterr().err


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A finished .venv of two small locks, whose interpreter is this one."""
    locks = {test: tmp_path / f"{test}.lock" for test in (False, True)}
    for test, lock in locks.items():
        lock.write_text(f"packages of {test}")
    monkeypatch.setattr(bootstrap, "_LOCKS", locks)
    monkeypatch.setattr(bootstrap, "PYTHON", Path(sys.executable))
    monkeypatch.setattr(bootstrap, "MARKER", tmp_path / "marker")
    return locks, tmp_path / "marker"


def test_a_changed_lock_is_installed_again(environment):
    locks, marker = environment
    assert bootstrap._finished_venv(False) is None  # no marker yet
    marker.write_text(*bootstrap._wanted(False))
    assert bootstrap._finished_venv(False) == sys.executable
    assert bootstrap._finished_venv(True) is None  # the packages of the tests are missing
    marker.write_text(*bootstrap._wanted(True))
    assert bootstrap._finished_venv(False) == bootstrap._finished_venv(True) == sys.executable
    locks[True].write_text("others")
    assert bootstrap._finished_venv(True) is None and bootstrap._finished_venv(False) is None


def test_an_environment_outlives_a_failed_addition(environment, monkeypatch, capsys):
    """Without a network `--test` must not cost what `./run_all.sh` has."""
    _, marker = environment
    marker.write_text(*bootstrap._wanted(False))
    monkeypatch.setattr(bootstrap, "_only_one", contextlib.nullcontext)
    monkeypatch.setattr(bootstrap, "_call", lambda command: pytest.fail(f"called {command}"))

    def no_network(lock):
        raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(bootstrap, "_install", no_network)
    assert bootstrap._venv_python(True) is None
    assert "setting up .venv failed" in capsys.readouterr().err
    assert bootstrap._finished_venv(False) == sys.executable


def test_an_environment_in_use_is_not_made_anew(environment, tmp_path, monkeypatch, capsys):
    """Another lock, and a run that still works in .venv."""
    interpreter = tmp_path / ".venv" / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    interpreter.symlink_to(sys.executable)
    monkeypatch.setattr(bootstrap, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(bootstrap, "_only_one", contextlib.nullcontext)
    monkeypatch.setattr(bootstrap, "_call", lambda command: pytest.fail(f"called {command}"))
    command = [interpreter, "-c", "print(flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        run.stdout.readline()
        assert bootstrap._venv_python(False) is None
        assert f"in use by process {run.pid}. End that" in capsys.readouterr().err
        run.communicate(b"\n")
    assert bootstrap._at_work() == []


def test_a_checkout_that_is_read_only_says_what_to_do(monkeypatch, capsys):
    def refused():
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(bootstrap, "_only_one", refused)
    assert bootstrap._venv_python(False) is None
    assert "Activate an environment that has requirements.lock" in capsys.readouterr().err


def test_an_old_python_is_refused(tmp_path):
    for name in ("python", "python3"):
        fake = tmp_path / name
        fake.write_text(
            '#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" && exit 0\nexit 1\n'
        )
        fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    for tool in ("bash", "dirname", "readlink"):
        (tmp_path / tool).symlink_to(os.popen(f"command -v {tool}").read().strip())
    run = subprocess.run(
        ["bash", "run_all.sh"],
        cwd=ROOT,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and "needs Python 3.11 to 3.14, found Python 3.9.1" in run.stderr


def _notebook(folder, source):
    cells = [
        {
            "cell_type": "code",
            "id": "a",
            "metadata": {"tags": ["parameters"]},
            "execution_count": None,
            "outputs": [],
            "source": 'profile = "smoke"\ndevice = "auto"\nout = ""\ndata_dir = ""',
        },
        {
            "cell_type": "code",
            "id": "b",
            "metadata": {},
            "execution_count": None,
            "outputs": [],
            "source": source,
        },
    ]
    path = folder / "42_made_here.ipynb"
    path.write_text(
        json.dumps(
            {
                "cells": cells,
                "nbformat": 4,
                "nbformat_minor": 5,
                "metadata": {
                    "kernelspec": {
                        "name": "python3",
                        "display_name": "Python 3",
                        "language": "python",
                    },
                    "difflt": {"items": ["table99"], "minutes": {}},
                },
            }
        )
    )
    return notebooks.Notebook(path)


@pytest.fixture
def parameters(tmp_path):
    (tmp_path / "runs" / "smoke").mkdir(parents=True)
    return {
        "profile": "smoke",
        "device": "cpu",
        "out": str(tmp_path),
        "data_dir": str(tmp_path / "data"),
    }


def test_a_failing_notebook_names_cell_error_and_copy(tmp_path, parameters):
    notebook = _notebook(tmp_path, "raise ValueError('imb_ratio: expected >= 1')")
    with pytest.raises(runner.NotebookFailed) as failure:
        runner.execute(notebook, parameters)
    copy = tmp_path / "runs" / "smoke" / "42_made_here.ipynb"
    assert "42_made_here.ipynb, cell 3: ValueError: imb_ratio: expected >= 1" in str(failure.value)
    assert f"executed copy: {copy}" in str(failure.value) and copy.exists()
    assert len(str(failure.value).splitlines()) <= 4


def test_a_failing_notebook_ends_the_run(tmp_path, monkeypatch, capsys):
    done = []

    def execute(notebook, *_):
        done.append(notebook.number)
        if notebook.number == "01":
            raise runner.NotebookFailed("01, cell 3: no")
        return 1.0

    monkeypatch.setattr(runner, "execute", execute)
    command = [
        "--profile",
        "smoke",
        "--out",
        str(tmp_path),
        "--only",
        "00,01,02",
        "--device",
        "cpu",
    ]
    assert runner.main(command) == 1 and done == ["00", "01"]
    assert "01, cell 3: no" in capsys.readouterr().err
    assert (tmp_path / "runs" / "smoke" / "index.html").exists()


def test_a_full_disk_is_a_line(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runner, "execute", full)
    monkeypatch.setattr(runner, "write_page", full)
    command = ["--profile", "smoke", "--out", str(tmp_path), "--only", "00", "--device", "cpu"]
    assert runner.main(command) == 1
    told = capsys.readouterr().err
    assert "No space left on device; mend that" in told and "no page: " in told


def test_gc_lists_and_verify_finds(tmp_path, capsys):
    store = Store(tmp_path / "runs" / "cache")
    folder = store.root / "made" / "abc"
    folder.mkdir(parents=True)
    assert runner.main(["--gc", "--out", str(tmp_path)]) == 0 and folder.exists()
    assert runner.main(["--verify", "--out", str(tmp_path)]) == 1  # it has no manifest
    assert not folder.exists() and list(folder.parent.glob("abc.corrupt-*"))
    assert runner.main(["--gc", "remove", "--out", str(tmp_path)]) == 0
    assert not list(folder.parent.glob("abc.corrupt-*"))


def test_a_second_run_says_that_it_waits(tmp_path, capsys):
    lock = tmp_path / "05.lock"
    first = open(lock, "w")  # as another process holds it
    fcntl.flock(first, fcntl.LOCK_EX)
    released = threading.Timer(1.5, first.close)
    released.start()
    with runner._alone(lock):
        assert "another run is at this notebook" in capsys.readouterr().err
    released.join()


def test_links_of_an_executed_copy_lead_from_where_it_lies(tmp_path):
    """From runs/<profile>/, where notebooks/ was one folder up."""
    cells = [
        nbformat.v4.new_markdown_cell("![p](../figures/demo/figure04.png), [d](../docs/data.md)")
    ]
    copy = tmp_path / "runs" / "smoke" / "42_made_here.ipynb"
    copy.parent.mkdir(parents=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), copy)
    runner._to_html(copy)
    runner._to_html(copy)  # as often as one likes
    source = nbformat.read(copy, 4).cells[0].source
    assert source == "![p](../../figures/demo/figure04.png), [d](../../docs/data.md)"
    assert 'src="../../figures/demo/figure04.png"' in copy.with_suffix(".html").read_text()


def test_a_failing_error_of_many_lines_is_told_whole(tmp_path, parameters):
    lines = "2 files cannot be read:\\n  a.jpg\\n  b.jpg"
    with pytest.raises(runner.NotebookFailed) as failure:
        runner.execute(_notebook(tmp_path, f"raise ValueError('{lines}')"), parameters)
    assert "  a.jpg\n  b.jpg" in str(failure.value)


def test_a_folder_may_have_braces(tmp_path, parameters):
    """Which papermill would fill in."""
    notebook, out = _notebook(tmp_path, "print(out)"), tmp_path / "a {new} one"
    assert runner.execute(notebook, parameters | {"out": str(out)}) > 0
    assert (out / "runs" / "smoke" / "42_made_here.ipynb").exists()


def test_a_finished_notebook_is_not_run_again_until_something_changes(tmp_path, parameters):
    source = "from pathlib import Path\nf = Path(out) / 'count'\nf.write_text(f.read_text() + 'x' if f.exists() else 'x')"
    notebook = _notebook(tmp_path, source)
    count = tmp_path / "count"
    assert runner.execute(notebook, parameters) > 0 and runner.execute(notebook, parameters) is None
    assert count.read_text() == "x"
    assert runner.execute(notebook, parameters, force=True) > 0 and count.read_text() == "xx"
    assert (tmp_path / "runs" / "smoke" / "42_made_here.html").exists()
    (tmp_path / "runs" / "smoke" / "42_made_here.ipynb").write_text("damaged")
    assert runner.execute(notebook, parameters) > 0 and count.read_text() == "xxx"
    assert runner.execute(notebook, parameters, data="other files in the folder") > 0
    assert runner.execute(_notebook(tmp_path, source + "\nprint(1)"), parameters) > 0


def test_a_variant_finds_what_another_folder_has_trained(tiny, tmp_path, monkeypatch):
    first = Pipeline(tiny, tmp_path / "first", "cpu", progress=False).data()
    monkeypatch.setenv("DIFFLT_FROM", str(tmp_path))
    options = build_parser().parse_args(["--out", "variant", "--cache", "first/runs/cache"])
    set_environment(options)
    assert Pipeline(tiny, options.out, "cpu", progress=False).data().path == first.path
    assert upkeep(options.out, verifying=True, remove=False) == 0
    assert upkeep(options.out, verifying=False, remove=True) == 1 and first.path.exists()
    assert not (tmp_path / "variant" / "runs").exists()
