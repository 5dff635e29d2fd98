"""The store: built once, verified, rebuilt when damaged, never half written."""

import json
import multiprocessing
import os
import warnings

import numpy as np
import pytest
from filelock import FileLock

from difflt_core.engine.artifacts import Stage, Store
from difflt_core.engine.files import atomic_write, load_tensors


def build_squares(work, config, inputs, context):
    """A stage of this test: counts how often it ran, and leaves squares."""
    with FileLock(work.parent.parent / "count.lock"), open(work.parent.parent / "count", "a") as f:
        f.write("x")
    np.save(work / "out" / "squares.npy", np.arange(config["n"]) ** 2)
    (work / "out" / "info.json").write_text(json.dumps({"n": config["n"]}))


def build_badly(work, config, inputs, context):
    np.save(work / "out" / "squares.npy", np.arange(3))
    raise OSError(28, "No space left on device")


def get(root, n=5):
    return Store(root).get(Stage("squares", build_squares), {"n": n})


def n_builds(root):
    return len((root / "count").read_text())


def test_second_request_finds_the_first(tmp_path):
    first, second = get(tmp_path), get(tmp_path)
    assert first.path == second.path and n_builds(tmp_path) == 1
    assert second.array("squares").tolist() == [0, 1, 4, 9, 16]
    assert get(tmp_path, n=6).key != first.key


def test_eight_processes_build_it_once(tmp_path):
    with multiprocessing.get_context("spawn").Pool(8) as pool:
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
@pytest.mark.parametrize(
    "harm", [_truncate, _flip_a_bit, lambda p: p.write_bytes(b""), lambda p: p.unlink()]
)
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
        p for p in (tmp_path / "squares").iterdir() if p.is_dir() and not p.name.endswith(".work")
    ]
    assert get(tmp_path).array("squares").tolist() == [0, 1, 4, 9, 16]


def test_pickles_are_not_read(tmp_path):
    artifact = get(tmp_path)
    np.save(artifact.path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        artifact.array("evil", mmap=False)
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


def test_an_open_artifact_is_hashed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    from difflt_core.engine import artifacts as module

    stage, store, hashed = Stage("squares", build_squares), Store(tmp_path), []
    first = store.get(stage, {"n": 3})
    real = module.file_sha256
    monkeypatch.setattr(module, "file_sha256", lambda path: hashed.append(path) or real(path))
    for _ in range(3):
        store.get(stage, {"n": 3})
    assert len(hashed) == len(first.manifest["files"])
    _flip_a_bit(first.path / "squares.npy")
    with pytest.warns(UserWarning, match="damaged artifact"):
        store.get(stage, {"n": 3})
