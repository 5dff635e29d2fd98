"""Shared by all tests: one minute-sized configuration, and one trained pipeline of it."""

import os
import subprocess
import tarfile
from unittest import mock

import pytest

from difflt_core import Pipeline, load_config, vary
from difflt_core.engine import loop
from difflt_core.engine.provenance import ROOT

# What `./run_all.sh --test quick` runs: formulas, words and rules, no training.
QUICK = {
    "test_accuracy",
    "test_augment",
    "test_claims",
    "test_differences",
    "test_code_version",
    "test_config",
    "test_items",
    "test_long_tail",
    "test_losses",
    "test_methods",
    "test_noise",
    "test_numbers",
    "test_page",
    "test_rooms",
    "test_sample_types",
    "test_sentences",
}


def pytest_collection_modifyitems(items):
    for item in items:
        slow = {"pipeline", "trained", "undisturbed"} & set(item.fixturenames)
        if item.path.stem in QUICK and not slow and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.quick)


@pytest.fixture(autouse=True)
def own_environment():
    """A run called in this process leaves its address of workers to no other test."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(autouse=True)
def may_replace_code(request):
    """Tests put other functions into the package's, which the store refuses of anybody else."""
    if request.node.path.stem == "test_live_code":
        yield
        return
    with mock.patch("difflt_core.engine.artifacts.refuse_replaced"):
        yield


@pytest.fixture(scope="session")
def committed(tmp_path_factory):
    """A folder with figures/ as it is committed: a run of one's own may have written others over it."""
    folder = tmp_path_factory.mktemp("committed")
    archive = folder / "figures.tar"
    command = ["git", "archive", "--output", str(archive), "HEAD", "figures"]
    if subprocess.run(command, cwd=ROOT, capture_output=True).returncode:
        pytest.skip("not a git checkout")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return folder


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


@pytest.fixture
def dies_at(monkeypatch):
    """A call dies_at(k) stops the next training, whatever it trains, once, before its step k."""

    def arm(k: int) -> None:
        factor = loop.lr_factor

        def dying(schedule, step, *rest):
            if step == k:
                monkeypatch.setattr(loop, "lr_factor", factor)
                raise KeyboardInterrupt
            return factor(schedule, step, *rest)

        monkeypatch.setattr(loop, "lr_factor", dying)

    return arm


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    pipeline = Pipeline(tiny, tmp_path_factory.mktemp("trained"), "cpu", progress=False)
    pipeline.train_classifier()
    return pipeline
