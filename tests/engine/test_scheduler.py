"""The planner derives the graph, builds what is missing once, side by side, to the same bytes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import forkserver
from types import SimpleNamespace

import distributed
import numpy as np
import pytest
from distributed.comm import CommClosedError

from difflt_core import Pipeline, vary
from difflt_core.engine import cluster, scheduler
from difflt_core.engine.artifacts import Store
from difflt_core.engine.cluster import default_jobs
from difflt_core.engine.progress import Context
from difflt_core.engine.scheduler import Planner
from difflt_core.engine.stage_process import in_own_process
from difflt_core.engine.time_left import cost_to_end

VARIANTS = [{"seed": 0}, {"seed": 1}, {"seed": 0, "filtering.keep": "all"}]


def test_the_graph_is_derived_and_shares_what_is_common(tiny, tmp_path, planned):
    planner = planned(tiny, tmp_path, VARIANTS)
    stages = [node.stage.name for node in planner.nodes.values()]
    counts = {name: stages.count(name) for name in set(stages)}
    assert counts == {
        "data": 2,  # each repeat has a draw of its own
        "extractor": 2,
        "diffusion": 2,
        "samples": 2,
        "types": 2,
        "classifier": 3,
    }
    seen = set()
    for key, node in planner.nodes.items():  # in an order in which they can be built
        assert {a.key for a in node.inputs.values()} <= seen
        seen.add(key)
    assert not list(tmp_path.rglob("*.npy"))


def images(pipeline, changes):
    return np.array(pipeline.vary(changes).generate().array("images"))


def test_two_at_a_time_give_the_same_as_one(tiny, tmp_path):
    together, alone = (Pipeline(tiny, tmp_path / n, "cpu", progress=False) for n in ("a", "b"))
    together.build(VARIANTS, jobs=2)
    alone.build(VARIANTS, jobs=1)
    trained = {p.stem for p in (tmp_path / "a").rglob("classifier/*") if p.is_dir()}
    assert len(trained) == 3 and trained == {
        p.stem for p in (tmp_path / "b").rglob("classifier/*") if p.is_dir()
    }
    for changes in VARIANTS:
        assert np.array_equal(images(together, changes), images(alone, changes))
        losses = [p.vary(changes).train_classifier().array("loss") for p in (together, alone)]
        assert np.array_equal(*losses)


@pytest.fixture
def held(monkeypatch):
    """All futures, which somebody goes on holding."""
    found, submit = [], distributed.Client.submit

    def holding(*args, **kwargs):
        found.append(submit(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(distributed.Client, "submit", holding)
    return found


def test_workers_that_two_runs_share_build_for_each(tiny, tmp_path, held):
    """A scheduler keeps what somebody still holds; the second run has a folder of its own, and the
    third lost its folder in between."""
    for out in (tmp_path / "a", tmp_path / "b", tmp_path / "a"):
        Pipeline(tiny, out, "cpu", progress=False).build(VARIANTS[:2], jobs=2, stages=["data"])
        assert len(list((out / "runs" / "cache" / "data").glob("*/manifest.json"))) == 2
        shutil.rmtree(out)
    assert len(held) == 6


def test_what_is_queued_goes_with_an_interrupted_run(tiny, tmp_path, monkeypatch, held):
    """As in a notebook's cell, whose frame keeps the futures; a stage that began may end."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(scheduler, "read_share", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Pipeline(tiny, tmp_path, "cpu", progress=False).build(VARIANTS, jobs=2)
    assert held and {f.status for f in held} <= {"cancelled", "finished"}


def test_a_failing_stage_stops_the_rest_and_says_why(tiny, tmp_path):
    config = vary(tiny, {"diffusion.preset": "cifar", "data.image_size": 12})
    with pytest.raises(
        ValueError, match="preset 'cifar': expected an image size that divides by 8"
    ):
        Pipeline(config, tmp_path, "cpu", progress=False).build(VARIANTS, jobs=2)


_RUN = """
import json, sys
from difflt_core import Pipeline, RunConfig
if __name__ == "__main__":
    config = RunConfig.model_validate(json.loads(sys.argv[1]))
    Pipeline(config, sys.argv[2], "cpu", progress=False).build([{"seed": 0}, {"seed": 1}], jobs=2)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_workers_do_not_outlive_a_killed_parent(tiny, tmp_path, checkpoint_each_step, children_of):
    script = tmp_path / "run.py"
    script.write_text(_RUN)
    config = vary(tiny, {"diffusion.n_steps": 5000})
    run = subprocess.Popen([sys.executable, str(script), config.model_dump_json(), str(tmp_path)])
    while not list(tmp_path.rglob("checkpoint.safetensors")):
        assert run.poll() is None
        time.sleep(0.05)
    below = children_of(run.pid, deep=True)
    assert len(below) >= 6  # two workers, their clean processes and their stages
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    deadline = time.monotonic() + 120  # a busy machine notices late
    while any(map(alive, below)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, below))


def test_a_script_without_a_main_guard_runs_once(tmp_path):
    """Not again in each worker, as a spawned process does with the script of its parent."""
    (tmp_path / "mine.py").write_text(_SCRIPT)
    command = [sys.executable, "mine.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


_SCRIPT = """
from difflt_core import Pipeline, load_config

pipeline = Pipeline(load_config("smoke"), ".", "cpu", progress=False)
pipeline.build([{"seed": 0}, {"seed": 1}], jobs=2, stages=("data",))
print(len([f for f in pipeline.store.root.glob("data/*/manifest.json")]))
"""


def alive(pid: int) -> bool:
    try:
        return " Z " not in open(f"/proc/{pid}/stat").read()
    except OSError:
        return False


def test_jobs_can_be_set(monkeypatch):
    monkeypatch.setenv("DIFFLT_JOBS", "3")
    assert default_jobs("cpu") == 3
    monkeypatch.delenv("DIFFLT_JOBS")
    monkeypatch.setattr("difflt_core.engine.cluster.n_cores", lambda: 7)
    assert default_jobs("cpu") == 7


def test_repeats_may_share_a_generator(tiny, tmp_path):
    planner = Planner(Pipeline(tiny, tmp_path, "cpu", progress=False).store)
    one_draw = vary(tiny, {"n_draws": 1})
    for seed in (0, 1):
        p = Pipeline(
            vary(one_draw, {"seed": seed, "diffusion.seed": 1}), tmp_path, "cpu", progress=False
        )
        p.store = planner
        p.train_classifier()
    stages = [node.stage.name for node in planner.nodes.values()]
    assert [stages.count(s) for s in ("extractor", "diffusion", "samples")] == [2, 1, 1]
    assert [stages.count(s) for s in ("types", "classifier")] == [2, 2]
    own = Pipeline(vary(one_draw, {"seed": 1}), tmp_path, "cpu", progress=False)
    own.store = Planner(own.store)
    assert own.generate().key in planner.nodes


def test_no_worker_waits_while_there_is_a_stage_that_could_begin(tiny, tmp_path, planned):
    """One of two workers is at a long training: the other gets all the rest, one by one, that with the
    longest chain first, and none is queued behind the first. A third is somebody else's."""
    nodes, sent, running = planned(tiny, tmp_path, VARIANTS).nodes, [], {"another run's"}
    workers = {f"tcp://host:{i}": {"nthreads": 1, "resources": {}} for i in range(3)}

    def submit(_, node, *__, key, **___):
        running.add(key)
        sent.append(node)
        return Future(key)

    class Future:
        def __init__(self, key):
            self.key = key

        status = property(lambda self: "pending" if self.key in running else "finished")

    client = SimpleNamespace(submit=submit, scheduler_info=lambda **_: {"workers": workers})
    client.processing = lambda: {"tcp://host:0": tuple(running)}
    stages, to_end = scheduler._Handout(client, nodes, Store(tmp_path)), cost_to_end(nodes)
    theirs = {
        f"theirs {i}" for i in range(4)
    }  # more than there are places: they wait for each other
    running |= theirs
    stages.go_on()
    assert not sent
    running -= theirs
    while stages.left:
        stages._look_at = 0.0  # a second goes by
        stages.go_on()
        waiting = [n for n in stages.waiting.values() if stages._can_begin(n)]
        assert len(running) == 3 or (len(running) < 3 and not waiting)
        assert all(to_end[sent[-1].key] >= to_end[n.key] for n in waiting)
        ours = sorted(running - {"another run's"}, key=lambda name: name.startswith("diffusion"))
        running -= set(ours[:1])
    assert {node.key for node in sent} == set(nodes) and not stages.failed


def test_gpus_limit_what_a_worker_is_given():
    offers = {"a:1": (4, {"GPU": 2}), "a:2": (1, {"GPU": 3}), "b:1": (2, {})}
    told = {name: {"nthreads": n, "resources": r} for name, (n, r) in offers.items()}
    client = SimpleNamespace(scheduler_info=lambda **_: {"workers": told})
    assert cluster.neighbours(client, "cuda") == ({"a": 3, "b": 0}, {"GPU": 1})
    assert cluster.neighbours(client, "cpu") == ({"a": 5, "b": 2}, None)


def test_gpus_of_an_allocation_are_dealt_out_in_turn(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    made = {}
    monkeypatch.setattr(distributed, "SpecCluster", lambda workers, *_, **__: made.update(workers))
    with pytest.raises(AttributeError):  # of the cluster that is not there
        cluster._cluster.__wrapped__(3, "cuda")
    options = [worker["options"] for worker in made.values()]
    assert [o["env"]["CUDA_VISIBLE_DEVICES"] for o in options] == ["2", "5", "2"]
    assert all(o["resources"] == {"GPU": 1} for o in options)
    assert cluster._gpus("cpu") == []


def test_nobody_at_the_scheduler(monkeypatch):
    monkeypatch.setenv("DIFFLT_SCHEDULER", "tcp://127.0.0.1:1")
    with pytest.raises(
        ConnectionError, match="nobody answers at tcp://127.0.0.1:1 .*start a scheduler"
    ):
        cluster.connect(Context(), timeout_s=1)


def _die_once(marker):
    if not marker.exists():
        marker.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)


def _die(_):
    os.kill(os.getpid(), signal.SIGKILL)


def _fail(text):
    raise ValueError(text)


def test_a_stage_whose_process_dies_is_tried_again(tmp_path):
    in_own_process("it", "cpu", _die_once, tmp_path / "marker")
    with pytest.raises(ChildProcessError, match="it: its process died 3 times, .*--jobs 1"):
        in_own_process("it", "cpu", _die, None)
    with pytest.raises(ValueError, match="as it is"):
        in_own_process("it", "cpu", _fail, "as it is")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only there stages are forked")
def test_the_clean_process_may_die_too():
    in_own_process("it", "cpu", os.getpid)
    for _ in range(3):
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
        in_own_process("it", "cpu", os.getpid)


def _seen(path, name):
    path.write_text(str(name in sys.modules))


@pytest.mark.parametrize("device, inherits", [("cpu", True), ("cuda", False)])
def test_a_process_for_a_gpu_inherits_nothing(tmp_path, device, inherits):
    if device == "cpu" and not sys.platform.startswith("linux"):
        pytest.skip("nothing is forked here")
    in_own_process("it", device, _seen, tmp_path / "seen", "diffusers.training_utils")
    assert (tmp_path / "seen").read_text() == str(inherits)


def test_a_scheduler_that_goes_away_is_said(tiny, tmp_path, monkeypatch, planned):
    lost = SimpleNamespace(done=lambda: True, status="cancelled", key="")
    client = SimpleNamespace(submit=lambda *_, **__: lost, cancel=lambda _: None)
    client.scheduler_info, client.processing = lambda **_: {"workers": {}}, dict
    monkeypatch.setattr(scheduler, "connect", lambda *_: client)
    with pytest.raises(ConnectionError, match="went away; run again: what was finished is kept"):
        planned(tiny, tmp_path, VARIANTS).run(2)

    def closed():
        raise CommClosedError

    client.processing = closed
    with pytest.raises(ConnectionError, match="went away; run again: what was finished is kept"):
        planned(tiny, tmp_path, VARIANTS).run(2)


def test_what_a_killed_run_said_of_its_progress_is_not_believed(
    tiny, tmp_path, monkeypatch, planned
):
    waits = SimpleNamespace(done=lambda: False, status="pending", key="")
    client = SimpleNamespace(submit=lambda *_, **__: waits, cancel=lambda _: None)
    client.scheduler_info, client.processing = lambda **_: {"workers": {}}, dict
    monkeypatch.setattr(scheduler, "connect", lambda *_: client)
    planner, seen = planned(tiny, tmp_path, VARIANTS), []

    def look(_, running, *__):
        seen.append(running)
        raise KeyboardInterrupt

    monkeypatch.setattr(scheduler.TimeLeft, "look", look)
    for key, node in planner.nodes.items():
        file = planner.store.progress_file(node.stage.name, key)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("0.9 0.1")
    with pytest.raises(KeyboardInterrupt):
        planner.run(2)
    assert [set(running.values()) for running in seen] == [{(0.0, 0.0)}]


def test_a_worker_with_other_code_is_refused(tmp_path, tiny, planned):
    node = next(iter(planned(tiny, tmp_path, VARIANTS).nodes.values()))
    other = replace(node, recipe=node.recipe | {"code": "another"})
    with pytest.raises(RuntimeError, match="data: the worker on .* has other code .*same checkout"):
        scheduler._build_here(other, Store(tmp_path))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_killed_workers_lose_nothing(tiny, tmp_path, checkpoint_each_step, children_of, built):
    """Two of two workers die by SIGKILL in mid-training; the run ends by itself, to the same bytes."""
    config = vary(tiny, {"diffusion.n_steps": 60})
    script = tmp_path / "run.py"
    script.write_text(_RUN)
    alone = Pipeline(config, tmp_path / "alone", "cpu", progress=False)
    alone.build([{"seed": 0}, {"seed": 1}], jobs=1)
    out = tmp_path / "out"
    run = subprocess.Popen([sys.executable, str(script), config.model_dump_json(), str(out)])
    while len(list(out.rglob("*.work-*/checkpoint.safetensors"))) < 2:
        assert run.poll() is None
        time.sleep(0.05)
    # those that multiprocessing has started
    started = {p: open(f"/proc/{p}/cmdline", "rb").read() for p in children_of(run.pid)}
    workers = [pid for pid, command in started.items() if b"spawn_main" in command]
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    assert run.wait(timeout=300) == 0
    made, wanted = (built(p) for p in (out, tmp_path / "alone"))
    assert made == wanted and made
