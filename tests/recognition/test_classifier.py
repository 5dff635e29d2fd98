"""Every method trains alone and on real and generated images, and resumes exactly."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from difflt_core import Pipeline, vary
from difflt_core.data.augment import augment
from difflt_core.data.long_tail import load_split, to_float
from difflt_core.engine.seeding import batch_indices, derive_seed
from difflt_core.experiments.results import accuracy
from difflt_core.recognition import classifier
from difflt_core.recognition.classifier import load_classifier, predict

METHODS = ("ce", "cb", "bsce", "ldam", "paco", "gpaco", "ride")


@pytest.fixture
def pipeline(trained, tmp_path):
    """A fresh store with the trained generator's artifacts."""
    shutil.copytree(trained.store.root, tmp_path / "runs" / "cache")
    return Pipeline(trained.config, tmp_path, "cpu", progress=False)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_alone_and_with_generated_images(pipeline, method):
    p = pipeline.vary({"classifier.method": method, "classifier.queue_size": 200})
    real, mixed = (accuracy(p, a) for a in (p.train_on_real(), p.train_classifier()))
    assert 0 <= real["overall"] <= 100 and 0 <= mixed["overall"] <= 100
    loss = p.train_classifier().array("loss")
    assert np.isfinite(loss).all() and len(loss) == p.config.classifier.n_steps


@pytest.mark.parametrize("method", ["ce", "paco", "gpaco", "ride"])
def test_a_killed_training_resumes_to_the_same_bytes(
    pipeline, tmp_path, dies_at, checkpoint_each_step, method
):
    changes = {
        "n_steps": 12,
        "method": method,
        "queue_size": 200,
        "flip": True,
    }
    p = pipeline.vary({f"classifier.{k}": v for k, v in changes.items()})
    other = Pipeline(p.config, tmp_path / "again", "cpu", progress=False)
    whole = p.train_on_real()
    dies_at(8)
    with pytest.raises(KeyboardInterrupt):
        other.train_on_real()
    assert list((tmp_path / "again").rglob("checkpoint.safetensors"))
    resumed = other.train_on_real()
    assert np.array_equal(resumed.array("loss"), whole.array("loss"))
    for name, tensor in whole.tensors("model").items():
        assert torch.equal(tensor, resumed.tensors("model")[name]), name


def test_evaluation_twice_gives_the_same(trained):
    model = load_classifier(trained.train_extractor())
    images = load_split(trained.data(), "test").images
    assert np.array_equal(predict(model, images), predict(model, images)) and not model.training


class Stop(Exception):
    """Ends a training once what is looked at is known."""


@pytest.mark.parametrize("rule", ["some", None])
def test_the_final_classifier_sees_the_kept_images_at_their_weight(trained, monkeypatch, rule):
    given = {}

    def train_on(work, config, source, labels, weights, *_):
        given.update(source=source, labels=labels, weights=weights)

    monkeypatch.setattr(classifier, "train_on", train_on)
    train, samples, some = load_split(trained.data(), "train"), trained.generate(), [9, 2, 30]
    types = SimpleNamespace(array={"some": np.array(some)}.__getitem__)
    inputs = {"data": trained.data(), "samples": samples, "types": types}
    recipe = trained.config.classifier.model_copy(update={"omega": 0.25}).settings()
    config = {"classifier": recipe, "kept": rule}
    classifier.build_classifier(None, config, inputs, trained.store.context)
    made, of = np.asarray(samples.array("images")), np.asarray(samples.array("labels"))
    chosen = some if rule else range(len(of))
    images = np.concatenate([train.images, made[chosen]])
    assert np.array_equal(given["source"][np.arange(len(images))], images)
    assert np.array_equal(given["labels"], np.concatenate([train.labels, of[chosen]]))
    wanted = [1.0] * len(train.labels) + [0.25] * len(chosen)
    assert given["weights"].tolist() == wanted


def test_a_generated_image_counts_in_the_prior_as_much_as_it_weighs(trained, tmp_path, monkeypatch):
    def make(recipe, net, counts):
        raise Stop(counts)

    monkeypatch.setattr(classifier, "make_objective", make)
    config = {"classifier": trained.config.classifier.settings(), "seed": 0}
    images, labels = np.zeros((5, 8, 8, 1), np.uint8), np.array([0, 0, 0, 1, 1])
    weights = np.array([1, 1, 1, 1, 0.25], np.float32)
    arguments = (images, labels, weights, 3, "test", trained.store.context)
    with pytest.raises(Stop) as found:
        classifier.train_on(tmp_path, config, *arguments)
    assert found.value.args[0].tolist() == [3, 1.25, 0]


def _first_batch(trained, tmp_path, monkeypatch, **changes):
    """What the objective is given in the first step on 40 images of noise: its arguments, the images and
    the rows of the batch."""
    made = classifier.make_objective

    def make(*arguments):
        objective = made(*arguments)

        def forward(*given):
            raise Stop(*given)

        objective.forward = forward
        return objective

    monkeypatch.setattr(classifier, "make_objective", make)
    draws = np.random.default_rng(0)
    images, labels = draws.integers(0, 256, (40, 8, 8, 1), np.uint8), draws.integers(0, 3, 40)
    weights = draws.random(40).astype(np.float32)
    recipe = trained.config.classifier.model_copy(update={"batch_size": 16, **changes})
    config = {"classifier": recipe.settings(), "seed": 0}
    with pytest.raises(Stop) as stopped:
        classifier.train_on(
            tmp_path, config, images, labels, weights, 3, "test", trained.store.context
        )
    rows = batch_indices(40, 16, 0, derive_seed(0, "test", "order"))
    views, y, w, step, lam = stopped.value.args
    assert y.tolist() == labels[rows].tolist() and w.tolist() == weights[rows].tolist()
    assert step == 0
    return views, lam, to_float(images[rows]), recipe


@pytest.mark.parametrize("policy", ["none", "autoaugment"])
def test_a_step_sees_augmented_images_their_labels_and_weights(
    trained, tmp_path, monkeypatch, policy
):
    changes = {"policy": policy, "cutout": 2, "flip": True, "shift": 1}
    (view,), lam, x, recipe = _first_batch(trained, tmp_path, monkeypatch, **changes)
    assert torch.equal(view, augment(x, recipe, policy, 2, 0, "test", 0, 0)) and lam == 1.0
    assert not torch.equal(view, x)


def test_a_step_mixes_where_it_is_asked_to(trained, tmp_path, monkeypatch):
    plain, lam, *_ = _first_batch(trained, tmp_path, monkeypatch)
    mixed, share, *_ = _first_batch(trained, tmp_path, monkeypatch, mix="mixup")
    assert lam == 1.0 and 0 < share < 1 and not torch.equal(mixed[0], plain[0])


def test_two_views_differ_where_a_method_contrasts_them(trained, tmp_path, monkeypatch):
    changes = {"method": "paco", "second_policy": "rotate", "queue_size": 200}
    views, *_ = _first_batch(trained, tmp_path, monkeypatch, **changes)
    assert len(views) == 2 and not torch.equal(*views)


def test_the_optimiser_has_the_recipes_settings(trained, tmp_path, monkeypatch):
    def sgd(parameters, lr, momentum, **settings):
        raise Stop(lr, momentum, settings)

    monkeypatch.setattr(torch.optim, "SGD", sgd)
    changes = {"classifier.lr": 0.07, "classifier.weight_decay": 3e-4, "classifier.nesterov": False}
    with pytest.raises(Stop) as stopped:
        Pipeline(vary(trained.config, changes), tmp_path, "cpu", False).train_on_real()
    assert stopped.value.args == (0.07, 0.9, {"weight_decay": 3e-4, "nesterov": False})


@pytest.mark.parametrize(
    "stage",
    ["train_extractor", "train_on_real", "train_diffusion", "train_classifier", "train_sau"],
)
def test_another_seed_is_another_run_on_the_same_data(pipeline, stage):
    changes = {"n_draws": 1, "classifier.method": "bsce", "filtering.keep": "all", "sau.n_steps": 2}
    if stage in ("train_classifier", "train_sau"):  # on the images of one generator
        changes["diffusion.seed"] = 0
    variants = [pipeline.vary({**changes, "seed": seed}) for seed in (0, 1)]
    assert variants[0].data().key == variants[1].data().key
    first, second = (getattr(p, stage)().array("loss")[0] for p in variants)
    assert not np.array_equal(first, second)
