"""SAU's two branches against the formulas, and its checkpoint, killed and resumed."""

import copy
import math
import shutil

import numpy as np
import pytest
import torch

from difflt_core import Pipeline, load_config
from difflt_core.benchmarks.cost import planned
from difflt_core.data.augment import augment, cutmix, mixup
from difflt_core.data.long_tail import load_split, to_float
from difflt_core.engine.scheduler import Planner
from difflt_core.engine.seeding import generator, host_draws
from difflt_core.experiments.results import accuracy
from difflt_core.notebooks import find_notebooks
from difflt_core.recognition import sau as sau_module
from difflt_core.recognition.networks import make_backbone, split_norms
from difflt_core.recognition.sau import (
    SauNet,
    SauSteps,
    contrastive_loss,
    is_noise,
    prototypes,
    soft_cross_entropy,
)

K, D = 3, 5


def unit(*shape) -> torch.Tensor:
    g = generator(0, "unit", *shape)
    return torch.nn.functional.normalize(
        torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1
    )


def by_hand(z2, z3, y, noise, p2, p3, strategy, tau=0.1) -> float:
    """The formula, item by item."""
    items = []  # (vector, label, is masked)
    for z, p in ((z2, p2), (z3, p3)):
        for i in range(len(y)):
            noisy = bool(noise[i]) and strategy != "trust"
            if noisy and strategy == "drop":
                continue
            label = ("noise", i) if noisy else int(y[i])
            items.append((z[i], label, noisy and strategy == "neg_only"))
        items += [(p[c], c, False) for c in range(len(p))]
    total, n_anchors = 0.0, 0
    for i, (a, label, masked) in enumerate(items):
        if masked:
            continue
        n_anchors += 1
        others = [k for k in range(len(items)) if k != i]
        denominator = sum(math.exp(float(a @ items[k][0]) / tau) for k in others)
        positives = [k for k in others if items[k][1] == label and not items[k][2]]
        logs = [float(a @ items[k][0]) / tau - math.log(denominator) for k in positives]
        total -= sum(logs) / max(1, len(positives))
    return total / n_anchors


BATCHES = {
    "mixed": [False, True, False, True, False, False],
    "no synthetic": [False] * 6,
    "noise alone": [True] * 6,
}


@pytest.mark.parametrize("strategy", ["pos_neg", "neg_only", "drop", "trust"])
@pytest.mark.parametrize("batch", BATCHES)
def test_contrastive_loss_is_the_formula(strategy, batch):
    noise, y = torch.tensor(BATCHES[batch]), torch.tensor([0, 1, 2, 0, 1, 1])
    z2, z3 = unit(6, D).requires_grad_(), unit(6, D).flip(0).clone()
    p2, p3 = 0.7 * unit(K, D), 0.8 * unit(K, D).flip(0)  # means of unit vectors are shorter
    loss = contrastive_loss(z2, z3, y, noise, p2, p3, strategy)
    wanted = by_hand(z2.detach(), z3, y, noise, p2, p3, strategy)
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-10)
    assert torch.isfinite(loss)
    loss.backward()
    assert torch.isfinite(z2.grad).all()
    if strategy == "drop":
        assert (z2.grad[noise] == 0).all()


def test_contrastive_loss_of_the_prototypes_alone():
    none = torch.zeros(0, dtype=torch.int64)
    z, p = unit(1, D)[:0], unit(K, D)
    loss = contrastive_loss(z, z, none, none.bool(), p, p)
    assert float(loss) == pytest.approx(by_hand(z, z, none, none, p, p, "pos_neg"), rel=1e-10)


def test_relabelling_on_an_example():
    """Two classes on the axes. Image 0 is real. 1 agrees in both views, 2 in one only, 3 in none."""
    a, b = [1.0, 0.0], [0.0, 1.0]
    z2, z3 = torch.tensor([a, a, a, b]), torch.tensor([a, a, b, b])
    y, synthetic = torch.tensor([0, 0, 0, 0]), torch.tensor([False, True, True, True])
    p = torch.tensor([a, b])
    assert is_noise(z2, z3, y, synthetic, p, p).tolist() == [False, False, True, True]
    assert not is_noise(z2, z3, y, torch.zeros(4, dtype=torch.bool), p, p).any()
    every = torch.ones(4, dtype=torch.bool)  # no real image in the batch: prototypes alone decide
    assert is_noise(z2, z3, y, every, p, p).tolist() == [False, False, True, True]


def test_a_prototypes_length_does_not_count_in_relabelling():
    z = torch.tensor([[0.8, 0.6]])
    p = torch.tensor([[0.1, 0.0], [0.0, 1.0]])  # class 0 is nearer in angle, class 1 longer
    assert not is_noise(z, z, torch.tensor([0]), torch.tensor([True]), p, p).any()


def test_mixup_and_its_target():
    x, other = torch.ones(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    assert torch.allclose(mixup(x, other, 0.3), torch.full_like(x, 0.3))
    logits, y, other_y = torch.randn(4, K), torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 0, 2])
    soft = 0.3 * torch.eye(K)[y] + 0.7 * torch.eye(K)[other_y]
    wanted = -(soft * logits.log_softmax(1)).sum(1).mean()
    assert torch.allclose(soft_cross_entropy(logits, y, other_y, 0.3), wanted)


def test_cutmix_reports_the_area_that_stays():
    x, other, shares = torch.ones(2, 3, 8, 8), torch.zeros(2, 3, 8, 8), []
    for i in range(50):
        mixed, share = cutmix(x, other, 0.5, host_draws(0, i))
        assert float(mixed.mean()) == pytest.approx(share)
        shares.append(share)
    whole = round(8 * 0.5**0.5)  # a box of six pixels
    assert min(shares) == 1 - whole**2 / 64 and max(shares) > 0.6  # cut off at the border
    assert cutmix(x, other, 1.0, host_draws(0))[1] == 1


def test_one_forward_of_parts_equals_forwards_one_by_one():
    torch.manual_seed(0)
    one, many = (SauNet(make_backbone("small_cnn", K, 1, 8), 16, D) for _ in range(2))
    many.load_state_dict(one.state_dict())
    split_norms(many, 4)
    assert many.state_dict().keys() == one.state_dict().keys()
    parts = [torch.randn(6, 1, 8, 8) for _ in range(4)]
    wanted = torch.cat([one.project(one.net.features(x)) for x in parts])
    got = many.project(many.net.features(torch.cat(parts)))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    for name, value in one.state_dict().items():  # running statistics too
        torch.testing.assert_close(many.state_dict()[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("branches, n_views", [("both", 4), ("aware", 2)])
def test_a_step_leaves_batch_norm_as_forwards_one_by_one(trained, monkeypatch, branches, n_views):
    """In the authors' code every view passes through the whole network, projector included."""
    sau = sau_steps(trained, branches=branches)
    plain, forward, seen = copy.deepcopy(sau.model), sau.model.net.features, []

    def features(x):
        if sau.model.training:
            seen.append(x)
        return forward(x)

    monkeypatch.setattr(sau.model.net, "features", features)
    sau.step(0)
    (views,) = seen
    assert len(views) == n_views * sau.recipe.batch_size
    split_norms(plain, 1)
    for view in views.chunk(n_views):
        plain.project(plain.net.features(view))
    before = sau_steps(trained, branches=branches).model.state_dict()
    for name, wanted in plain.named_buffers():
        assert not torch.equal(wanted, before[name]), name
        torch.testing.assert_close(
            sau.model.get_buffer(name), wanted, atol=1e-5, rtol=1e-4, msg=name
        )


def test_views_are_the_authors(trained):
    """v2: AutoAugment and a black box; v3: the contrastive view, without one."""
    sau = sau_steps(trained, policy="autoaugment", cutout=4, second_policy="contrastive")
    x = torch.rand(6, 1, 8, 8)
    for v, wanted in ((2, ("autoaugment", 4)), (3, ("contrastive", 0))):
        theirs = augment(x, sau.recipe, *wanted, sau.seed, "sau", 5, v)
        assert torch.equal(sau._view(v, 5)(x), theirs) and not torch.equal(theirs, x)


@pytest.mark.parametrize("profile, cutout", [("photos", 8), ("cifar10", 16), ("cifar100", 16)])
def test_profiles_have_the_authors_views(profile, cutout):
    sau = load_config(profile).sau
    found = (sau.policy, sau.cutout, sau.second_policy, sau.flip, sau.border)
    border = load_config(profile).classifier.border
    assert found == ("autoaugment", cutout, "contrastive", True, border)


def test_sau_and_what_it_is_held_against_have_one_network():
    """Nodes that no other reads are the rows of notebook 10's tables; phi_0 may be smaller."""
    notebook = next(n for n in find_notebooks() if n.number == "10")
    nodes = planned(notebook, "cifar10", seeds=[0])
    read = {artifact.key for node in nodes.values() for artifact in node.inputs.values()}
    archs: dict[str, set] = {}
    for key, node in nodes.items():
        settings = node.config.get("sau") or node.config.get("classifier") or {}
        if "arch" in settings and (key not in read or node.stage.name == "sau"):
            archs.setdefault(node.stage.name, set()).add(settings["arch"])
    assert archs == {stage: {"resnet32x4"} for stage in ("extractor", "classifier", "sau")}


def test_parameters_of_the_authors_network():
    model = SauNet(make_backbone("resnet32x4", 100, 3), 2048, 128)
    assert sum(p.numel() for p in model.parameters()) == 12_402_468
    assert sum(p.numel() for p in model.net.parameters()) == 7_409_316


def test_prototypes_are_means_of_unit_vectors():
    torch.manual_seed(0)
    model = SauNet(make_backbone("small_cnn", K, 1, 8), 16, D)
    x, y = torch.randn(10, 1, 8, 8), torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    same, mirrored = prototypes(
        model, lambda i: x[i], y, K, [lambda a, _: a, lambda a, _: a.flip(-1)], batch_size=4
    )
    z = model.eval().project(model.net.features(x))
    wanted = torch.stack([z[y == c].mean(0) for c in range(K)])
    torch.testing.assert_close(same, wanted)
    assert same.shape == mirrored.shape == (K, D) and (same.norm(dim=1) < 1).all()


@pytest.fixture
def pipeline(trained, tmp_path):
    shutil.copytree(trained.store.root, tmp_path / "runs" / "cache")
    return Pipeline(trained.config, tmp_path, "cpu", progress=False)


def test_views_are_drawn_in_full_precision(pipeline):
    """On a GPU the contrastive view would mix halves and floats."""
    p = pipeline.vary({"sau.second_policy": "contrastive", "sau.policy": "autoaugment"})
    sau = sau_steps(p)
    x = torch.rand(4, 1, 8, 8) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        views = [sau._view(v, 0)(x) for v in (2, 3)]
    assert {view.dtype for view in views} == {torch.float32}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sau.branches": "unaware"},
        {"sau.branches": "aware"},
        {"sau.strategy": "neg_only"},
        {"sau.strategy": "drop", "sau.cutmix_label": "nominal"},
        {"sau.prototypes": "second draw"},
        {"sau.norm_statistics": "images"},
    ],
)
def test_each_variant_trains(pipeline, changes):
    p = pipeline.vary({"sau.n_steps": 6, **changes})
    assert 0 <= accuracy(p, p.train_sau())["overall"] <= 100
    curve = p.train_sau().array("loss")
    assert curve.shape == (6, 4) and np.isfinite(curve).all()
    assert (curve[:, 1].any(), curve[:, 3].all()) == (
        changes.get("sau.branches") != "unaware",
        True,
    )


def _step(trained, monkeypatch, noisy, **changes):
    """The first step of SAU: what its losses are given, and what it logs. noisy: of (y, synthetic), in
    is_noise's place."""
    sau, given = sau_steps(trained.vary({f"sau.{k}": v for k, v in changes.items()})), {"lam": []}
    mixing = sau_module.soft_cross_entropy

    def contrast(z2, z3, y, noise, p2, p3, strategy, tau):
        given.update(noise=noise, strategy=strategy, tau=tau)
        return contrastive_loss(z2, z3, y, noise, p2, p3, strategy, tau)

    def cross_entropy(logits, y, other, lam):
        given["lam"].append(lam)
        return mixing(logits, y, other, lam)

    monkeypatch.setattr(
        sau_module, "is_noise", lambda z2, z3, y, synthetic, *_: noisy(y, synthetic)
    )
    monkeypatch.setattr(sau_module, "contrastive_loss", contrast)
    monkeypatch.setattr(sau_module, "soft_cross_entropy", cross_entropy)
    return given, sau.step(0)[1]


@pytest.mark.parametrize("strategy", ["pos_neg", "neg_only", "drop"])
def test_a_step_hands_noise_strategy_and_temperature_on(trained, monkeypatch, strategy):
    changes = {"strategy": strategy, "temperature": 0.3}
    given, logged = _step(trained, monkeypatch, lambda _, synthetic: synthetic, **changes)
    assert given["noise"].any() and not given["noise"].all()
    assert (given["strategy"], given["tau"]) == (strategy, 0.3)
    assert logged[2] == logged[3] == given["noise"].sum()
    _, logged = _step(trained, monkeypatch, lambda y, _: torch.zeros_like(y, dtype=bool), **changes)
    assert logged[2] == 0 < logged[3]


def test_a_step_mixes_by_its_alpha_and_its_label(trained, monkeypatch):
    def none(y, _):
        return torch.zeros_like(y, dtype=bool)

    nominal, area, mild = (
        _step(trained, monkeypatch, none, **changes)[0]["lam"]
        for changes in ({"cutmix_label": "nominal"}, {"cutmix_label": "area"}, {"mix_alpha": 0.01})
    )
    assert nominal[0] == area[0] and nominal[1] != area[1]  # MixUp's, and CutMix's
    assert min(mild[0], 1 - mild[0]) < 0.01 < min(area[0], 1 - area[0])


def test_a_second_draw_brings_in_what_the_long_tail_leaves_out(trained):
    train = {image.tobytes() for image in load_split(trained.data(), "train").images}
    for prototypes_of, known in (("trained", True), ("second draw", False)):
        sau = sau_steps(trained.vary({"sau.prototypes": prototypes_of}))
        real = sau.read_reference(np.arange(len(sau.reference_y)))
        pictures = ((real + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        assert all(picture.tobytes() in train for picture in pictures) == known
        counts = load_split(trained.data(), "train").class_counts
        assert (
            np.bincount(sau.reference_y.numpy(), minlength=len(counts)).tolist() == counts.tolist()
        )


def test_statistics_of_the_images_change_no_weight(pipeline):
    """Batch norm's means of the first layer are those of the images as they are, not of the views."""
    p = pipeline.vary({"sau.n_steps": 12})
    of_views, of_images = (
        p.vary({"sau.norm_statistics": kind}).train_sau() for kind in ("views", "images")
    )
    planner = Planner(p.store)
    for kind in ("views", "images"):
        p.vary({"sau.norm_statistics": kind}).plan(planner, ["train_sau"])
    names = [node.stage.name for node in planner.nodes.values()]
    assert (names.count("sau"), names.count("statistics")) == (1, 1)  # one training for both
    assert np.array_equal(of_views.array("loss"), of_images.array("loss"))
    running = ("running_mean", "running_var", "num_batches_tracked")
    theirs, ours = of_views.tensors("model"), of_images.tensors("model")
    for name in theirs:
        assert torch.equal(theirs[name], ours[name]) != name.endswith(running), name

    net = make_backbone(**of_images.json("model"))
    net.load_state_dict(ours)
    conv, norm = (
        next(m for m in net.modules() if isinstance(m, kind))
        for kind in (torch.nn.Conv2d, torch.nn.BatchNorm2d)
    )
    train, made = load_split(p.data(), "train"), p.synthetic().array("images")
    with torch.no_grad():
        seen = conv(to_float(np.concatenate([train.images, made])))
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)), atol=0.02, rtol=0.05)


def test_a_training_killed_within_an_epoch_resumes_to_the_same_bytes(
    pipeline, tmp_path, dies_at, checkpoint_each_step
):
    p = pipeline.vary({"sau.n_steps": 12, "sau.batch_size": 64})
    other = Pipeline(p.config, tmp_path / "again", "cpu", progress=False)
    whole = p.train_sau()
    other.synthetic()
    dies_at(6)
    with pytest.raises(KeyboardInterrupt):
        other.train_sau()
    resumed = other.train_sau()
    assert np.array_equal(resumed.array("loss"), whole.array("loss"))
    for name, tensor in whole.tensors("model").items():
        assert torch.equal(tensor, resumed.tensors("model")[name]), name


def sau_steps(pipeline, **changes):
    p = pipeline.vary({f"sau.{name}": value for name, value in changes.items()})
    inputs = {"data": p.data(), "synthetic": p.generate()}
    if p.config.sau.prototypes == "second draw":
        inputs["pool"] = p.balanced("a second draw").data()
    return SauSteps({"sau": p.config.sau.settings(), "seed": 0}, inputs, p.store.context)


def test_synthetic_images_come_after_the_real_ones(trained):
    sau = sau_steps(trained)
    n = [
        len(a)
        for a in (load_split(trained.data(), "train").labels, trained.generate().array("labels"))
    ]
    x, y, synthetic = sau._batch(np.arange(sum(n)))
    assert synthetic.tolist() == [False] * n[0] + [True] * n[1]
    assert len(x) == sum(n) and y[n[0] :].tolist() == trained.generate().array("labels").tolist()


def test_prototypes_are_renewed_at_the_beginning_of_every_epoch(trained, monkeypatch):
    sau, at = sau_steps(trained), []
    renew = sau._renew_prototypes
    monkeypatch.setattr(sau, "_renew_prototypes", lambda k: (at.append(k), renew(k)))
    for k in range(2 * sau.steps_per_epoch + 1):
        sau.step(k)
    assert sau.steps_per_epoch > 1 and at == [0, sau.steps_per_epoch, 2 * sau.steps_per_epoch]


def test_without_the_unaware_branch_the_classifier_teaches_no_features(trained, monkeypatch):
    sau = sau_steps(trained, branches="aware")
    monkeypatch.setattr(sau_module, "contrastive_loss", lambda *_: torch.zeros(()))
    sau.step(0)[0].backward()
    net = sau.model.net
    assert all(p.grad is None or not p.grad.any() for p in net.trunk.parameters())
    assert all(p.grad.any() for p in net.heads.parameters())
