"""Generation: which images are wanted, and that an image depends on (model, seed, class, number)
alone."""

import numpy as np
import pytest

from difflt_core.config import SamplingConfig
from difflt_core.diffusion import load_diffusion, make_schedule
from difflt_core.sampling import build_samples, generate, wanted_labels


def test_every_class_is_filled_up():
    assert wanted_labels([4, 3, 1]).tolist() == [1, 2, 2, 2]
    assert wanted_labels([4, 3, 1], fill_to=5).tolist() == [0, 1, 1, 2, 2, 2, 2]
    assert wanted_labels([4, 3, 1], fill_to=2).tolist() == [2]
    assert len(wanted_labels([4, 4])) == 0


def test_cifar100_needs_39153_images():
    from difflt_core.data import class_sizes

    assert len(wanted_labels(class_sizes(100, 500, 100))) == 39153


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "dpm++ karras"])
def test_batch_size_and_order_change_no_image(trained, sampler):
    unet = load_diffusion(trained.train_diffusion())
    schedule = make_schedule(trained.config.diffusion)
    config = SamplingConfig(sampler=sampler, n_steps=4)
    labels, indices = np.array([0, 3, 3, 9, 9]), np.array([0, 0, 1, 0, 7])
    together = generate(unet, schedule, config, labels, indices, seed=5).astype(int)
    order = [4, 2, 0, 1, 3]
    alone = np.concatenate(
        [generate(unet, schedule, config, labels[[i]], indices[[i]], seed=5) for i in order]
    ).astype(int)
    assert (
        np.abs(together[order] - alone).max() <= 1
    )  # rounding of another batch shape, one grey level
    assert together.shape == (5, 8, 8, 1) and np.abs(together[1] - together[2]).max() > 10


def test_guidance_one_is_the_conditional_model(trained):
    """At guidance 1 the null prediction cancels; at 3 it does not."""
    unet = load_diffusion(trained.train_diffusion())
    schedule = make_schedule(trained.config.diffusion)
    labels, indices = np.array([0, 9]), np.array([0, 0])
    one, three = (
        generate(unet, schedule, SamplingConfig(n_steps=4, guidance=g), labels, indices, 0)
        for g in (1, 3)
    )
    assert not np.array_equal(one, three)


class _Killed(Exception):
    pass


def test_generation_continues_after_a_kill(trained, tmp_path, monkeypatch):
    config = {
        "sampling": trained.config.sampling.model_dump() | {"batch_size": 50},
        "diffusion": trained.config.diffusion.model_dump(),
        "seed": 0,
    }
    inputs = {"data": trained.data(), "diffusion": trained.train_diffusion()}
    drawn = []

    def dying(*args):
        if len(drawn) == 3:
            raise _Killed
        drawn.append(args[4])
        return generate(*args)

    (tmp_path / "out").mkdir()
    monkeypatch.setattr("difflt_core.sampling.generate", dying)
    with pytest.raises(_Killed):
        build_samples(tmp_path, config, inputs, trained.store.context)
    monkeypatch.setattr(
        "difflt_core.sampling.generate", lambda *a: drawn.append(a[4]) or generate(*a)
    )
    build_samples(tmp_path, config, inputs, trained.store.context)
    whole = trained.generate().array("images")
    assert sum(map(len, drawn)) == len(whole)  # nothing was drawn twice
    assert (
        np.abs(np.load(tmp_path / "out" / "images.npy").astype(int) - whole.astype(int)).max() <= 1
    )


def test_another_seed_gives_other_images(trained):
    other = trained.vary({"seed": 1, "diffusion.n_steps": 1, "extractor.n_steps": 1})
    assert not np.array_equal(other.generate().array("images"), trained.generate().array("images"))
