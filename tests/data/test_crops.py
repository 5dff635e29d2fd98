"""Classifiers that read crops of image files: exact, resumable, on the ImageNet-shaped sample."""

import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from difflt_core import Pipeline, load_config, vary
from difflt_core.data import crops
from difflt_core.data.crops import NO_IMAGES, NO_ROWS, CropSource, centre_crops
from difflt_core.data.long_tail import load_split
from difflt_core.experiments.imagenet_sample import imagenet_run
from difflt_core.experiments.results import predictions
from difflt_core.recognition.classifier import image_files, load_classifier


@pytest.fixture
def files(tmp_path):
    found = []
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (30 + i, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        found.append(tmp_path / f"{i}.png")
    return found


def test_crops_depend_on_seed_step_and_position_alone(files):
    generated = np.random.default_rng(9).integers(0, 256, (4, 8, 8, 3), np.uint8)
    generated[1] = 200

    def views(n_workers, steps):
        source = CropSource(files, generated, np.array([1, 3]), 16, "cpu", n_workers)
        order = lambda step: torch.arange(step, step + 4)  # noqa: E731
        return list(source.batches(order, steps, 0, n_views=2))

    alone, helped = views(0, range(5)), views(2, range(5))
    assert all(
        torch.equal(a, b)
        for x, y in zip(alone, helped, strict=True)
        for a, b in zip(x, y, strict=True)
    )
    later = views(0, range(3, 5))  # as after a resume
    assert torch.equal(later[0][1], alone[3][1])
    first, second = alone[0]
    assert first.shape == (4, 3, 16, 16) and -1 <= first.min() and first.max() <= 1
    assert not torch.equal(first, second)
    assert alone[4][0][2].std() < 0.01  # index 6: row 1 of the generated images, all one grey


def test_a_signal_to_the_group_is_not_for_the_workers(files):
    """The training writes a checkpoint on it, and needs its next batch until then."""
    before = multiprocessing.active_children()
    source = CropSource(files, NO_IMAGES, NO_ROWS, 16, "cpu", 2)
    batches = source.batches(lambda step: torch.arange(4), range(9), 0)
    next(batches), next(batches)
    workers = set(multiprocessing.active_children()) - set(before)
    assert len(workers) == 2 and os.getpgrp() not in {os.getpgid(w.pid) for w in workers}
    assert len(list(batches)) == 7


def test_centre_crops_are_in_order_and_not_random(files):
    one, again = (torch.cat(list(centre_crops(files, 16, batch_size=b))) for b in (4, 6))
    assert torch.equal(one, again) and one.shape == (6, 3, 16, 16)


def test_a_file_that_is_gone_is_named(files):
    files[2].unlink()
    source = CropSource(files, NO_IMAGES, NO_ROWS, 16)
    with pytest.raises(ValueError, match=r"2\.png cannot be read .*put it back and run again"):
        list(source.batches(lambda _: torch.arange(4), range(1), 0))


def test_a_sample_is_written_once(tmp_path):
    _, folder = imagenet_run(load_config("smoke"), tmp_path, "")
    path = Path(folder) / "ImageNet_LT_train.txt"
    sizes = np.bincount([int(row.split()[1]) for row in path.read_text().splitlines()])
    assert sizes.max() == 60 and sizes.min() == 6 and not (np.diff(sizes) <= 0).all()
    stamp = path.stat().st_mtime_ns
    assert imagenet_run(load_config("smoke"), tmp_path, "")[1] == folder
    assert path.stat().st_mtime_ns == stamp
    chosen = load_config("smoke", n_classifier_steps=5, **{"classifier.batch_size": 8})
    mine = imagenet_run(chosen, tmp_path, "")[0].classifier
    assert (mine.n_steps, mine.batch_size, mine.arch) == (5, 8, "resnet10_cifar")
    assert imagenet_run(load_config("smoke", seeds=[3, 4]), tmp_path, "")[0].seeds == (3, 4)
    other = imagenet_run(load_config("smoke", n_max=50), tmp_path, "")[1]
    assert other != folder and len(list((tmp_path / "runs").glob("imagenet-sample-????????"))) == 2


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    out = tmp_path_factory.mktemp("sample")
    config, data_dir = imagenet_run(load_config("smoke"), out, "")
    sizes = {"diffusion.n_steps": 6, "sampling.n_steps": 2, "classifier.batch_size": 16}
    steps = {"classifier.n_steps": 8, "extractor.n_steps": 8}
    config = vary(config, {**sizes, **steps})
    pipeline = Pipeline(config, out, "cpu", progress=False, data_dir=data_dir)
    pipeline.train_classifier()
    return pipeline


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch, method",
    [("resnet10", "ce"), ("resnet10", "ride"), ("resnet50", "ce"), ("resnet10_cifar", "ride")],
)
def test_classifiers_of_files(sample, arch, method):
    p = sample.vary({"classifier.arch": arch, "classifier.method": method})
    for artifact in (p.train_on_real(), p.train_classifier()):
        test, root = (
            load_split(p.data(), "test"),
            Path(p.store.context.data_dir) / p.config.data.path,
        )
        model, size = load_classifier(artifact), p.config.classifier.crop_size
        with torch.no_grad():
            crops = centre_crops(image_files(test, root), size, "cpu", 0)
            wanted = np.concatenate([model(x).argmax(dim=1).numpy() for x in crops])
        assert np.array_equal(predictions(p, artifact), wanted)


def test_a_killed_training_on_files_resumes_to_the_same_bytes(
    sample, tmp_path, dies_at, checkpoint_each_step
):
    shutil.copytree(sample.store.root, tmp_path / "runs" / "cache")
    shutil.rmtree(tmp_path / "runs" / "cache" / "classifier")
    other = Pipeline(sample.config, tmp_path, "cpu", False, sample.store.context.data_dir)
    dies_at(5)
    with pytest.raises(KeyboardInterrupt):
        other.train_classifier()
    resumed, whole = other.train_classifier(), sample.train_classifier()
    assert np.array_equal(resumed.array("loss"), whole.array("loss"))


def test_crops_of_data_without_files_are_refused(trained):
    with pytest.raises(ValueError, match="crop_size: expected data that are image files"):
        trained.vary({"classifier.crop_size": 32}).train_on_real()


def test_notebook_06_refuses_other_data():
    with pytest.raises(
        ValueError, match="or the digits of smoke or demo, got cifar10 with cifar10"
    ):
        imagenet_run(load_config("cifar10"), "", "")


def test_a_process_that_is_not_forked_maps_the_generated_images_itself(tmp_path):
    np.save(tmp_path / "images.npy", np.arange(3 << 20, dtype=np.uint8).reshape(-1, 16, 16, 3))
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    images = crops._Images([], mapped, np.array([5, 2]), crops._centre_crop(8), 1)
    sent = pickle.dumps(images)
    assert len(sent) < 2000
    again = pickle.loads(sent)
    assert isinstance(again.generated, np.memmap) and np.array_equal(again.generated, mapped)
    assert torch.equal(again[0, 0], images[0, 0])
    small = crops._Images([], np.array(mapped[:9]), np.array([5]), crops._centre_crop(8), 1)
    assert torch.equal(pickle.loads(pickle.dumps(small))[0, 0], small[0, 0])
