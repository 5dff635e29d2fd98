"""What only a GPU can show; skipped where there is none."""

import numpy as np
import pytest
import torch

from difflt_core import Pipeline, vary
from difflt_core.engine import loop

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
SAU = {"sau.policy": "autoaugment", "sau.second_policy": "contrastive", "sau.flip": True}
STAGES = {"train_extractor": {}, "train_diffusion": {"diffusion.alpha": 0.1}, "train_sau": SAU}


@pytest.fixture(scope="module")
def on_gpu(tiny, tmp_path_factory):
    """Networks of a size that is compiled, at 32 pixels."""
    changes = {"data.image_size": 32, "diffusion.preset": "cifar", "extractor.arch": "resnet32"}
    changes |= {"diffusion.batch_size": 16, "extractor.precision": "auto"}
    return Pipeline(vary(tiny, changes), tmp_path_factory.mktemp("gpu"), "cuda", progress=False)


@pytest.mark.parametrize("stage", STAGES)
def test_no_step_synchronises(on_gpu, monkeypatch, stage):
    """By CUDA's own watch, from the second step on."""
    factor = loop.lr_factor

    def watched(schedule, step, *rest):
        torch.cuda.set_sync_debug_mode("error" if 1 <= step <= 8 else "default")
        return factor(schedule, step, *rest)

    monkeypatch.setattr(loop, "lr_factor", watched)
    try:
        getattr(on_gpu.vary({"seed": 1, **STAGES[stage]}), stage)()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_goes_on_to_the_same_bits(
    on_gpu, monkeypatch, dies_at, checkpoint_each_step, tmp_path, stage
):
    monkeypatch.setenv("DIFFLT_DETERMINISTIC", "1")
    config = vary(on_gpu.config, {"seed": 2, **STAGES[stage]})
    curves = []
    for killed in (False, True):
        pipeline = Pipeline(config, tmp_path / str(killed), "cuda", progress=False)
        if killed:
            dies_at(7)
            with pytest.raises(KeyboardInterrupt):
                getattr(pipeline, stage)()
        curves.append(np.array(getattr(pipeline, stage)().array("loss")))
    np.testing.assert_array_equal(*curves)
