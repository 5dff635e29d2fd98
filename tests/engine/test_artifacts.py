"""The store: built once, verified, rebuilt when damaged, never half written."""

import contextlib
import json
import multiprocessing
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from difflt_core.engine import artifacts
from difflt_core.engine import upkeep as engine_upkeep
from difflt_core.engine.artifacts import Stage, Store, lease
from difflt_core.engine.files import atomic_write, load_tensors
from difflt_core.engine.progress import Context
from difflt_core.engine.provenance import ROOT, cache_folder
from difflt_core.engine.stage_process import dask_setup
from difflt_core.engine.upkeep import unused, upkeep, verify


def build_squares(work, config, inputs, context):
    """A stage of this test: counts how often it ran, and leaves squares."""
    with FileLock(work.parent.parent / "count.lock"), open(work.parent.parent / "count", "a") as f:
        f.write("x")
    np.save(work / "out" / "squares.npy", np.arange(config["n"]) ** 2)
    (work / "out" / "info.json").write_text(json.dumps({"n": config["n"]}))


def build_badly(work, config, inputs, context):
    np.save(work / "out" / "squares.npy", np.arange(3))
    raise OSError(28, "No space left on device")


def build_asked(work, config, inputs, context):
    """Leaves what a training would read about compiling."""
    (work / "out" / "asked.json").write_text(json.dumps(os.environ.get("DIFFLT_COMPILE")))


def get(root, n=5):
    return Store(root).get(Stage("squares", build_squares), {"n": n})


SQUARES = Stage("squares", build_squares)


def n_builds(root):
    return len((root / "count").read_text())


@pytest.mark.parametrize(
    "n_steps, said, asked",
    [(9_999, None, "off"), (10_000, None, None), (9_999, "default", "default"), (0, None, None)],
)
def test_a_short_training_is_not_compiled_unasked(tmp_path, monkeypatch, n_steps, said, asked):
    monkeypatch.delenv("DIFFLT_COMPILE", raising=False)
    if said:
        monkeypatch.setenv("DIFFLT_COMPILE", said)
    config = {"classifier": {"n_steps": n_steps}}
    made = Store(tmp_path).get(Stage("classifier", build_asked), config)
    assert made.json("asked") == asked and os.environ.get("DIFFLT_COMPILE") == said


def test_second_request_finds_the_first(tmp_path):
    first, second = get(tmp_path), get(tmp_path)
    assert first.path == second.path and n_builds(tmp_path) == 1
    assert second.array("squares").tolist() == [0, 1, 4, 9, 16]
    assert get(tmp_path, n=6).key != first.key


def test_eight_processes_build_it_once(tmp_path):
    dask_setup(None)  # stages, too, are forked from this one clean process of pytest's
    context = multiprocessing.get_context("forkserver")
    with context.Pool(8) as pool:
        keys = {a.key for a in pool.map(get, [tmp_path] * 8)}
    assert len(keys) == 1 and n_builds(tmp_path) == 1


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def _flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    time = path.stat().st_mtime_ns
    path.write_bytes(data)
    os.utime(path, ns=(time, time + 10**9))  # a file system may count in coarse ticks


@pytest.mark.parametrize("file", ["squares.npy", "info.json", "manifest.json"])
@pytest.mark.parametrize("harm", [_truncate, lambda p: p.write_bytes(b""), lambda p: p.unlink()])
def test_damage_is_said_moved_aside_and_rebuilt(tmp_path, file, harm):
    before = get(tmp_path)
    harm(before.path / file)
    with pytest.warns(
        UserWarning, match="damaged artifact .* moved to .*corrupt.* building it again"
    ):
        after = get(tmp_path)
    assert after.array("squares").tolist() == [0, 1, 4, 9, 16] and n_builds(tmp_path) == 2
    assert len(list(before.path.parent.glob("*.corrupt-*"))) == 1


def test_a_failed_build_leaves_no_artifact(tmp_path):
    with pytest.raises(OSError, match=r"no space left in .* while building squares; free some"):
        Store(tmp_path).get(Stage("squares", build_badly), {"n": 5})
    assert not [
        p for p in (tmp_path / "squares").iterdir() if p.is_dir() and ".work-" not in p.name
    ]
    assert get(tmp_path).array("squares").tolist() == [0, 1, 4, 9, 16]


def test_pickles_are_not_read(tmp_path):
    artifact = get(tmp_path)
    np.save(artifact.path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        artifact.array("evil")
    (artifact.path / "evil.safetensors").write_bytes(b"\x80\x04\x95")
    with pytest.raises(Exception, match="(?i)header"):
        load_tensors(artifact.path / "evil.safetensors")


def test_atomic_write_keeps_the_old_file_when_the_new_one_fails(tmp_path):
    target = tmp_path / "a.txt"
    atomic_write(target, "old")
    with pytest.raises(TypeError):
        atomic_write(target, None)
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_an_undamaged_store_warns_of_nothing(tmp_path):
    get(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get(tmp_path)


def test_a_find_reads_no_more_than_the_manifest(tmp_path, monkeypatch):
    from difflt_core.engine import artifacts as module

    first = get(tmp_path)
    monkeypatch.setattr(module, "file_sha256", lambda path: pytest.fail(f"hashed {path}"))
    assert get(tmp_path).key == first.key and n_builds(tmp_path) == 1


@pytest.mark.parametrize("file", ["squares.npy", "info.json"])
def test_verify_finds_a_flipped_bit(tmp_path, file):
    first, other = get(tmp_path), get(tmp_path, n=6)
    assert verify(tmp_path) == []
    _flip_a_bit(first.path / file)
    assert verify(tmp_path) == [(first.path, f"{file} is not what was written")]
    assert not first.path.exists() and other.path.exists()
    assert get(tmp_path).array("squares").tolist() == [0, 1, 4, 9, 16] and n_builds(tmp_path) == 3


def _figure(out, *artifacts):
    (out / "figures" / "any").mkdir(parents=True, exist_ok=True)
    record = {"artifacts": {f"{a.path.parent.name}/{a.key}": {} for a in artifacts}}
    (out / "figures" / "any" / "table.json").write_text(json.dumps(record))


def test_gc_keeps_what_a_figure_was_made_of(tmp_path, capsys):
    cache = tmp_path / "runs" / "cache"
    root = Store(cache)
    needed, free = root.get(SQUARES, {"n": 1}), root.get(SQUARES, {"n": 2})
    shown = root.get(SQUARES, {"n": 3}, {"data": needed})
    (cache / "squares" / "abc.corrupt-1").mkdir()
    (cache / "squares" / "abc.work-1").mkdir()
    (cache / "squares" / "abd.work-1.removed-1").mkdir()  # by a removal that was killed
    _figure(tmp_path, shown)
    found = [folder.name for folder, _ in unused(cache, tmp_path / "figures")]
    wanted = [free.key, "abc.corrupt-1", "abc.work-1", "abd.work-1.removed-1"]
    assert sorted(found) == sorted(wanted)
    assert upkeep(tmp_path, verifying=False, remove=False) == 0
    assert free.path.exists() and "--gc remove" in capsys.readouterr().out
    upkeep(tmp_path, verifying=False, remove=True)
    assert not free.path.exists() and shown.path.exists() and needed.path.exists()
    assert not list(cache.glob("*/ab?.*-1"))


def test_gc_removes_nothing_beside_a_run(tmp_path, capsys):
    free = Store(tmp_path / "runs" / "cache").get(SQUARES, {"n": 2})
    (tmp_path / "runs" / "demo").mkdir()
    with FileLock(tmp_path / "runs" / "demo" / "05_long_tail_results.lock"):
        assert upkeep(tmp_path, verifying=False, remove=True) == 1
        assert "while 05_long_tail_results is at work" in capsys.readouterr().out
    other = tmp_path / "runs" / "cache" / "in-use" / "host-1.lock"  # of another process
    with FileLock(other):
        assert upkeep(tmp_path, verifying=False, remove=True) == 1
        assert "while host-1 is at work" in capsys.readouterr().out
    assert free.path.exists() and lease(tmp_path / "runs" / "cache").exists()
    assert upkeep(tmp_path, verifying=False, remove=True) == 0 and not free.path.exists()
    assert not other.exists()


def test_gc_stops_where_a_run_begins_or_a_record_cannot_be_read(tmp_path, monkeypatch, capsys):
    root = Store(tmp_path / "runs" / "cache")
    free = root.get(SQUARES, {"n": 2})
    other, looks = tmp_path / "runs" / "cache" / "in-use" / "host-1.lock", unused
    lock = FileLock(other)

    def beginning(*args):
        found = looks(*args)
        lock.acquire()
        return found

    monkeypatch.setattr(engine_upkeep, "unused", beginning)
    assert upkeep(tmp_path, verifying=False, remove=True) == 0 and free.path.exists()
    assert "in use, left" in capsys.readouterr().out
    lock.release()
    held = iter([False, True])  # it begins between the look and the removal
    monkeypatch.setattr(engine_upkeep, "_others", lambda _: [lock])
    monkeypatch.setattr(engine_upkeep, "_held", lambda _: next(held))
    assert not engine_upkeep._remove(free.path, tmp_path) and free.path.exists()
    monkeypatch.undo()
    _figure(tmp_path, free)
    (tmp_path / "figures" / "any" / "cut.json").write_text('{"artifacts"')
    with pytest.raises(OSError, match="cut.json is damaged .*: nothing was removed"):
        unused(tmp_path / "runs" / "cache", tmp_path / "figures")


def test_gc_leaves_what_is_being_built(tmp_path, capsys):
    work = tmp_path / "runs" / "cache" / "squares" / "abc.work-1"
    work.mkdir(parents=True)
    with FileLock(work.with_name("abc.lock")):
        upkeep(tmp_path, verifying=False, remove=True)
    assert work.exists() and "in use, left" in capsys.readouterr().out


def test_a_killed_attempt_is_adopted_and_its_owner_cannot_write_on(tmp_path):
    key = Store(tmp_path).plan(SQUARES, {"n": 5}, {}).key
    old, left = (tmp_path / "squares" / f"{key}.work-{n}" for n in ("old", "left"))
    for i, folder in enumerate((old, left)):
        folder.mkdir(parents=True)
        (folder / "checkpoint").write_text("here")
        os.utime(folder, (i, i))

    def build(work, config, inputs, context):
        assert (work / "checkpoint").exists() and work not in (old, left)
        assert not old.exists() and not left.exists()  # so a file written there would fail
        np.save(work / "out" / "squares.npy", np.arange(config["n"]))

    store = Store(tmp_path)
    node = replace(store.plan(SQUARES, {"n": 5}, {}), stage=Stage("squares", build))
    store.build(node)
    assert not list(tmp_path.glob("squares/*.work-*"))


def test_two_hosts_that_do_not_see_each_others_lock(tmp_path):
    """While we build, another host takes our attempt over and finishes it."""
    store, node = Store(tmp_path), Store(tmp_path).plan(SQUARES, {"n": 5}, {})

    def build(work, config, inputs, context):
        os.remove(tmp_path / "squares" / f"{node.key}.lock")  # as if it were another disk's
        Store(tmp_path).build(node)
        np.save(work / "out" / "squares.npy", np.arange(99))

    with pytest.warns(UserWarning, match="another host built it at the same time"):
        found = store.build(replace(node, stage=Stage("squares", build)))
    assert found.array("squares").tolist() == [0, 1, 4, 9, 16]


def test_two_hosts_whose_attempts_begin_at_once(tmp_path):
    """Neither sees the other's attempt, so that none is taken over: the slower one finds it made."""
    store, node = Store(tmp_path), Store(tmp_path).plan(SQUARES, {"n": 5}, {})

    def build(work, config, inputs, context):
        shutil.copytree(made.path, tmp_path / "squares" / node.key)
        np.save(work / "out" / "squares.npy", np.arange(99))

    made = Store(tmp_path / "other").build(node)
    with pytest.warns(UserWarning, match="another host built it at the same time"):
        found = store.build(replace(node, stage=Stage("squares", build)))
    assert found.array("squares").tolist() == [0, 1, 4, 9, 16]
    assert not list(tmp_path.glob("squares/*.work-*"))


@pytest.mark.parametrize("find", [verify, lambda root: None])
@pytest.mark.filterwarnings("ignore:damaged artifact")
def test_what_shares_a_damaged_file_goes_with_it(tmp_path, find):
    """A kill between the artifact's standing and the end of its attempt leaves hard links to its files,
    which the next attempt would adopt."""

    def build(work, config, inputs, context):
        assert not (work / "squares.npy").exists()
        build_squares(work, config, inputs, context)

    made = get(tmp_path)
    left = made.path.with_name(f"{made.key}.work-1")
    left.mkdir()
    os.link(made.path / "squares.npy", left / "squares.npy")
    _truncate(made.path / "squares.npy")
    find(tmp_path)
    node = Store(tmp_path).plan(SQUARES, {"n": 5}, {})
    Store(tmp_path).build(replace(node, stage=Stage("squares", build)))
    assert n_builds(tmp_path) == 2


def test_a_wait_says_for_what_and_how_far_it_is(tmp_path, monkeypatch):
    shown, before = [], []

    def update(what, n):
        shown.append((what, n))
        lock.release()

    bar = lambda total, what, *_, **__: _Bar(lambda n: update(what, n))  # noqa: E731
    monkeypatch.setattr(artifacts, "bar", bar)
    monkeypatch.setattr(artifacts, "catch_up", lambda _, n: before.append(n))
    node = Store(tmp_path).plan(SQUARES, {"n": 5}, {})
    (tmp_path / "squares").mkdir()
    lock = FileLock(tmp_path / "squares" / f"{node.key}.lock", thread_local=False)
    lock.acquire()
    Store(tmp_path).progress_file("squares", node.key).write_text("0.25 0.1")
    Store(tmp_path).build(node)
    assert shown == [(f"waiting: another run builds squares {node.key[:8]}", 0.0)]
    assert before == [25.0]


class _Bar(contextlib.nullcontext):
    def __init__(self, update):
        super().__init__(self)
        self.update = update


@pytest.mark.parametrize("device, wanted", [("fp32", "fp32"), ("bf16", "bf16")])
def test_auto_precision_and_packages_are_in_the_key(tmp_path, monkeypatch, device, wanted):
    store = Store(tmp_path, Context(auto_precision=device))
    node = store.plan(SQUARES, {"a": {"precision": "auto"}, "n": 1}, {})
    assert node.config == {"a": {"precision": wanted}, "n": 1}
    assert node.key == store.plan(SQUARES, {"a": {"precision": wanted}, "n": 1}, {}).key
    first = {"torch": "2", "torchvision": "0.26", "diffusers": "0.42", "numpy": "2", "pillow": "13"}
    assert node.recipe["packages"] == first
    monkeypatch.setattr(artifacts, "_numeric_packages", lambda: {"torch": "3"})
    assert store.plan(SQUARES, {"a": {"precision": wanted}, "n": 1}, {}).key != node.key


def test_a_relative_cache_is_one_folder_in_every_process(tmp_path, monkeypatch):
    """A notebook runs in notebooks/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFLT_CACHE", "runs/cache")
    assert cache_folder(tmp_path) == ROOT / "runs" / "cache"
    monkeypatch.delenv("DIFFLT_CACHE")
    assert cache_folder(tmp_path) == tmp_path / "runs" / "cache"
    assert cache_folder(Path("mine")) == tmp_path / "mine" / "runs" / "cache"  # as its figures
