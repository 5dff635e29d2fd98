"""Two processes (gloo) against one: the same loss trajectory, and identical images."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from difflt_core import Pipeline, vary

_RUN = """
import json, sys
import torch
torch.set_num_threads(1)
from difflt_core import Pipeline, RunConfig
from difflt_core.engine import parallel
parallel.start("cpu")
p = Pipeline(RunConfig.model_validate(json.loads(sys.argv[1])), sys.argv[2], "cpu", progress=False)
p.train_classifier()
"""


def _port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(config, out, n):
    """By n processes; a single one is this."""
    if n == 1:
        Pipeline(config, out, "cpu", progress=False).train_classifier()
    else:
        out.mkdir(exist_ok=True)
        script = out / "run.py"
        script.write_text(_RUN)
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(n)]
        launch += ["--master-port", str(_port()), str(script), config.model_dump_json(), str(out)]
        done = subprocess.run([sys.executable, *launch], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for stage, name in (("diffusion", "loss"), ("samples", "images"), ("classifier", "loss")):
        made = [np.load(path) for path in (out / "runs" / "cache" / stage).glob(f"*/{name}.npy")]
        found[stage] = max(made, key=len)  # the whole generator, where a plain part was made first
    return found


@pytest.mark.parametrize(
    "kind, reading, plain_share, augment",
    [("eps", "own", 0.0, 0.0), ("edm", "other", 0.0, 0.15), ("edm", "sample", 0.5, 0.15)],
)
def test_two_processes_are_one(tiny, tmp_path, kind, reading, plain_share, augment):
    changes = {
        "diffusion.parameterisation": kind,
        "diffusion.aid_reading": reading,
        "diffusion.plain_share": plain_share,
        "diffusion.augment": augment,
        "diffusion.schedule": "trapezoid",
        "diffusion.alpha": 0.1,
        "sampling.batch_size": 50,
        "diffusion.aid_min_alpha_bar": 0.05,
    }
    config = vary(tiny, changes)
    alone = run(config, tmp_path / "alone", 1)
    together = run(config, tmp_path / "together", 2)
    assert (alone["diffusion"] > 0).any(axis=0).all(), "a term of the loss was never there"
    # Two halves of a batch round differently from the whole, and AdamW's first steps make it grow.
    pairs = (together["diffusion"], alone["diffusion"])
    np.testing.assert_allclose(*(loss[:8] for loss in pairs), rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(*pairs, rtol=5e-3, atol=1e-6)

    shared = tmp_path / "shared"  # the same generator, sampled by two
    shutil.copytree(tmp_path / "alone", shared)
    for stage in ("samples", "types", "classifier"):
        shutil.rmtree(shared / "runs" / "cache" / stage)
    again = run(config, shared, 2)
    assert np.array_equal(again["samples"], alone["samples"])
    assert np.array_equal(again["classifier"], alone["classifier"])
    assert not list(tmp_path.rglob("*.work-*"))


def test_a_stage_of_the_main_process_waits_for_nobody(tmp_path, monkeypatch):
    from difflt_core.engine import parallel
    from difflt_core.engine.artifacts import Stage, Store

    seen = {}

    def build(work, config, inputs, context):
        seen[config["shared"]] = parallel.n_processes()

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(parallel, "barrier", lambda: None)
    monkeypatch.setattr(parallel, "_word", lambda said: said)
    for shared in (True, False):
        Store(tmp_path).get(Stage("any", build, parallel=shared), {"shared": shared})
    assert seen == {True: 2, False: 1} and parallel.n_processes() == 2


def launch(out, *settings):
    """docs/scaling.md's command for several processes, at smoke size on two of a CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(_port()), "-m"]
    command += ["difflt_core.experiments.method", "--profile", "smoke", "--device", "cpu"]
    command += [part for setting in settings for part in ("--set", setting)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, "--out", str(out)], **options)


@pytest.mark.slow
def test_every_group_finishes(tmp_path):
    """Two in the suite; DIFFLT_GROUPS=20 asks longer for races, 7 minutes."""
    for i in range(int(os.environ.get("DIFFLT_GROUPS", "2"))):
        short = ("n_extractor_steps=20", "n_diffusion_steps=20", "n_classifier_steps=20")
        group = launch(tmp_path / str(i), *short)
        said = group.communicate(timeout=180)[0]
        assert group.returncode == 0, f"run {i}: {said[-3000:]}"
        built = {p.parent.parent.name for p in (tmp_path / str(i)).rglob("manifest.json")}
        assert built == {"data", "extractor", "diffusion", "samples", "types", "classifier"}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("when", ["diffusion/*.work-*", "extractor/*.work-*"])
def test_a_rank_that_is_killed_ends_the_group(tmp_path, rank, when, children_of):
    """In a stage that all share, and in one that the main process builds while the others wait."""
    group = launch(tmp_path)
    try:
        while not list(tmp_path.glob(f"runs/cache/{when}")):
            assert group.poll() is None
            time.sleep(0.05)
        environments = {p: _environment(p) for p in children_of(group.pid)}
        victim = next(p for p, e in environments.items() if f"RANK={rank}" in e)
        os.kill(victim, signal.SIGKILL)
        said = group.communicate(timeout=60)[0]
    finally:
        group.kill()
    assert group.returncode != 0
    assert f"Signal 9 (SIGKILL) received by PID {victim}" in said
    assert not any(os.path.exists(f"/proc/{p}") for p in environments)


def _environment(pid: int) -> list[str]:
    return open(f"/proc/{pid}/environ").read().split("\0")
