"""Shared by the tests of runs: what is below a killed one, what one plans."""

import subprocess

import pytest

from difflt_core import Pipeline
from difflt_core.engine.scheduler import Planner


@pytest.fixture
def children_of():
    """children_of(pid): the processes directly below another one, list[int]; deep: all below it."""

    def find(pid: int, deep: bool = False) -> list[int]:
        command = ["pgrep", "-P", str(pid)]
        found = subprocess.run(command, capture_output=True, text=True).stdout.split()
        below = [int(p) for p in found]
        return below + [q for p in below for q in find(p, deep)] if deep else below

    return find


@pytest.fixture(scope="session")
def built():
    """built(out): the bytes of every array and weight of every artifact, by path below the cache."""

    def read(out) -> dict[str, bytes]:
        root = out / "runs" / "cache"
        return {
            str(p.relative_to(root)): p.read_bytes()
            for p in root.rglob("*")
            if p.suffix in (".npy", ".safetensors") and ".work-" not in str(p)
        }

    return read


@pytest.fixture(scope="session")
def planned():
    """A planner of what the final classifiers of variants need."""

    def plan(config, out, variants):
        pipeline = Pipeline(config, out, "cpu", progress=False)
        planner = Planner(pipeline.store)
        for changes in variants:
            variant = pipeline.vary(changes)
            variant.store = planner
            variant.train_classifier()
        return planner

    return plan
