"""What both training loops share: batches, checkpoints, and what stops a run."""

import re
import warnings

import numpy as np
import pytest
import torch
from safetensors import safe_open

from difflt_core import vary
from difflt_core.data.long_tail import load_split
from difflt_core.engine import checkpoint, loop, precision
from difflt_core.engine.checkpoint import load_checkpoint, save_checkpoint
from difflt_core.engine.loop import check_loss, lr_factor
from difflt_core.engine.seeding import batch_indices, weighted_indices


def test_every_epoch_holds_every_image_once():
    seen = np.concatenate([batch_indices(10, 4, step, seed=1) for step in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


def test_weighted_draws_are_as_often_as_their_weights():
    weights = np.array([0.0, 1.0, 3.0, 0.0, 4.0])
    drawn = [weighted_indices(weights.cumsum(), 50, step, seed=1) for step in range(200)]
    assert np.bincount(np.concatenate(drawn), minlength=5) / 1e4 == pytest.approx(
        weights / weights.sum(), abs=0.02
    )
    assert np.array_equal(drawn[7], weighted_indices(weights.cumsum(), 50, 7, seed=1))


def test_warmup_then_each_schedule():
    assert [lr_factor("cosine", s, 12, 2) for s in (0, 1, 2, 7)] == pytest.approx([0.5, 1, 1, 0.5])
    assert lr_factor("cosine", 11, 12, 2) < 0.03
    assert [lr_factor("constant", s, 12, 2) for s in (0, 11)] == [0.5, 1]
    epochs = [lr_factor("step", e * 10, 2000, 50) for e in (159, 160, 179, 180)]
    assert epochs == [1, 0.01, 0.01, 1e-4]
    epochs = [lr_factor("step10", e * 10, 4000, 100) for e in (319, 320, 359, 360)]
    assert epochs == pytest.approx([1, 0.1, 0.1, 0.01])
    held = [lr_factor("trapezoid", s, 12, 2, hold_steps=6) for s in (0, 1, 2, 6, 9, 11)]
    assert held == pytest.approx([0.5, 1, 1, 1, 0.5, 1 / 6])
    assert lr_factor("trapezoid", 7, 12, 2) == pytest.approx(0.5)  # nothing is held


@pytest.fixture
def parts():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_a_checkpoint_gives_everything_back(parts, tmp_path):
    model, optimizer = parts
    save_checkpoint(tmp_path, 7, model, optimizer, {"curve": torch.arange(3)}, {"lr": 0.1})
    other = torch.nn.Linear(3, 2)
    other_optimizer = torch.optim.AdamW(other.parameters(), fused=True)
    step, extra = load_checkpoint(tmp_path, other, other_optimizer, {"lr": 0.1})
    assert step == 7 and extra["curve"].tolist() == [0, 1, 2]
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(
            optimizer.state[mine]["exp_avg_sq"], other_optimizer.state[theirs]["exp_avg_sq"]
        )


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:100], lambda data: data[:-1] + bytes([data[-1] ^ 1])],
    ids=["cut", "a bit"],
)
def test_the_one_before_is_kept_and_used_when_the_newest_is_damaged(parts, tmp_path, damage):
    model, optimizer = parts
    save_checkpoint(tmp_path, 1, model, optimizer)
    save_checkpoint(tmp_path, 2, model, optimizer)
    newest = tmp_path / "checkpoint.safetensors"
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.warns(UserWarning, match="cannot be read .* going on without it"):
        assert load_checkpoint(tmp_path, model, optimizer)[0] == 1


def test_a_damaged_one_may_be_set_aside_by_another_process_first(parts, tmp_path, monkeypatch):
    model, optimizer = parts
    save_checkpoint(tmp_path, 1, model, optimizer)
    save_checkpoint(tmp_path, 2, model, optimizer)
    newest, read = tmp_path / "checkpoint.safetensors", checkpoint._read_checkpoint

    def after_the_other(path):
        if path == newest:
            newest.rename(newest.with_suffix(".corrupt"))
        return read(path)

    monkeypatch.setattr(checkpoint, "_read_checkpoint", after_the_other)
    with pytest.warns(UserWarning, match="going on without it"):
        assert load_checkpoint(tmp_path, model, optimizer)[0] == 1
    assert newest.with_suffix(".corrupt").exists()


def test_another_runs_checkpoint_is_refused_by_name(parts, tmp_path):
    model, optimizer = parts
    save_checkpoint(
        tmp_path, 1, model, optimizer, recipe={"preset": "cifar", "tau": 1.0, "seed": 0}
    )
    with pytest.raises(
        ValueError, match=r"preset: 'cifar' there, 'tiny' here; tau: 1.0 there, 0.3 here"
    ):
        load_checkpoint(tmp_path, model, optimizer, {"preset": "tiny", "tau": 0.3, "seed": 0})
    assert (tmp_path / "checkpoint.safetensors").exists()


def test_nan_and_divergence_stop_with_the_step():
    curve = torch.tensor([[0.5, 0.0], [0.4, float("nan")], [0.4, 0.0]])
    with pytest.raises(FloatingPointError, match="step 101; the last good checkpoint is kept"):
        check_loss(curve, 100, "diffusion", 2.0)
    with pytest.raises(FloatingPointError, match="diverges: mean 5 in steps 100 to 101"):
        check_loss(torch.tensor([[4.0], [6.0]]), 100, "diffusion", 2.0)
    check_loss(torch.tensor([[1.9], [1.9]]), 0, "diffusion", 2.0)


def test_a_diverging_generator_stops_and_keeps_its_checkpoint(
    trained, tmp_path, checkpoint_each_step
):
    from difflt_core import Pipeline

    changes = {
        "diffusion.lr": 1e4,
        "diffusion.alpha": 0.0,
        "diffusion.warmup_steps": 0,
        "diffusion.clip_norm": 1e9,
    }
    changes |= {"diffusion.n_steps": 100}
    p = Pipeline(vary(trained.config, changes), tmp_path, "cpu", progress=False)
    with pytest.raises(FloatingPointError, match="Lower the learning rate") as stopped:
        p.train_diffusion()
    there = tmp_path / "runs" / "cache" / "diffusion"
    assert not list(there.glob("*/model.safetensors"))
    (kept,) = there.glob("*.work-*/checkpoint.safetensors")
    with safe_open(kept, "pt") as file:
        done = int(file.metadata()["step"])
    bad = [int(step) for step in re.findall(r"steps? (\d+)(?: to \d+)?", str(stopped.value))]
    assert 0 < done <= bad[0]  # of steps before the one that is blamed


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"diffusion.preset": "cifar", "data.image_size": 12},
            "preset 'cifar': expected an image size that divides by 8, got 12",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(trained, tmp_path, changes, message):
    from difflt_core import Pipeline

    p = Pipeline(vary(trained.config, changes), tmp_path, "cpu", progress=False)
    with pytest.raises(ValueError, match=message):
        p.train_diffusion()


def test_out_of_memory_says_what_to_try(trained, tmp_path, monkeypatch):
    from difflt_core import Pipeline
    from difflt_core.generation import training as diffusion

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(diffusion.StepLoss, "__call__", full)
    p = Pipeline(trained.config, tmp_path, "cpu", progress=False)
    said = r"a batch of 1 does not fit .*; take smaller images or a smaller network"
    with pytest.warns(UserWarning, match="in 32 parts"), pytest.raises(MemoryError, match=said):
        p.train_diffusion()
    assert "try --set sau.batch_size=16. The" in str(
        precision.out_of_memory(RuntimeError("full"), "sau.batch_size", 32)
    )


def test_auto_is_bf16_where_the_device_is_fast_at_it(monkeypatch):
    for fast in (True, False):
        monkeypatch.setattr(precision, "fast_bf16", lambda _, fast=fast: fast)
        assert precision.half_precision("auto", "cpu") is fast
    assert precision.half_precision("bf16", "cpu") and not precision.half_precision("fp32", "cpu")


def test_bf16_trains_and_samples(trained, tmp_path):
    from difflt_core import Pipeline

    changes = {"diffusion.precision": "bf16", "sampling.precision": "bf16"}
    p = Pipeline(vary(trained.config, changes), tmp_path, "cpu", progress=False)
    images = p.generate().array("images")
    full, half = (q.train_diffusion().array("loss")[0, 0] for q in (trained, p))
    assert half == pytest.approx(full, rel=0.02) and half != full
    assert len(np.unique(images)) > 10


def test_gradients_of_parts_add_up_to_those_of_the_batch():
    """Where no more than two of eight rows fit into memory."""
    g = torch.Generator().manual_seed(0)
    x, net = torch.randn(8, 3, generator=g), torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    found = []
    for most in (8, 2):

        def step(k, part=0, n_parts=1, most=most):
            rows = x.chunk(n_parts)[part]
            if len(rows) > most:
                raise torch.OutOfMemoryError("no room")
            loss = net(rows).square().mean()
            return loss, loss[None]

        gradients = loop._Gradients(step, optimizer, None, True, "batch_size", 8)
        net.weight.grad = torch.full_like(net.weight, 9)  # of the step before
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append((gradients.of(0), net.weight.grad.clone()))
    torch.testing.assert_close(found[0], found[1])


def test_fewer_images_than_a_batch_train(trained, tmp_path):
    from difflt_core import Pipeline

    n = len(load_split(trained.data(), "train").labels)
    changes = {"diffusion.batch_size": n + 1, "diffusion.n_steps": 2}
    p = Pipeline(vary(trained.config, changes), tmp_path, "cpu", progress=False)
    assert np.isfinite(p.train_diffusion().array("loss")).all()
