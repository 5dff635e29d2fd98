"""Code that a process has put in the place of the package's is refused before it trains anything."""

import functools
from collections.abc import Callable

import pytest

from difflt_core import Pipeline
from difflt_core.engine.artifacts import Stage, Store
from difflt_core.engine.device import Compiled
from difflt_core.engine.live_code import refuse_replaced
from difflt_core.experiments import pipeline as stages
from difflt_core.generation import losses, training

BUILD = stages.build_diffusion


def mine(*_args):
    return 0.0


def compiles_and_diverges(*_args):
    Compiled(abs, "a network")
    raise ValueError("diverged")


def new_code(monkeypatch):
    """As %autoreload has it: the same function, with other code."""
    monkeypatch.setattr(losses.denoising_loss, "__code__", mine.__code__)


REPLACED = {
    "a function of its own module": lambda m: m.setattr(training, "_ask", mine),
    "one by another name": lambda m: m.setattr(training, "denoising_loss", mine),
    "a decorated one": lambda m: m.setattr(
        training, "seen_images", functools.wraps(training.seen_images)(mine)
    ),
    "a method": lambda m: m.setattr(training.StepLoss, "_aid", mine),
    "a method that was not there": lambda m: m.setattr(training.StepLoss, "mine", mine, False),
    "a number": lambda m: m.setattr(training, "_SAMPLE_STEPS", 3),
    "an entry of a table": lambda m: m.setitem(training.AID_LOSSES, "hinge", mine),
    "code": new_code,
}


@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED.keys())
def test_what_is_replaced_is_refused(monkeypatch, replace):
    refuse_replaced(BUILD)
    with monkeypatch.context() as patch:
        replace(patch)
        with pytest.raises(ValueError, match="replaced in this process.* restart the kernel"):
            refuse_replaced(BUILD)
        refuse_replaced(stages.build_data)  # which uses none of it
    refuse_replaced(BUILD)


def test_a_class_of_python_may_note_something(monkeypatch):
    """As some do of those that are asked about their subclasses."""
    refuse_replaced(BUILD)
    monkeypatch.setattr(Callable, "noted", 1, raising=False)
    refuse_replaced(BUILD)


def test_what_a_failed_stage_compiled_is_not_taken_for_new_code(tmp_path):
    """Also where the notebook's own process builds it, as it does with one GPU."""
    refuse_replaced(BUILD)
    with pytest.raises(ValueError, match="diverged"):
        Store(tmp_path).get(Stage("numbers", compiles_and_diverges), {})
    refuse_replaced(BUILD)


def test_nothing_is_trained_or_found_with_code_of_the_process(tiny, tmp_path, monkeypatch):
    p = Pipeline(tiny, tmp_path, "cpu", progress=False)
    p.data()
    monkeypatch.setattr(training, "denoising_loss", mine)
    with pytest.raises(ValueError, match="training.denoising_loss was replaced"):
        p.train_diffusion()
    assert not list(tmp_path.glob("runs/cache/diffusion/*"))
