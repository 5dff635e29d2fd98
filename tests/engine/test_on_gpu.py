"""What only a GPU can show; skipped where there is none."""

import shutil

import numpy as np
import pytest
import torch

from difflt_core import Pipeline, vary
from difflt_core.data.augment import POLICIES
from difflt_core.engine import loop

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
# Each stage with settings that those which it needs do not have.
STAGES = {
    "train_extractor": {"extractor.lr": 0.02, "extractor.policy": "randaugment"},
    "train_diffusion": {"diffusion.alpha": 0.2},
    "train_sau": {"sau.flip": True},
}
SAU_VIEWS = {"sau.policy": "autoaugment", "sau.second_policy": "contrastive"}


@pytest.fixture(scope="module")
def on_gpu(tiny, tmp_path_factory):
    """All that the stages need. The networks are of a kind that is compiled."""
    changes = {"data.image_size": 32, "diffusion.preset": "small32", "extractor.arch": "resnet32"}
    changes |= {"diffusion.batch_size": 16, "extractor.precision": "auto"}
    p = Pipeline(vary(tiny, changes), tmp_path_factory.mktemp("gpu"), "cuda", progress=False)
    p.synthetic()
    return p


def beside(on_gpu, changes, folder) -> Pipeline:
    """A variant in a cache of its own that has all but the stage itself."""
    shutil.copytree(on_gpu.store.root, folder / "runs" / "cache")
    return Pipeline(vary(on_gpu.config, changes), folder, "cuda", progress=False)


@pytest.mark.parametrize("stage", STAGES)
def test_no_step_synchronises(on_gpu, monkeypatch, tmp_path, stage):
    """By CUDA's own watch, compiled, from the second step on."""
    factor = loop.lr_factor

    def watched(schedule, step, *rest):
        torch.cuda.set_sync_debug_mode("error" if 1 <= step <= 8 else "default")
        return factor(schedule, step, *rest)

    monkeypatch.setattr(loop, "lr_factor", watched)
    monkeypatch.setenv("DIFFLT_COMPILE", "default")
    try:
        getattr(beside(on_gpu, STAGES[stage] | SAU_VIEWS, tmp_path), stage)()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_synchronises(policy):
    x = torch.rand(64, 3, 32, 32, device="cuda") * 2 - 1
    torch.cuda.set_sync_debug_mode("error")
    try:
        POLICIES[policy](x, True, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_goes_on_to_the_same_bits(
    on_gpu, monkeypatch, dies_at, checkpoint_each_step, tmp_path, stage
):
    monkeypatch.setenv("DIFFLT_DETERMINISTIC", "1")
    curves = []
    for killed in (False, True):
        pipeline = beside(on_gpu, STAGES[stage] | SAU_VIEWS, tmp_path / str(killed))
        if killed:
            dies_at(7)
            with pytest.raises(KeyboardInterrupt):
                getattr(pipeline, stage)()
        curves.append(np.array(getattr(pipeline, stage)().array("loss")))
    np.testing.assert_array_equal(*curves)
