"""Chunks of images: a file each, every one of exactly one process, merged once."""

import os
import shutil

import numpy as np
import pytest

from difflt_core.engine import parallel
from difflt_core.engine.chunks import Chunks, finish_images
from difflt_core.engine.progress import Context

QUIET = Context(progress=False)
SHAPE = (11, 2, 2, 1)


def images(part):
    return np.arange(part.start, part.stop, dtype=np.uint8)[:, None, None, None] + np.zeros(
        (1, *SHAPE[1:]), np.uint8
    )


@pytest.fixture
def as_rank(monkeypatch):
    """Two processes, one after the other in this one: the main one speaks first."""
    monkeypatch.setattr(parallel, "barrier", lambda: None)
    said = []

    def from_main(value):
        if parallel.rank() == 0:
            said[:] = [value]
        return said[0]

    monkeypatch.setattr(parallel, "from_main", from_main)
    alone = lambda work: work() if parallel.rank() == 0 else None  # noqa: E731
    monkeypatch.setattr(parallel, "main_first", alone)

    def become(rank):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")

    return become


def test_a_kill_loses_the_chunk_under_way(tmp_path):
    chunks = Chunks(tmp_path, "any", SHAPE, 4)
    for part in chunks.todo("", QUIET):
        chunks.write(part, images(part))
        if part.start == 4:
            break
    again = Chunks(tmp_path, "any", SHAPE, 4)
    left = list(again.todo("", QUIET))
    assert left == [slice(8, 11)]
    again.write(left[0], images(left[0]))
    assert np.array_equal(again.merge(), images(slice(0, 11)))
    assert not list(Chunks(tmp_path, "any", SHAPE, 4).todo("", QUIET))  # merged


def test_a_cut_chunk_is_made_again(tmp_path):
    chunks = Chunks(tmp_path, "any", SHAPE, 4)
    for part in chunks.todo("", QUIET):
        chunks.write(part, images(part))
    (file,) = tmp_path.glob("any_chunks/000000004.npy")
    file.write_bytes(file.read_bytes()[:-3])
    assert list(Chunks(tmp_path, "any", SHAPE, 4).todo("", QUIET)) == [slice(4, 8)]


def test_whoever_looks_later_has_the_same_share(tmp_path, as_rank):
    """One process has written its chunks before the other one looks."""
    seen = {}
    for rank in (0, 1):
        as_rank(rank)
        chunks, seen[rank] = Chunks(tmp_path, "any", SHAPE, 2), []
        for part in chunks.todo("", QUIET):
            chunks.write(part, images(part))
            seen[rank].append(part.start)
    assert seen == {0: [0, 4, 8], 1: [2, 6, 10]}


def test_the_others_do_not_touch_what_the_main_process_moves_on(tmp_path, as_rank):
    (tmp_path / "out").mkdir()
    for rank in (0, 1):
        as_rank(rank)
        chunks = Chunks(tmp_path, "any", SHAPE, 2)
        for part in chunks.todo("", QUIET):
            chunks.write(part, images(part))
    as_rank(0)
    assert np.array_equal(chunks.merge(), images(slice(0, 11)))
    finish_images(tmp_path, "any", np.zeros(11), {})
    as_rank(1)
    assert Chunks(tmp_path, "any", SHAPE, 2).merge() is None


def test_what_is_left_is_dealt_out_anew(tmp_path, as_rank):
    """One of two had fallen behind when the group was killed."""
    as_rank(0)
    for part in Chunks(tmp_path, "any", SHAPE, 2).todo("", QUIET):
        Chunks(tmp_path, "any", SHAPE, 2).write(part, images(part))
    shares = []
    for rank in (0, 1):
        as_rank(rank)
        shares.append([p.start for p in Chunks(tmp_path, "any", SHAPE, 2).todo("", QUIET)])
    assert shares == [[2, 10], [6]]


@pytest.mark.parametrize("links", [True, False])
def test_a_kill_before_the_artifact_stands_loses_no_image(tmp_path, monkeypatch, links):
    """What is in out/ goes when another attempt takes over."""
    if not links:
        monkeypatch.setattr(os, "link", refused)
    (tmp_path / "out").mkdir()
    chunks = Chunks(tmp_path, "any", SHAPE, 4)
    for part in chunks.todo("", QUIET):
        chunks.write(part, images(part))
    chunks.merge()
    finish_images(tmp_path, "any", np.zeros(11), {})
    assert np.array_equal(np.load(tmp_path / "out" / "images.npy"), images(slice(0, 11)))
    shutil.rmtree(tmp_path / "out")
    assert links != bool(list(Chunks(tmp_path, "any", SHAPE, 4).todo("", QUIET)))


def refused(*_):
    raise OSError("no links here")


@pytest.mark.parametrize("n", [0, 3])
def test_none_and_fewer_than_a_chunk(tmp_path, n):
    chunks = Chunks(tmp_path, "any", (n, 2, 2, 1), 4)
    for part in chunks.todo("", QUIET):
        chunks.write(part, images(part))
    assert chunks.merge().shape == (n, 2, 2, 1)
