"""Long chains first, and a time left that learns how long stages take here."""

import numpy as np
import pytest

from difflt_core import Pipeline, vary
from difflt_core.engine.scheduler import Planner
from difflt_core.engine.time_left import TimeLeft, cost_to_end, costs


def test_long_chains_start_first(tiny, tmp_path, planned):
    nodes = planned(tiny, tmp_path, [{"seed": 0}, {"seed": 1}]).nodes
    first = max(nodes, key=cost_to_end(nodes).__getitem__)
    assert nodes[first].stage.name == "data"
    order = sorted(nodes, key=cost_to_end(nodes).__getitem__, reverse=True)
    place = {nodes[key].stage.name: i for i, key in enumerate(order)}  # the last of each stage
    assert place["extractor"] < place["diffusion"] < place["samples"] < place["classifier"]


def test_a_training_counts_by_the_steps_that_it_makes_itself(tiny, tmp_path):
    changes = {"diffusion.plain_share": 0.9, "diffusion.n_steps": 100, "diffusion.alpha": 0.0}
    changes |= {"diffusion.schedule": "trapezoid"}
    planner = Planner(Pipeline(vary(tiny, changes), tmp_path, "cpu", progress=False).store)
    for steps in (100, 50):
        p = Pipeline(vary(tiny, changes | {"diffusion.n_steps": steps}), tmp_path, "cpu", False)
        p.store = planner
        p.train_diffusion()
    own = costs(planner.nodes)
    made = [own[k] for k, n in planner.nodes.items() if n.stage.name == "diffusion"]
    assert np.allclose(np.array(made) / made[0], [1, 10 / 90, 45 / 90, 5 / 90])
    ends = {k: n for k, n in planner.nodes.items() if "plain" in n.inputs}  # the rest is there
    alone = [cost for k, cost in costs(ends).items() if ends[k].stage.name == "diffusion"]
    assert np.allclose(alone, [made[1], made[3]])


SMALL, LARGE = {"classifier.arch": "small_cnn"}, {"classifier.arch": "resnet32"}


@pytest.fixture
def classifiers(tiny, tmp_path, planned):
    """Keys of four final classifiers that are missing: two of a small network, two of a large one."""
    variants = [changes | {"seed": seed} for changes in (SMALL, LARGE) for seed in (0, 1)]
    nodes = planned(tiny, tmp_path, variants).nodes
    missing = {key: node for key, node in nodes.items() if node.stage.name == "classifier"}
    return TimeLeft(missing), *missing


def test_the_time_left_is_that_of_like_networks(classifiers):
    """A small network takes 10 seconds and a large one 90: 200 together, of which 100 have passed."""
    time_left, small, other_small, large, other_large = classifiers
    assert time_left.share == 0
    for _ in range(10):
        time_left.look({small: (0.5, 0.0)}, (), 1.0)
    assert time_left.share == pytest.approx(1 / 8)  # as if all four were alike
    time_left.look({}, (small,), 0.0)
    for second in range(90):
        time_left.look({large: (second / 90, 0.0)}, (small,), 1.0)
    time_left.look({}, (small, large), 0.0)
    assert time_left.share == pytest.approx(0.5, abs=0.03)
    time_left.look({}, (small, large, other_small, other_large), 0.0)
    assert time_left.share == 1


def test_two_at_once_take_the_time_of_one(classifiers):
    time_left, *keys = classifiers
    for _ in range(10):
        time_left.look(dict.fromkeys(keys[:2], (0.5, 0.0)), (), 1.0)
    assert time_left.share == pytest.approx(1 / 4)


def test_what_an_earlier_run_had_done_took_no_time(classifiers):
    """Of a training that goes on at a half, a tenth of it in ten seconds: 340 more to come."""
    time_left, first, *_ = classifiers
    for second in range(11):
        time_left.look({first: (0.5 + second / 100, 0.5)}, (), 1.0 if second else 0.0)
    assert time_left.share == pytest.approx(10 / (10 + 340))
