"""Synthetic images: each source on small files in its own format, and what every class gets."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from difflt_core import Pipeline, vary
from difflt_core.data.image_files import fit_image
from difflt_core.data.long_tail import load_split, shortfall
from difflt_core.engine.files import file_sha256
from difflt_core.experiments.results import kept
from difflt_core.generation.text2image import build_text2image, prompts_by_class, read_prompts
from difflt_core.recognition import classifier


@pytest.fixture(scope="module")
def few(tiny, tmp_path_factory):
    """Digits, 8 to 2 of each: the class that lacks most lacks 6."""
    small = {"n_max": 8, "imb_ratio": 4, "n_test": 2, "n_val": 2}
    config = vary(tiny, {f"data.{k}": v for k, v in small.items()})
    return Pipeline(config, tmp_path_factory.mktemp("few"), "cpu", progress=False)


def anew(pipeline):
    """As a later run has it, which looks at its sources again."""
    return Pipeline(pipeline.config, pipeline.store.root.parents[1], "cpu", progress=False)


def source(pipeline, name, filtered=False, **settings):
    changes = {"source": name, "filtered": filtered, **settings}
    return pipeline.vary({f"synthetic.{k.replace('__', '.')}": v for k, v in changes.items()})


def needs(pipeline):
    return shortfall(load_split(pipeline.data(), "train").class_counts)


def images_of(artifact):
    return np.asarray(artifact.array("images")), np.asarray(artifact.array("labels"))


def test_diffult_filtered_and_not(trained):
    samples, labels = images_of(trained.generate())
    whole = source(trained, "diffult").synthetic()
    assert np.array_equal(images_of(whole)[0], samples)
    assert np.array_equal(images_of(whole)[1], labels)
    chosen = kept(trained)
    some = source(trained, "diffult", filtered=True).synthetic()
    assert np.array_equal(images_of(some)[0], samples[chosen]) and some.key != whole.key
    info = some.json("info")
    assert sum(info["dropped"]) == len(samples) - len(chosen) and info["kept"] == "kept_id_and_aid"
    assert info["from"]["artifact"] == f"samples/{trained.generate().key}"


def test_every_class_is_filled_up_to_the_largest(trained):
    more = trained.vary({"sampling.fill_to": 70, "sampling.n_steps": 2})
    images, labels = images_of(source(more, "diffult").synthetic())
    assert np.bincount(labels, minlength=10).tolist() == needs(trained).tolist()
    drawn, of = images_of(more.generate())
    assert np.array_equal(images[labels == 9], drawn[of == 9][: needs(trained)[9]])
    # so that all that trains on them has as long an epoch
    n, n_more = (int(np.maximum(fill - (60 - needs(trained)), 0).sum()) for fill in (60, 70))
    real = int((60 - needs(trained)).sum())
    assert (more._n_images(None), more._n_images(0), more._n_images(70)) == (
        real,
        real + n,
        real + n_more,
    )


def write_folder(root, n, classes=range(10)):
    for c in classes:
        (root / str(c)).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            pixels = np.random.default_rng(10 * c + i).integers(0, 256, (24, 20, 3), np.uint8)
            Image.fromarray(pixels).save(root / str(c) / f"{i}.png")


def test_a_folder_in_the_data_sets_size_and_colours(few, tmp_path):
    write_folder(tmp_path, 7)
    p = source(few, "folder", path=str(tmp_path))
    with pytest.warns(UserWarning, match="Colour mode RGB, converted to L: 70"):
        images, labels = images_of(p.synthetic())
    assert images.shape[1:] == (8, 8, 1) and images.dtype == np.uint8
    assert np.bincount(labels, minlength=10).tolist() == needs(few).tolist()
    with Image.open(tmp_path / "9" / "3.png") as picture:
        assert np.array_equal(images[labels == 9][3], fit_image(picture, (8, 8, 1)))
    before = p.synthetic().key
    write_folder(tmp_path, 8, [9])
    assert p.synthetic().key == before  # as it was when this pipeline looked
    assert source(anew(few), "folder", path=str(tmp_path)).synthetic().key != before


def test_classes_with_few_or_no_synthetic_images_are_said(few, tmp_path):
    write_folder(tmp_path, 2, range(9))
    with pytest.warns(UserWarning) as said:
        info = source(few, "folder", path=str(tmp_path)).synthetic().json("info")
    text = "\n".join(str(w.message) for w in said)
    assert "no synthetic image, so that they train on real ones alone: 9 (0 of 6)" in text
    assert "fewer synthetic images than they need" in text and "8 (2 of 6)" in text
    assert "add images" in text and "synthetic_filtered" not in text
    assert info["used"][9] == 0 and info["needed"][9] == 6 and info["from"]["path"] == str(tmp_path)


def test_the_filter_works_on_any_source(few, tmp_path):
    write_folder(tmp_path, 7)
    p = source(few, "folder", filtered=True, path=str(tmp_path)).vary({"filtering.keep": "ood"})
    offered, of = images_of(source(p, "folder", path=str(tmp_path)).synthetic_source())
    p.build([{}], jobs=1, stages=("synthetic",))  # as planned for many variants
    kept = np.asarray(p._types(p.synthetic_source()).array("kept_ood"))
    images, labels = images_of(p.synthetic())
    wanted = [kept[of[kept] == c][:n] for c, n in enumerate(needs(few))]
    assert np.array_equal(images, offered[np.concatenate(wanted)])
    info = p.synthetic().json("info")
    assert sum(info["dropped"]) == len(offered) - len(kept) and sum(info["used"]) == len(labels)


def test_wrong_folders_are_named(few, tmp_path):
    with pytest.raises(FileNotFoundError, match="one folder per class, got .*nowhere"):
        source(few, "folder", path=str(tmp_path / "nowhere")).synthetic()
    with pytest.raises(FileNotFoundError, match="choose it with --set synthetic_path=NAME"):
        source(few, "folder").synthetic()
    write_folder(tmp_path, 1, [3, 11])
    with pytest.raises(ValueError, match=r"unknown classes \['11'\]"):
        source(few, "folder", path=str(tmp_path)).synthetic()


def arrays(n=6, shape=(8, 8, 1), dtype=np.uint8):
    rng = np.random.default_rng(0)
    return {
        "images": rng.integers(0, 255, (10 * n, *shape)).astype(dtype),
        "labels": np.tile(np.arange(10), n),
    }


def test_an_npz_file(few, tmp_path):
    path, given = tmp_path / "images.npz", arrays()
    np.savez_compressed(path, **given)
    p = source(few, "npz", path=str(path))
    images, labels = images_of(p.synthetic())
    assert np.array_equal(images[labels == 9], given["images"][given["labels"] == 9])
    info, before = p.synthetic().json("info"), p.synthetic().key
    assert info["from"]["sha256"] == file_sha256(path) and info["offered"] == [6] * 10
    np.savez(path, images=given["images"] ^ 1, labels=given["labels"])
    assert source(anew(few), "npz", path=str(path)).synthetic().key != before


@pytest.mark.parametrize(
    "given, message",
    [
        (arrays(shape=(9, 9, 1)), r"expected uint8 \(N, 8, 8, 1\) .* got uint8 \(60, 9, 9, 1\)"),
        (arrays(shape=(8, 8, 3)), r"expected uint8 \(N, 8, 8, 1\) .* got uint8 \(60, 8, 8, 3\)"),
        (arrays(dtype=np.float32), r"expected uint8 .* got float32"),
        (arrays() | {"labels": np.zeros(60)}, r"expected integers \(60,\), got float64 \(60,\)"),
        (arrays() | {"labels": np.zeros(5, int)}, r"expected integers \(60,\), got int64 \(5,\)"),
        (arrays() | {"labels": np.arange(60)}, "expected 0 to 9, .* got 0 to 59"),
        (
            arrays() | {"images": np.asfortranarray(arrays()["images"])},
            r"Fortran order; save numpy.ascontiguousarray",
        ),
        ({"labels": np.arange(60)}, "expected arrays images and labels, got .*images"),
        (
            arrays() | {"labels": np.array([[1], None], object)},
            "objects and pickles are never read",
        ),
    ],
)
def test_wrong_npz_files(few, tmp_path, given, message):
    path = tmp_path / "images.npz"
    np.savez(path, **given)
    with pytest.raises(ValueError, match=message):
        source(few, "npz", path=str(path)).synthetic()


def test_a_pickle_is_never_read(few, tmp_path):
    evil = b"cos\nsystem\n(S'touch %s'\ntR." % str(tmp_path / "evil").encode()
    for name in ("images.pkl", "images.npz"):
        (tmp_path / name).write_bytes(evil)
        with pytest.raises((FileNotFoundError, ValueError), match="never read: save it with numpy"):
            source(few, "npz", path=str(tmp_path / name)).synthetic()
    assert not (tmp_path / "evil").exists()


def test_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# ours\n\ncat: a cat: asleep\n1\ta dog\ncat: a second cat\n", encoding="utf-8")
    pairs = read_prompts(path)
    assert pairs == [("cat", "a cat: asleep"), ("1", "a dog"), ("cat", "a second cat")]
    assert prompts_by_class(pairs, ["cat", "dog"]) == [["a cat: asleep", "a second cat"], ["a dog"]]
    with pytest.raises(ValueError, match=r"unknown classes \['1'\]; the data have \['cat'\]"):
        prompts_by_class(pairs, ["cat"])
    with pytest.raises(ValueError, match=r"classes \['bird'\] have none; add a line"):
        prompts_by_class(pairs, ["cat", "dog", "bird"])
    path.write_text("cat: a cat\na dog\n")
    with pytest.raises(ValueError, match="line 2: expected 'class: prompt', got 'a dog'"):
        read_prompts(path)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A folder with a minute Stable Diffusion with random weights, saved as diffusers does, and a
    file of prompts."""
    transformers = pytest.importorskip("transformers")
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

    root = tmp_path_factory.mktemp("library")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (root / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (root / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    small = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    pipeline = StableDiffusionPipeline(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            **small,
        ),
        transformers.CLIPTextModel(text),
        transformers.CLIPTokenizer.from_pretrained(str(root), model_max_length=16),
        UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            **small,
        ),
        DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(root / "pipeline")
    (root / "prompts.txt").write_text(
        "".join(f"{c}: the digit {c}\n{c}: a {c}\n" for c in range(10))
    )
    return root


def drawing(pipeline, library, filtered=False, name="pipeline", **settings):
    settings = {"n_steps": 2, "batch_size": 5} | settings
    settings |= {"pipeline": str(library / name), "prompts": str(library / "prompts.txt")}
    settings = {f"text2image__{k}": v for k, v in settings.items()}
    return source(pipeline, "text2image", filtered, **settings)


def test_text_to_image(few, library):
    p = drawing(few, library)
    images, labels = images_of(p.synthetic())
    assert images.shape[1:] == (8, 8, 1) and images.std() > 1
    assert np.bincount(labels, minlength=10).tolist() == needs(few).tolist()
    assert len(np.unique(images, axis=0)) == len(images)
    origin = p.synthetic().json("info")["from"]
    assert origin["class"] == "StableDiffusionPipeline" and origin["n_steps"] == 2
    index = library / "pipeline" / "model_index.json"
    assert (
        origin["model_index_sha256"] == file_sha256(index) and len(origin["prompts_sha256"]) == 64
    )


def test_surplus_is_drawn_for_the_filter(few, library):
    p = drawing(few, library, filtered=True, surplus=0.5)
    info = p.vary({"filtering.keep": "all"}).synthetic().json("info")
    assert info["offered"] == np.ceil(needs(few) * 1.5).astype(int).tolist()
    assert info["used"] == info["needed"]


def test_batch_size_changes_no_drawn_image(few, library):
    a, b = (images_of(drawing(few, library, batch_size=n).synthetic_source())[0] for n in (5, 7))
    assert np.abs(a.astype(int) - b).max() <= 1  # another batch shape rounds differently


def test_drawing_continues_after_a_kill(few, library, tmp_path, monkeypatch):
    from difflt_core.generation import text2image

    p = drawing(few, library)
    whole = p.synthetic_source()
    config, drawn, draw = whole.manifest["recipe"]["config"], [], text2image._draw

    class Killed(Exception):
        pass

    def dying(*args):
        if len(drawn) == 3:
            raise Killed
        drawn.append(args[2])
        return draw(*args)

    (tmp_path / "out").mkdir()
    task = (tmp_path, config, {"data": p.data()}, p.store.context)
    monkeypatch.setattr(text2image, "_draw", dying)
    with pytest.raises(Killed):
        build_text2image(*task)
    monkeypatch.setattr(text2image, "_draw", lambda *a: drawn.append(a[2]) or draw(*a))
    build_text2image(*task)
    assert sum(map(len, drawn)) == len(whole.array("labels"))  # nothing was drawn twice
    for name in ("images.npy", "labels.npy", "info.json"):
        assert (tmp_path / "out" / name).read_bytes() == (whole.path / name).read_bytes()


def test_the_key_of_drawn_images(few, library, tmp_path):
    shutil.copytree(library, tmp_path / "copy")
    copy = tmp_path / "copy"

    def key():
        return drawing(anew(few), copy).synthetic_source().key

    first = key()
    with (copy / "prompts.txt").open("a") as f:
        f.write("# a remark\n")
    assert key() == first
    with (copy / "prompts.txt").open("a") as f:
        f.write("9: another nine\n")
    second = key()
    (copy / "pipeline" / "README.md").write_text("other weights")
    assert len({first, second, key(), drawing(few, copy, guidance=2.0).synthetic_source().key}) == 4


def test_missing_pipelines_and_prompts(few, library, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"prompts: expected a text file .* got .*nowhere"):
        drawing(few, library).vary(
            {"synthetic.text2image.prompts": str(tmp_path / "nowhere")}
        ).synthetic()
    with pytest.raises(ValueError, match="text2image_pipeline: .* set text2image_pipeline=NAME"):
        source(few, "text2image").synthetic()
    for name in (str(tmp_path / "nothing"), "nobody/nothing"):
        with pytest.raises(FileNotFoundError, match=f"by the name '{name}' .* let --download"):
            p = drawing(few, library).vary({"synthetic.text2image.pipeline": name})
            p.synthetic()


def test_only_safe_text_to_image_pipelines_are_loaded(few, library, tmp_path):
    shutil.copytree(library, tmp_path / "copy")
    copy = tmp_path / "copy"
    weights = copy / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no file named .*safetensors"):
        drawing(few, copy).synthetic()
    (copy / "pipeline" / "pipeline.py").write_text(f"open({str(tmp_path / 'evil')!r}, 'w')")
    index = copy / "pipeline" / "model_index.json"
    changed = json.loads(index.read_text()) | {"_class_name": ["pipeline", "Evil"]}
    index.write_text(json.dumps(changed))
    with pytest.raises(FileNotFoundError, match="contains custom code"):
        drawing(few, copy).synthetic()
    assert not (tmp_path / "evil").exists()


def test_without_transformers(few, library, monkeypatch):
    monkeypatch.setattr("difflt_core.generation.text2image.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"install it with pip install -e \"\.\[text2image\]"):
        drawing(few, library, n_steps=3).synthetic()


def test_a_pipeline_without_prompts_is_refused(few, library):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(library / "unconditional")
    with pytest.raises(ValueError, match="DDPMPipeline .* takes no guidance_scale and no prompt"):
        drawing(few, library, name="unconditional").synthetic()


def test_nothing_is_needed_by_balanced_data(few, tmp_path):
    write_folder(tmp_path, 1)
    p = source(few, "folder", path=str(tmp_path)).vary({"data.imb_ratio": 1.0})
    assert p.synthetic().array("images").shape == (0, 8, 8, 1)


def test_a_classifier_trains_on_the_images_of_a_source(few, tmp_path, monkeypatch):
    path = tmp_path / "images.npz"
    np.savez(path, **arrays())
    p = source(few, "npz", path=str(path)).vary({"classifier.n_steps": 2})
    (images, labels), given, train_on = images_of(p.synthetic()), [], classifier.train_on
    monkeypatch.setattr(classifier, "train_on", lambda *a: given.extend(a[2:5]) or train_on(*a))
    p.train_on_synthetic()
    train = load_split(p.data(), "train")
    n = len(train.labels)
    assert len(images) and np.array_equal(given[0][np.arange(n, n + len(images))], images)
    assert np.array_equal(given[1], np.concatenate([train.labels, labels]))
