"""Faults, load and hostile input, the quick part; `python tests/faults` is the long one."""

import ctypes
import functools
import gc
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from difflt_core import Pipeline, load_config, run_diffult, vary
from difflt_core.benchmarks.shared import in_a_process
from difflt_core.config import FilterConfig
from difflt_core.data.image_files import read_image
from difflt_core.data.imagenet_lt import parse_lists
from difflt_core.data.long_tail import load_split
from difflt_core.engine.artifacts import Stage, Store
from difflt_core.engine.files import save_tensors, writable
from difflt_core.experiments import imagenet_sample
from difflt_core.experiments.imagenet_sample import imagenet_run
from difflt_core.experiments.results import accuracy
from difflt_core.generation.text2image import read_prompts
from difflt_core.recognition.accuracy import group_accuracy
from difflt_core.recognition.classifier import build_classifier, load_classifier, predict
from difflt_core.recognition.geometry import geometry
from difflt_core.recognition.networks import make_backbone
from difflt_core.reporting.items import Report
from difflt_core.reporting.runner import main
from difflt_core.selection.sample_types import build_types


def write_numbers(work, config, inputs, context):
    np.save(work / "out" / "numbers.npy", np.arange(config["n"]))


NUMBERS = Stage("numbers", write_numbers)


def files_of(cache):
    return {
        str(p.parent.relative_to(cache)): json.loads(p.read_text())["files"]
        for p in sorted(cache.glob("*/*/manifest.json"))
    }


# Storage


def test_the_folder_of_another_run_is_not_taken(tmp_path):
    store = Store(tmp_path)
    one, two = (store.get(NUMBERS, {"n": n}) for n in (1, 2))
    shutil.rmtree(one.path)
    shutil.copytree(two.path, one.path)
    with pytest.warns(UserWarning, match="made from other settings: a folder of another run"):
        assert len(store.get(NUMBERS, {"n": 1}).array("numbers")) == 1


def test_a_clock_that_stands_still_or_runs_backwards(tmp_path, monkeypatch):
    times = iter(range(10**6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: float(next(times)))
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    store = Store(tmp_path)
    for _ in range(3):
        (store.get(NUMBERS, {"n": 3}).path / "numbers.npy").write_bytes(b"")
        with pytest.warns(UserWarning, match="damaged artifact"):
            assert len(store.get(NUMBERS, {"n": 3}).array("numbers")) == 3
    assert len(list((tmp_path / "numbers").glob("*.corrupt-*"))) == 3


def test_any_path_and_a_linked_cache(tiny, trained, tmp_path):
    elsewhere, out = tmp_path / "another disk", tmp_path / "Größe 数据 $HOME 'a' & b;"
    elsewhere.mkdir()
    out.mkdir()
    (out / "runs").symlink_to(elsewhere)
    result = run_diffult(tiny, out, "cpu", progress=False)
    train, p = load_split(trained.data(), "train"), result.pipeline
    assert result.accuracy == accuracy(p, p.train_classifier())
    test = load_split(p.data(), "test").images
    assert np.array_equal(
        predict(result.classifier, test), predict(load_classifier(p.train_classifier()), test)
    )
    assert len(result.images) == len(result.labels) == len(result.types)
    counts = train.class_counts + np.bincount(result.labels, minlength=len(train.class_counts))
    assert (counts == train.class_counts.max()).all()
    assert np.array_equal(result.kept, np.flatnonzero(result.types < 2))  # neither is OOD
    made = files_of(elsewhere / "cache")
    assert len(made) == 6 and made.items() <= files_of(trained.store.root).items()


FULL = [OSError(28, "No space left on device"), OSError("4096 requested and 512 written")]


@pytest.mark.parametrize("error", FULL, ids=["of the system", "of numpy"])
def test_a_full_disk_is_said_with_what_to_do(tmp_path, error):
    def write(work, config, inputs, context):
        raise error

    with pytest.raises(OSError, match="no space left in .* while building numbers; free some"):
        Store(tmp_path).get(Stage("numbers", write), {})


def test_space_is_taken_before_the_first_row(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(OSError):  # not a signal at some later row
        writable(tmp_path / "images.npy", np.uint8, (2 * free,))
    rows = writable(tmp_path / "images.npy", np.uint8, (3 << 20,))
    assert not rows.any() and (tmp_path / "images.npy").stat().st_blocks * 512 >= 3 << 20


# Concurrency


def test_a_dead_lock_holder_blocks_nobody(tmp_path):
    key = Store(tmp_path).plan(NUMBERS, {"n": 5}, {}).key
    hold = (
        "import sys, time; from filelock import FileLock; "
        "lock = FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); time.sleep(600)"
    )
    (tmp_path / "numbers").mkdir()
    lock = tmp_path / "numbers" / f"{key}.lock"
    found = []
    waiting = threading.Thread(
        target=lambda: found.append(Store(tmp_path).get(NUMBERS, {"n": 5})), daemon=True
    )
    with subprocess.Popen([sys.executable, "-c", hold, lock], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout.readline() == b"held\n"
            waiting.start()
            waiting.join(timeout=0.5)
            assert waiting.is_alive()  # for the living one
        finally:
            holder.kill()
    waiting.join(timeout=60)
    assert len(found[0].array("numbers")) == 5


def test_eight_write_one_sample_of_imagenet(tmp_path, monkeypatch):
    config, written = load_config("smoke"), []
    real = imagenet_sample._write

    @functools.wraps(real)
    def counted(*arguments):
        written.append(real(*arguments))

    monkeypatch.setattr(imagenet_sample, "_write", counted)
    with ThreadPoolExecutor(8) as pool:
        (folder,) = set(pool.map(lambda _: imagenet_run(config, tmp_path, "")[1], range(8)))
    assert len(written) == 1
    lists = [p.read_text().splitlines() for p in Path(folder).glob("ImageNet_LT_*.txt")]
    named = {line.split()[0] for rows in lists for line in rows}
    files = {p.relative_to(folder).as_posix() for p in Path(folder).rglob("*.JPEG")}
    assert len(lists) == 3 and named == files


# Numbers


def save_folder(root, images):
    """images: class name to a list of uint8 arrays (H, W, 3)."""
    from PIL import Image

    for name, arrays in images.items():
        (root / name).mkdir(parents=True)
        for i, array in enumerate(arrays):
            Image.fromarray(array).save(root / name / f"{i}.png")


def on_folder(tmp_path, images, **changes):
    save_folder(tmp_path / "images", images)
    small = {
        "extractor.n_steps": 4,
        "classifier.n_steps": 4,
        "diffusion.n_steps": 2,
        "diffusion.batch_size": 2,
        "sampling.n_steps": 1,
        "data.image_size": 8,
    }
    config = vary(load_config("folder", path="images"), small | changes)
    return Pipeline(config, tmp_path / "out", "cpu", progress=False, data_dir=tmp_path)


def noise(n, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), np.uint8))


def test_classes_of_one_and_two_images(tmp_path):
    p = on_folder(tmp_path, {"many": noise(9), "two": noise(2, 1), "one": noise(1, 2)})
    reached = accuracy(p, p.train_classifier())
    assert 0 <= reached["overall"] <= 100
    counts = p.data().json("info")["counts"]["train"]  # many, one, two: by name
    assert min(counts) == 1
    assert np.bincount(p.generate().array("labels"), minlength=3).tolist() == [
        max(counts) - n for n in counts
    ]


def test_images_that_are_all_the_same_are_refused_by_name(tmp_path):
    black = [np.zeros((8, 8, 3), np.uint8)] * 6
    p = on_folder(tmp_path, {"a": black, "b": black[:3]})
    with (
        pytest.warns(UserWarning, match="accuracies will flatter"),
        pytest.raises(ValueError, match="every class radius is 0"),
    ):
        p.train_classifier()


def test_batches_of_one(tmp_path):
    one = {"extractor.batch_size": 1, "classifier.batch_size": 1, "diffusion.batch_size": 1}
    p = on_folder(tmp_path, {"a": noise(6), "b": noise(3, 1)}, **one)
    assert 0 <= accuracy(p, p.train_classifier())["overall"] <= 100


def test_half_precision_without_range_is_not_offered():
    with pytest.raises(ValueError, match="precision.*fp32.*bf16"):
        vary(load_config("smoke"), {"diffusion.precision": "fp16"})


def test_ten_thousand_classes(tmp_path):
    K, rng = 10_000, np.random.default_rng(0)
    labels = np.concatenate([np.arange(K), rng.integers(0, K, 500)])
    features = rng.standard_normal((len(labels), 8)).astype(np.float32)
    centres, radii = geometry(features, labels, K)
    assert centres.shape == (K, 8) and (radii > 0).all()
    counts = np.bincount(labels, minlength=K)
    assert group_accuracy(labels, labels, counts)["overall"] == 100


# Hostile files


def png(width, height):
    """A PNG of a few bytes that says it is that large."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("size", [10_000, 20_000, 100_000])
def test_decompression_bombs_among_images_are_not_opened(tmp_path, monkeypatch, size):
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("it was unpacked"))
    (tmp_path / "bomb.png").write_bytes(png(size, size))
    image, why = read_image(tmp_path / "bomb.png", (8, 8, 3))
    assert image is None and why == "more than 89 million pixels"


def npy(shape, kind, data):
    header = io.BytesIO()
    facts = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, facts)
    return header.getvalue() + data


@pytest.mark.parametrize("n, compression", [(10**9, 8), (-1, 8), (9, 12), (9, 14)])
def test_a_decompression_bomb_as_npz_is_refused(tmp_path, n, compression):
    """Headers that claim 192 GB or a negative size; methods that unpack without a limit."""
    p = on_folder(tmp_path, {"a": noise(6), "b": noise(3, 1)})
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", compression) as file:
        file.writestr("images.npy", npy((n, 8, 8, 3), "|u1", bytes(10**6)))
        file.writestr("labels.npy", npy((n,), "<i8", bytes(72)))
    q = p.vary({"synthetic.source": "npz", "synthetic.path": "bomb.npz"})
    with Peak() as used, pytest.raises(ValueError, match="bomb.npz: expected plain arrays"):
        q.synthetic()
    assert used.peak < 100e6
    assert not list(q.store.root.rglob("synthetic_images.npy"))


HOSTILE = "$(touch owned); `touch owned` | <script>alert(1)</script> & ../../x"


def test_shell_characters_are_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--profile", "folder", "--out", str(tmp_path / "out"), "--set", f"path={HOSTILE}"]
    assert main(arguments) == 1
    assert "touch owned" in capsys.readouterr().err
    assert not list(tmp_path.rglob("owned"))


def test_class_names_are_text_in_every_report(tmp_path):
    import matplotlib.pyplot as plt
    import pandas as pd

    from difflt_core.reporting.figures import class_map, confusion_matrix, draw_dataset

    names = [
        "<script>alert(1)</script>".replace("/", "_"),
        "$\\frac{",
        "a|b",
        "\\input{x}",
        "x_y & z",
    ]
    p = on_folder(tmp_path, {name: noise(4, i) for i, name in enumerate(names)})
    train, report = load_split(p.data(), "train"), Report(p, tmp_path)
    figure = draw_dataset(train, 100, 20)
    report.figure("figure01", figure, HOSTILE)
    figure, axes = plt.subplots(1, 2)
    confusion_matrix(axes[0], np.eye(5), train.class_names)
    features = np.random.default_rng(0).standard_normal((20, 4))
    class_map(
        axes[1],
        features,
        features,
        np.repeat(range(5), 4),
        np.repeat(range(5), 4),
        train.class_names,
        names[1],
    )
    report.figure("figure02", figure, HOSTILE)
    report.table("table01", pd.DataFrame({"class": train.class_names}).set_index("class"), HOSTILE)
    report.table("table02", pd.DataFrame([range(5)], columns=list(train.class_names)), HOSTILE)
    for item in ("table01", "table02"):
        assert "<script>" not in (report.folder / f"{item}.md").read_text()
        assert "\\input{" not in (report.folder / f"{item}.tex").read_text()


@pytest.mark.parametrize(
    "row", ["x" * 10**7, f"a/{'x' * 10**6}.JPEG -1", f"a/x.JPEG {'9' * 10**5}"]
)
def test_a_giant_line_is_an_error_of_one_line(row, tmp_path):
    with pytest.raises(ValueError, match="ImageNet_LT_val.txt, line 1") as error:
        parse_lists({"train": "a/x.JPEG 0\n", "val": row, "test": "a/z.JPEG 0"})
    assert len(str(error.value)) < 1000
    (tmp_path / "prompts.txt").write_text(row)
    with pytest.raises(ValueError, match="line 1") as error:
        read_prompts(tmp_path / "prompts.txt")
    assert len(str(error.value)) < 1000


# Memory


class Peak:
    """The largest growth of this process's own memory (no mapped files) while it runs, in bytes."""

    def __enter__(self):
        gc.collect()
        if sys.platform.startswith(
            "linux"
        ):  # what earlier tests have freed is no room for this one
            ctypes.CDLL(None).malloc_trim(0)
        self.peak, self.going = 0, True
        self.before = self._now()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def _now(self):
        if not os.path.exists("/proc/self/status"):
            return 0
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) << 10 for line in f if line.startswith("RssAnon"))

    def _look(self):
        while self.going:
            self.peak = max(self.peak, self._now() - self.before)
            time.sleep(0.002)

    def __exit__(self, *_):
        self.going = False
        self.thread.join()


def write_arrays(work, config, inputs, context):
    """Random images of K classes, at least one of each, as a data artifact and as generated ones."""
    rng, n, K = np.random.default_rng(0), config["n"], config["classes"]
    labels = np.sort(np.concatenate([np.arange(K), rng.integers(0, K, n)]))
    images = rng.integers(0, 256, (len(labels), *config["shape"]), np.uint8)
    out = work / "out"
    for name in ("", *(f"{split}_" for split in ("train", "val", "test"))):
        np.save(out / f"{name}images.npy", images)
        np.save(out / f"{name}labels.npy", labels)
    info = {"class_names": [str(c) for c in range(K)]}
    (out / "info.json").write_text(json.dumps(info))


def write_model(work, config, inputs, context):
    info = {"arch": "small_cnn", "n_classes": config["classes"], "in_channels": 3, "width": 4}
    save_tensors(work / "out" / "model.safetensors", make_backbone(**info).state_dict())
    (work / "out" / "model.json").write_text(json.dumps(info))


def typed(store, n, _):
    """Types of n random images against 1,000 classes."""
    arrays = {"n": n, "classes": 1000, "shape": [16, 16, 3]}
    few = store.get(Stage("arrays", write_arrays), arrays | {"n": 100})
    inputs = {"data": few, "samples": store.get(Stage("arrays", write_arrays), arrays)}
    inputs["extractor"] = store.get(Stage("model", write_model), {"classes": 1000})
    config = {"filtering": FilterConfig().model_dump(mode="json")}
    return lambda: store.get(Stage("types", build_types), config, inputs)


def generated(store, n, trained):
    settings = {"sampling.n_steps": 1, "sampling.guidance": 1.0, "sampling.fill_to": n // 10}
    p = trained.vary(settings)
    p.train_diffusion()
    return p.generate


def trained_on(store, n, trained):
    arrays = {"n": n, "classes": 10, "shape": [16, 16, 3]}
    few, many = (store.get(Stage("arrays", write_arrays), arrays | {"n": m}) for m in (100, n))
    inputs = {"data": few, "samples": many}
    changes = {"classifier.n_steps": 3, "classifier.width": 4}
    recipe = trained.vary(changes).config.classifier.model_dump(mode="json")
    kept = Stage("kept", lambda work, *_: np.save(work / "out" / "kept.npy", np.arange(n)))
    config = {"classifier": recipe, "seed": 0, "kept": "kept"}
    return lambda: store.get(
        Stage("classifier", build_classifier), config, inputs | {"types": store.get(kept, {"n": n})}
    )


def peaks_of(make, sizes, trained, folder):
    """The largest growth of memory in bytes for each size; the first size warms up."""
    ctypes.CDLL(None).mallopt(-3, 1 << 17)  # M_MMAP_THRESHOLD: a freed array is given back at once
    store, peaks = Store(folder, trained.store.context), []
    for n in sizes:
        build = make(store, n, trained)
        with Peak() as used:
            build()
        peaks.append(used.peak)
    return peaks


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "make, sizes",
    [
        (generated, (3000, 1000, 25000)),
        (typed, (500, 4000, 44000)),
        (trained_on, (500, 5000, 105000)),
    ],
)
def test_memory_of_100_000_images_by_slope(make, sizes, trained, tmp_path):
    """Two sizes give bytes per image, and those at most 60 MB for 100,000 images of 16x16x3, whose
    bytes alone are 77 MB, and whose logits for 1,000 classes 400. In a process of its own: what
    other tests left of theirs is neither room nor load."""
    peaks = in_a_process(peaks_of, make, sizes, trained, tmp_path)
    per_image = (peaks[2] - peaks[1]) / (sizes[2] - sizes[1])
    assert 100_000 * per_image < 60e6
