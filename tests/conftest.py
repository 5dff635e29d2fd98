"""Shared by all tests: one minute-sized configuration, and one trained pipeline of it."""

import pytest

from difflt_core import Pipeline, load_config, vary


@pytest.fixture(scope="session")
def tiny():
    """A configuration whose five stages train in a few seconds."""
    changes = {
        "diffusion.n_steps": 12,
        "extractor.n_steps": 20,
        "classifier.n_steps": 20,
        "data.image_size": 8,
        "sampling.n_steps": 3,
    }
    return vary(load_config("smoke"), changes)


@pytest.fixture
def checkpoint_each_step(monkeypatch):
    """Of the pipelines made in the test, and of the processes it starts."""
    monkeypatch.setenv("DIFFLT_CHECKPOINT_S", "0")


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    pipeline = Pipeline(tiny, tmp_path_factory.mktemp("trained"), "cpu", progress=False)
    pipeline.train_classifier()
    return pipeline
