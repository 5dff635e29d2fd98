"""Bad settings: one clear line each, before anything runs."""

import pytest

from difflt_core import load_config, vary
from difflt_core.config import PARAMETERS, DiffusionConfig, parse_parameters
from difflt_core.data.long_tail import class_sizes
from difflt_core.profiles import recipe


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"imb_ratio": 0.01}, "imb_ratio: input should be greater than or equal to 1, got 0.01"),
        ({"imb_ratio": 1000}, "leaves the rarest class without an image"),
        ({"omega": -0.1}, "omega: input should be greater than or equal to 0, got -0.1"),
        ({"n_classes": 11}, "n_classes: digits has 10 classes, got 11"),
        ({"keep": "some"}, "keep: input should be 'all'"),
        ({"tau": "much"}, "tau: input should be a valid number"),
        ({"tau": float("nan")}, "tau: input should be a finite number"),
        (
            {"n_sampling_steps": 2000, "sampler": "ddim", "parameterisation": "eps"},
            "n_sampling_steps: ddim expects a divisor of 1000",
        ),
        ({"sampler": "ddim"}, "use it with parameterisation eps"),
        ({"tua": 1}, "unknown parameter 'tua'; did you mean 'tau'?"),
        ({"diffusion.lt": 1}, "unknown setting 'diffusion.lt'; did you mean 'diffusion.lr'?"),
        ({"tau": 1, "diffusion.tau": 2}, "tau and diffusion.tau are one setting, diffusion.tau"),
        (
            {"n_classifier_steps": 9, "classifier.epochs": 2},
            "n_classifier_steps and classifier.epochs are one length; give one of them",
        ),
        ({"lr": 1}, "mean 'extractor.lr' or 'diffusion.lr' or 'classifier.lr' or 'sau.lr'"),
        ({"diffusion.tau": None}, "tau: input should be a valid number, got None"),
        ({"seeds": []}, "seeds: expected at least one"),
        ({"diffusion.aid_max_alpha_bar": 0.4}, "where L_AID looks at nothing"),
        ({"method": "paco", "classifier.queue_size": 63}, "whole batch of 64 images"),
    ],
)
def test_bad_parameters(changes, message):
    with pytest.raises(ValueError) as error:
        load_config("demo", **changes)
    assert message in str(error.value)


def test_the_plain_part_of_a_generator_is_a_whole_number_of_steps():
    """Stages read it, and it is in no key: another number would need other keys."""
    lengths = [
        DiffusionConfig(n_steps=n, plain_share=share, schedule="constant").n_plain_steps
        for n, share in ((7, 0.5), (2400, 0.9), (6000, 0.9), (19_600, 0.95), (10, 0))
    ]
    assert lengths == [3, 2160, 5400, 18_620, 0]


def test_unknown_profile():
    with pytest.raises(ValueError, match="unknown profile 'demmo'; did you mean 'demo'"):
        load_config("demmo")


def test_vary_changes_only_what_it_names():
    base = load_config("demo")
    varied = vary(base, {"diffusion.tau": 1.0})
    assert varied.diffusion.tau == 1.0 and base.diffusion.tau != 1.0
    assert vary(varied, {"diffusion.tau": base.diffusion.tau}) == base
    with pytest.raises(ValueError, match="unknown setting 'diffusion.tua'"):
        vary(base, {"diffusion.tua": 1})


@pytest.mark.parametrize("text, value", [("3,4", [3, 4]), ("[3, 4]", [3, 4]), ("7", [7])])
def test_seeds_from_the_command_line(text, value):
    assert parse_parameters([("seeds", text)]) == {"seeds": value}


def test_every_parameter_names_a_setting():
    config = load_config("demo")
    for path in PARAMETERS.values():
        node = config
        for name in path.split("."):
            node = getattr(node, name)


def test_values_keep_their_type():
    given = [("tau", "1"), ("n_max", "50"), ("keep", "all"), ("diffusion.lr", "3e-4")]
    values = parse_parameters(given)
    assert values == {"tau": 1.0, "n_max": 50, "keep": "all", "diffusion.lr": 3e-4}
    assert load_config("demo", **values).diffusion.lr == 3e-4
    assert parse_parameters([("diffusion.tau", "2")]) == {"tau": 2.0}, "a setting has one name"
    none = parse_parameters([("sampling.guidance_to", "None")], "photos")
    assert none == {"sampling.guidance_to": None}
    assert load_config("photos", **none).sampling.guidance_to is None
    assert load_config("photos", guidance_to=None).sampling.guidance_to == 3.0
    assert isinstance(values["tau"], float) and isinstance(values["n_max"], int)
    with pytest.raises(ValueError, match="n_max: input should be a valid integer"):
        parse_parameters([("n_max", "many")])


@pytest.mark.parametrize("order", [1, -1])
def test_values_that_only_fit_together_are_taken_together(order):
    given = [("n_max", "20"), ("imb_ratio", "10")][::order]  # the demo's ratio is 50
    assert parse_parameters(given) == {"n_max": 20, "imb_ratio": 10.0}
    with pytest.raises(ValueError, match="leaves the rarest class without an image"):
        parse_parameters([("n_max", "20")])


def test_repeats_take_draws_of_the_data_in_turn():
    config = load_config("photos", seeds=(4, 5, 6, 7), n_draws=3, data_seed=1)
    assert [vary(config, {"seed": s}).draw for s in config.seeds] == [1, 11, 21, 1]
    assert vary(config, {"seed": 99}).draw == 1  # no repeat
    assert load_config("cifar10").n_draws == 1  # the community's one subset
    with pytest.raises(ValueError, match="share one generator .* expected 1, got 2"):
        load_config("cifar10-jpeg", n_draws=2)


@pytest.mark.parametrize("n", [49, 98, 103])
def test_the_rarest_class_is_counted_as_the_protocol_counts(n):
    """n * (1 / n) is below 1 in float64, and the protocol truncates."""
    assert class_sizes(10, n, n)[-1] == 0
    with pytest.raises(ValueError, match="leaves the rarest class without an image"):
        load_config("demo", n_max=n, imb_ratio=n)
    assert class_sizes(10, n, load_config("demo", n_max=n, imb_ratio=n - 1).data.imb_ratio)[-1] == 1


@pytest.mark.parametrize("change", [{"policy": "autoaugment"}, {"cutout": 8}])
def test_crops_refuse_changes_that_they_do_not_make(change):
    with pytest.raises(ValueError, match="crops of image files .crop_size. have no such change"):
        vary(load_config("imagenet"), {f"classifier.{k}": v for k, v in change.items()})


def test_ldams_recipe_has_no_nesterov_and_rides_has():
    assert not load_config("cifar100").classifier.nesterov
    of = {name: vary(load_config("cifar100"), recipe(name)).classifier for name in ("ldam", "ride")}
    assert (of["ldam"].nesterov, of["ride"].nesterov) == (False, True)


@pytest.mark.parametrize("name, steps", [("ldam", 17_000), ("bsce", 13_000), ("paco", 34_000)])
def test_a_published_recipe_is_as_long_on_the_real_images(name, steps):
    """Of CIFAR100-LT's 10,847, in batches of 128, where the recipe counts epochs."""
    found = vary(load_config("cifar100"), recipe(name) | recipe(name, "extractor"))
    assert found.extractor.in_steps(10_847).n_steps == steps
    assert found.extractor.method == "ce" and found.classifier.method == name
