"""Every method trains alone and on real and generated images, and resumes exactly."""

import shutil

import numpy as np
import pytest
import torch

from difflt_core import Pipeline
from difflt_core.data.long_tail import load_split
from difflt_core.experiments.results import accuracy
from difflt_core.recognition.classifier import load_classifier, predict

METHODS = ("ce", "cb", "bsce", "ldam", "paco", "gpaco", "ride")


@pytest.fixture
def pipeline(trained, tmp_path):
    """A fresh store with the trained generator's artifacts."""
    shutil.copytree(trained.store.root, tmp_path / "runs" / "cache")
    return Pipeline(trained.config, tmp_path, "cpu", progress=False)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_alone_and_with_generated_images(pipeline, method):
    p = pipeline.vary({"classifier.method": method, "classifier.queue_size": 40})
    real, mixed = (accuracy(p, a) for a in (p.train_on_real(), p.train_classifier()))
    assert 0 <= real["overall"] <= 100 and 0 <= mixed["overall"] <= 100
    loss = p.train_classifier().array("loss")
    assert np.isfinite(loss).all() and len(loss) == p.config.classifier.n_steps


@pytest.mark.parametrize("method", ["ce", "paco", "gpaco", "ride"])
def test_a_killed_training_resumes_to_the_same_bytes(
    pipeline, tmp_path, dies_at, checkpoint_each_step, method
):
    changes = {
        "n_steps": 12,
        "method": method,
        "queue_size": 40,
        "flip": True,
    }
    p = pipeline.vary({f"classifier.{k}": v for k, v in changes.items()})
    other = Pipeline(p.config, tmp_path / "again", "cpu", progress=False)
    whole = p.train_on_real()
    dies_at(8)
    with pytest.raises(KeyboardInterrupt):
        other.train_on_real()
    assert list((tmp_path / "again").rglob("checkpoint.safetensors"))
    resumed = other.train_on_real()
    assert np.array_equal(resumed.array("loss"), whole.array("loss"))
    for name, tensor in whole.tensors("model").items():
        assert torch.equal(tensor, resumed.tensors("model")[name]), name


def test_evaluation_twice_gives_the_same(trained):
    model = load_classifier(trained.train_extractor())
    images = load_split(trained.data(), "test").images
    assert np.array_equal(predict(model, images), predict(model, images)) and not model.training
