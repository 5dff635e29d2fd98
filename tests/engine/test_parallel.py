"""Two processes (gloo) against one: the same loss trajectory, and identical images."""

import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

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


def run(config, out, n):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    script = out / "run.py"
    out.mkdir(exist_ok=True)
    script.write_text(_RUN)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(n), "--master-port", str(port)]
    command = [
        sys.executable,
        *(launch if n > 1 else []),
        str(script),
        config.model_dump_json(),
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for stage, name in (("diffusion", "loss"), ("samples", "images"), ("classifier", "loss")):
        made = [np.load(path) for path in (out / "runs" / "cache" / stage).glob(f"*/{name}.npy")]
        found[stage] = max(made, key=len)  # the whole generator, where a plain part was made first
    return found


@pytest.mark.parametrize(
    "kind, reading, plain_share",
    [("eps", "own", 0.0), ("edm", "other", 0.0), ("edm", "sample", 0.5)],
)
def test_two_processes_are_one(tiny, tmp_path, kind, reading, plain_share):
    from difflt_core import vary

    changes = {
        "diffusion.parameterisation": kind,
        "diffusion.aid_reading": reading,
        "diffusion.plain_share": plain_share,
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
    assert not list(tmp_path.rglob("*.work"))


def test_a_stage_of_the_main_process_waits_for_nobody(tmp_path, monkeypatch):
    from difflt_core.engine import parallel
    from difflt_core.engine.artifacts import Stage, Store

    seen = {}

    def build(work, config, inputs, context):
        seen[config["shared"]] = parallel.n_processes()

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(parallel, "barrier", lambda: None)
    monkeypatch.setattr(parallel, "from_main", lambda value: value)
    for shared in (True, False):
        Store(tmp_path).get(Stage("any", build, parallel=shared), {"shared": shared})
    assert seen == {True: 2, False: 1} and parallel.n_processes() == 2
