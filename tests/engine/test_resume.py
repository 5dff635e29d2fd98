"""A run killed with SIGKILL continues from its last checkpoint to the same bytes."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from difflt_core import Pipeline, vary
from difflt_core.engine.progress import Context

# A plain part of six steps, and a second part that goes on to 12; a checkpoint at each.
_IN_TWO_PARTS = {"diffusion.plain_share": 0.5, "diffusion.schedule": "trapezoid"}
_KINDS = ("eps", "edm", "edm in two parts")
_RUN = """
import json, sys
import torch
torch.set_num_threads(1)
from difflt_core import Pipeline, RunConfig
p = Pipeline(RunConfig.model_validate(json.loads(sys.argv[1])), sys.argv[2], "cpu", progress=False)
p.train_classifier()
"""


def start(config, out, every_s=0):
    command = [sys.executable, "-c", _RUN, config.model_dump_json(), str(out)]
    return subprocess.Popen(command, env=os.environ | {"DIFFLT_CHECKPOINT_S": str(every_s)})


@pytest.fixture(scope="module", params=_KINDS)
def config(request, tiny):
    parts = _IN_TWO_PARTS if "parts" in request.param else {}
    return vary(tiny, {"diffusion.parameterisation": request.param[:3], **parts})


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, built):
    """What a run of a configuration builds; each is run once."""

    @functools.cache
    def of(config):
        out = tmp_path_factory.mktemp("undisturbed")
        assert start(config, out).wait() == 0
        return built(out)

    return of


@pytest.fixture
def undisturbed(config, whole_run):
    return whole_run(config)


@pytest.mark.parametrize(
    "config, moment",
    [("eps", "first"), ("edm", "second"), *((_KINDS[2], m) for m in ("first", "second"))],
    indirect=["config"],
)
def test_sigkill_in_diffusion_training(config, undisturbed, built, tmp_path, moment):
    """At its first or second checkpoint."""
    work = tmp_path / "runs" / "cache" / "diffusion"
    run = start(config, tmp_path)
    seen = set()
    while len(seen) < (1 if moment == "first" else 2):
        assert run.poll() is None, "the run ended before it could be killed"
        for path in work.glob("*.work-*/checkpoint.safetensors"):
            try:
                seen.add(path.stat().st_mtime_ns)
            except FileNotFoundError:
                pass
        time.sleep(0.001)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert not list(tmp_path.glob("runs/cache/samples/*/manifest.json")), "killed too late"
    assert start(config, tmp_path).wait() == 0
    assert built(tmp_path) == undisturbed
    assert not list(tmp_path.rglob("*.tmp")), "a half-written file was left"


def test_a_run_that_is_asked_to_end_leaves_a_checkpoint_first(tiny, tmp_path):
    """SIGTERM, just after a checkpoint, with the next one five seconds away."""
    longer = vary(tiny, {"diffusion.n_steps": 4000})
    run = start(longer, tmp_path, every_s=5)
    work = tmp_path / "runs" / "cache" / "diffusion"
    while not (first := list(work.glob("*.work-*/checkpoint.safetensors"))):
        assert run.poll() is None, "the run ended before a checkpoint"
        time.sleep(0.01)
    before = first[0].stat().st_mtime_ns
    run.terminate()
    assert run.wait(timeout=60) == -signal.SIGTERM
    assert first[0].stat().st_mtime_ns > before


def test_a_damaged_checkpoint_starts_over(config, undisturbed, built, tmp_path):
    p = Pipeline(config, tmp_path, "cpu", progress=False)
    for key in {name.split("/")[1] for name in undisturbed if name.startswith("diffusion/")}:
        work = tmp_path / "runs" / "cache" / "diffusion" / f"{key}.work-killed"
        work.mkdir(parents=True)
        (work / "checkpoint.safetensors").write_bytes(b"not a checkpoint")
    with pytest.warns(UserWarning, match="cannot be read .* going on without it"):
        p.train_diffusion()
    made, wanted = (
        {name: data for name, data in found.items() if name.startswith("diffusion/")}
        for found in (built(tmp_path), undisturbed)
    )
    assert made == wanted


@pytest.mark.parametrize("config", _KINDS[2:], indirect=True)
def test_two_runs_at_once_give_one_result(config, undisturbed, built, tmp_path):
    runs = [start(config, tmp_path) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    assert built(tmp_path) == undisturbed
    assert all(json.loads(m.read_text())["files"] for m in tmp_path.rglob("manifest.json"))


def _trained(work, layout, n_steps: int, stop_after: int | None):
    """A run of the one loop on a small network in a memory layout; it is ended by an error after so many
    steps, or goes on from the checkpoint that is there."""
    from difflt_core.config import DiffusionConfig
    from difflt_core.engine import loop
    from difflt_core.generation.network import make_unet
    from difflt_core.generation.training import _Average

    torch.manual_seed(0)
    net = make_unet("nano", 3, 8, 3).to(memory_format=layout)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
    average = _Average(net, 0.9)

    def step(k: int):
        if k == stop_after:
            raise KeyboardInterrupt
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(k))
        x = x.to(memory_format=layout)
        out = net(x, torch.full((4,), 10), class_labels=torch.tensor([0, 1, 2, 0])).sample
        loss = (out - x).square().mean()
        return loss, loss[None]

    work.mkdir(exist_ok=True)
    recipe = DiffusionConfig(n_steps=n_steps, batch_size=4, warmup_steps=0)
    context = Context(progress=False, checkpoint_s=0)
    loop.run(
        step, net, optimizer, recipe, work=work, identity={}, what="it", setting="it",
        context=context, memory=average,
    )  # fmt: skip
    moments = [optimizer.state[p] for p in net.parameters()]
    return list(net.parameters()), moments, average.ema.shadow_params


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_a_resume_keeps_the_layout_of_weights_moments_and_average(tmp_path, layout):
    """Fused AdamW on a GPU refuses moments with other strides than their weight's, and a CPU drifts."""
    wanted = _trained(tmp_path / "whole", layout, 8, None)
    with pytest.raises(KeyboardInterrupt):
        _trained(tmp_path / "killed", layout, 8, 5)
    found = _trained(tmp_path / "killed", layout, 8, None)
    strange = [p for p in found[0] if p.dim() == 4 and not p.is_contiguous()]
    assert bool(strange) == (layout == torch.channels_last)
    for mine, moments, shadow, *theirs in zip(*found, *wanted, strict=True):
        assert torch.equal(mine, theirs[0]) and torch.equal(shadow, theirs[2])
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(moments[name], theirs[1][name])
            assert moments[name].stride() == mine.stride()
        assert shadow.stride() == mine.stride()
