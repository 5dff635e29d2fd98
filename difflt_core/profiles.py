"""Settings by name: profiles (a whole run), parameters (of a notebook and of --set) and recipes (how a
published method trains its classifier).

Plain dictionaries in the standard library alone: the command line reads them before any package is
installed, and config.py validates them. Where a peer's number differs from a default,
docs/protocol.md says whose it is.
"""

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = [
    "DISK_GB",
    "IMAGENET_SAMPLE",
    "OWN_IMAGES",
    "PARAMETERS",
    "PROFILES",
    "RECIPES",
    "SAMPLE_FOLDER",
    "recipe",
    "setting_path",
    "unknown",
]

_SMOKE = {
    "data": {
        "n_max": 60,
        "imb_ratio": 10,
        "n_test": 20,
        "n_val": 10,
        "many_above": 30,
        "few_below": 15,
    },
    "extractor": {"n_steps": 60, "warmup_steps": 10},
    "diffusion": {
        "preset": "nano",
        "precision": "fp32",
        "n_steps": 60,
        "batch_size": 32,
        "warmup_steps": 10,
    },
    "sampling": {"n_steps": 5},
    "classifier": {"n_steps": 60, "warmup_steps": 10},
    "sau": {"n_steps": 30, "projector_width": 64, "cutout": 2},
    "metrics": {"n_per_class": 20},
    "seeds": (0, 1),
    "n_draws": 2,
}
# Five repeats, each on a long tail of its own; tuned on data_seed 1, seeds 101 and 102, by the validation
# part. On 8x8 digits SAU's own learning rate and contrastive view cost it accuracy, and its mixed images
# need more steps than plain ones; even mixing, and a batch norm that remembers it, are rows of table15.
_DEMO = {
    "extractor": {"n_steps": 800, "batch_size": 64},
    "diffusion": {
        "preset": "nano",
        "n_steps": 2400,
        "plain_share": 0.9,
        "schedule": "trapezoid",
        "alpha": 0.03,
    },
    "sampling": {
        "n_steps": 12,
        "sigma_min": 0.03,
        "sigma_max": 10.0,
        "guidance": 1.5,
        "guidance_from": 0.1,
        "guidance_to": 3.0,
        "precision": "auto",
    },
    "classifier": {"n_steps": 800, "batch_size": 64},
    "sau": {
        "n_steps": 1600,
        "batch_size": 64,
        "lr": 0.1,
        "weight_decay": 5e-4,
        "second_policy": "none",
        "mix_alpha": 0.2,
        "norm_statistics": "images",
    },
    "seeds": (0, 1, 2, 3, 4),
    "n_draws": 5,
}
# The paper's data with the peers' recipes (docs/protocol.md): ResNet-32 for 200 epochs (Training recipes,
# LDAM's), CBDM's network and schedule (CBDM), r = 100. Sized for a GPU; docs/scaling.md: what it costs.
_RESNET32 = {
    "arch": "resnet32",
    "lr": 0.1,
    "weight_decay": 2e-4,
    "nesterov": False,
    "schedule": "step",
    "flip": True,
    "shift": 4,
    "border": "black",
    "precision": "auto",
}
# SAU's own recipe: lr 0.01, weight decay 5e-3, cosine without warm-up (docs/protocol.md, SAU).
_SAU = {
    "arch": "resnet32x4",
    "precision": "auto",
    "flip": True,
    "shift": 4,
    "border": "black",
    "policy": "autoaugment",
    "cutout": 16,
    "projector_width": 2048,
}
_GPU_SAMPLING = {"guidance": 2.6, "precision": "auto", "n_steps": 20, "sigma_max": 80.0}
_CIFAR_DIFFUSION = {
    "parameterisation": "eps",
    "preset": "cifar",
    "precision": "auto",
    "n_steps": 300_000,
    "batch_size": 48,
    "lr": 2e-4,
    "schedule": "constant",
    "warmup_steps": 5000,
    "ema_decay": 0.9999,
    "flip": True,
    "tau": 1.0,
    "cbdm_labels": "prior",
    "alpha": 0.1,
}


# The same network by EDM in 10 million images, for one seed of table 7's rows within an hour of one H100
# on paper (docs/scaling.md). Nobody has run it: alpha, the learning rate and guidance are guesses.
_FAST_DIFFUSION = {
    "preset": "cifar",
    "n_steps": 19_600,
    "plain_share": 0.95,
    "batch_size": 512,
    "lr": 1e-3,
    "schedule": "trapezoid",
    "warmup_steps": 1000,
    "ema_decay": 0.9993,  # a half-life of 500,000 images, as EDM has it
    "flip": True,
    "class_balance": 0.5,
    "alpha": 0.03,
}
_FAST_SAMPLING = {
    "sigma_min": 0.01,
    "sigma_max": 40.0,
    "guidance": 1.5,
    "guidance_from": 0.1,
    "guidance_to": 3.0,
    "precision": "auto",
    "n_steps": 18,
}


def _cifar(name: str, n_classes: int, n_max: int) -> dict:
    """200 epochs of the set that is trained on, 5 of them warm-up: of the long-tailed one for phi_0
    and what is trained on real images, of the set filled up to n_max with generated ones."""
    recipe = {**_RESNET32, "epochs": 200, "warmup_epochs": 5}
    return {
        "data": {
            "name": name,
            "n_classes": n_classes,
            "n_max": n_max,
            "imb_ratio": 100,
            "image_size": 32,
        },
        "extractor": recipe,
        "diffusion": _CIFAR_DIFFUSION,
        "sampling": _GPU_SAMPLING,
        "classifier": recipe,
        "sau": {**_SAU, "epochs": 200},
        # As CBDM has it, with 10,000 generated images where CBDM has 50,000.
        "metrics": {
            "features": "inception",
            "reference": "balanced train",
            "n_per_class": 10_000 // n_classes,
        },
    }


_CIFAR10, _CIFAR100 = _cifar("cifar10", 10, 5000), _cifar("cifar100", 100, 500)
_FAST = {"diffusion": _FAST_DIFFUSION, "sampling": _FAST_SAMPLING}
# The same data saved as class folders of images, in the order of the original files, within half an hour
# of one H200 for notebook 11, by the rates that one had (docs/scaling.md): the fast profiles' generator
# in 1.2 million images, shared by the repeats, and as many updates for every classifier, where the
# protocol has 200 epochs.
_UPDATES = {"nesterov": True, "epochs": None, "n_steps": 10_000, "warmup_epochs": None}
_CIFAR10_FOLDER = {
    **_CIFAR10,
    "data": {**_CIFAR10["data"], "name": "folder", "n_classes": None},
    "extractor": {**_CIFAR10["extractor"], **_UPDATES},
    "diffusion": {
        **_FAST_DIFFUSION,
        "n_steps": 4800,
        "plain_share": 0.9,
        "batch_size": 256,
        "lr": 7e-4,
        "warmup_steps": 300,
        "ema_decay": 0.998,
        "seed": 0,
    },
    "sampling": _FAST_SAMPLING,
    "classifier": {**_CIFAR10["classifier"], **_UPDATES},
    "sau": {**_CIFAR10["sau"], "epochs": None, "n_steps": 10_000},
    "metrics": {"n_per_class": 1000},
    "seeds": (0, 1, 2),
}
_AS_IT_IS = {"n_classes": None, "n_max": None, "imb_ratio": None}
# ImageNet-LT at 64 pixels for phi_0 and the generator, with BALMS's ResNet-10, 90 epochs of batches of
# 512 (docs/protocol.md, ImageNet-LT): 227 steps each, and 2,500 on the set filled up to 1,280 per
# class. The final classifier reads 224-pixel crops. The generator's learning rate is Improved DDPM's
# on ImageNet 64.
_RESNET10 = {
    "arch": "resnet10",
    "precision": "auto",
    "batch_size": 512,
    "lr": 0.2,
    "warmup_steps": 0,
    "flip": True,
    "shift": 8,
}
_IMAGENET = {
    "data": {"name": "imagenet_lt", "image_size": 64, **_AS_IT_IS},
    "extractor": {**_RESNET10, "epochs": 90},
    "diffusion": {**_CIFAR_DIFFUSION, "preset": "imagenet64", "batch_size": 256, "lr": 1e-4},
    "sampling": _GPU_SAMPLING,
    "classifier": {**_RESNET10, "epochs": 90, "crop_size": 224, "ride_diversity": -0.2},
    "metrics": {"n_per_class": 10},
}
# Photographs and clothes at 16 pixels within two CPU cores' reach: n_max 1,000 of each class, so that
# validation images come from outside the cut; every training of a classifier has the same number of
# updates. Each repeat has a long tail of its own. The generator was chosen on 20,000 validation images
# of the draws of data seeds 0 and 10, SAU's numbers on those of the first, its strategy on both,
# guidance on that of 1 (docs/results.md): the profile's own are others.
_CLASSIFIER16 = {"n_steps": 3000, "flip": True, "shift": 2, "precision": "auto"}
_PHOTOS: dict[str, Any] = {
    "data": {
        "name": "cifar10",
        "n_classes": None,
        "n_max": 1000,
        "imb_ratio": 50,
        "image_size": 16,
        "many_above": 300,
        "few_below": 100,
    },
    "extractor": _CLASSIFIER16,
    "diffusion": {
        "preset": "small16",
        "n_steps": 6000,
        "plain_share": 0.9,
        "schedule": "trapezoid",
        "lr": 1e-3,
        "flip": True,
        "class_balance": 0.5,
        "alpha": 0.03,
    },
    "sampling": {
        "n_steps": 14,
        "sigma_min": 0.02,
        "sigma_max": 20.0,
        "guidance": 1.5,
        "guidance_from": 0.1,
        "guidance_to": 3.0,
        "precision": "auto",
    },
    "classifier": _CLASSIFIER16,
    "sau": {
        **_CLASSIFIER16,
        "lr": 0.1,
        "weight_decay": 5e-4,
        "policy": "autoaugment",
        "cutout": 8,
        "mix_alpha": 0.2,
        "norm_statistics": "images",
        "projector_width": 256,
        "strategy": "neg_only",  # pos_neg's classes of one image harm here
    },
    "data_seed": 2,
    "n_draws": 3,
}
_FASHION: dict[str, Any] = {
    **_PHOTOS,
    "data": {**_PHOTOS["data"], "name": "fashion_mnist", "imb_ratio": 100},
    "diffusion": {**_PHOTOS["diffusion"], "n_steps": 3000},
    "sau": {**_PHOTOS["sau"], "policy": "none"},
}
# An image folder of one's own, as it is, at 32 pixels; --hours fits the lengths to the machine. The
# generator is that of `photos` on squares of 2x2 pixels, SAU's numbers are those of `photos`.
_CLASSIFIER32 = {"n_steps": 3000, "flip": True, "shift": 4, "precision": "auto"}
_FOLDER = {
    "data": {"name": "folder", "image_size": 32, **_AS_IT_IS},
    "extractor": _CLASSIFIER32,
    "diffusion": {**_PHOTOS["diffusion"], "preset": "small32", "n_steps": 4000},
    "sampling": {**_PHOTOS["sampling"], "n_steps": 18, "sigma_min": 0.01},
    "classifier": _CLASSIFIER32,
    "sau": {**_PHOTOS["sau"], **_CLASSIFIER32, "cutout": 16},
    "seeds": (0, 1),
}
# Of a small folder that is made of the digits (experiments/sample_folder.py): it is read as it is.
# Notebook 12's begins with OWN_IMAGES.
OWN_IMAGES = "own-images"
SAMPLE_FOLDER = {"n_draws": 1, **{f"data.{name}": value for name, value in _AS_IT_IS.items()}}
# Notebook 06 at smoke and demo size: the digits as an ImageNet-shaped folder (imagenet_sample.py). n_seeds:
# so many of the run's repeats.
_SAMPLE = {
    **SAMPLE_FOLDER,
    "data.name": "imagenet_lt",
    "classifier.arch": "resnet10_cifar",
    "classifier.crop_size": 8,
    "classifier.batch_size": 64,
}
IMAGENET_SAMPLE: dict[str, dict] = {
    "smoke": {**_SAMPLE, "classifier.n_steps": 4, "classifier.batch_size": 16, "n_seeds": 1},
    "demo": {**_SAMPLE, "classifier.n_steps": 1800, "n_seeds": 5},
}
PROFILES: dict[str, dict] = {
    "smoke": _SMOKE,
    "demo": _DEMO,
    "photos": _PHOTOS,
    "fashion": _FASHION,
    "folder": _FOLDER,
    "cifar10": _CIFAR10,
    "cifar10-jpeg": _CIFAR10_FOLDER,
    "cifar10-fast": {**_CIFAR10, **_FAST},
    "cifar100": _CIFAR100,
    "cifar100-fast": {**_CIFAR100, **_FAST},
    "imagenet": _IMAGENET,
}

# Free disk that a profile needs, in GB.
DISK_GB = {
    "smoke": 0.5,
    "demo": 1.0,
    "photos": 2.0,
    "fashion": 2.0,
    "folder": 2.0,
    "cifar10": 8.0,
    "cifar10-jpeg": 8.0,
    "cifar10-fast": 8.0,
    "cifar100": 8.0,
    "cifar100-fast": 8.0,
    "imagenet": 20.0,  # 2.3 of real images, 14.3 of generated ones, and the models
}
# Flat names, as papermill and --set know them, and where they live in the tree.
PARAMETERS: dict[str, str] = {
    "dataset": "data.name",
    "path": "data.path",
    "n_classes": "data.n_classes",
    "n_max": "data.n_max",
    "imb_ratio": "data.imb_ratio",
    "imb_type": "data.imb_type",
    "image_size": "data.image_size",
    "nuisance": "data.nuisance",
    "n_extractor_steps": "extractor.n_steps",
    "tau": "diffusion.tau",
    "alpha": "diffusion.alpha",
    "parameterisation": "diffusion.parameterisation",
    "aid_reading": "diffusion.aid_reading",
    "aid_formula": "diffusion.aid_formula",
    "plain_share": "diffusion.plain_share",
    "class_balance": "diffusion.class_balance",
    "generator_augment": "diffusion.augment",
    "cbdm_weight": "diffusion.cbdm_weight",
    "schedule": "diffusion.schedule",
    "generator": "diffusion.preset",
    "n_diffusion_steps": "diffusion.n_steps",
    "sampler": "sampling.sampler",
    "n_sampling_steps": "sampling.n_steps",
    "guidance": "sampling.guidance",
    "guidance_from": "sampling.guidance_from",
    "guidance_to": "sampling.guidance_to",
    "fill_to": "sampling.fill_to",
    "aid_factor": "filtering.aid_factor",
    "radius": "filtering.radius",
    "keep": "filtering.keep",
    "synthetic_source": "synthetic.source",
    "synthetic_filtered": "synthetic.filtered",
    "synthetic_path": "synthetic.path",
    "text2image_pipeline": "synthetic.text2image.pipeline",
    "prompts": "synthetic.text2image.prompts",
    "n_text2image_steps": "synthetic.text2image.n_steps",
    "text2image_guidance": "synthetic.text2image.guidance",
    "text2image_surplus": "synthetic.text2image.surplus",
    "n_classifier_steps": "classifier.n_steps",
    "method": "classifier.method",
    "omega": "classifier.omega",
    "n_sau_steps": "sau.n_steps",
    "branches": "sau.branches",
    "strategy": "sau.strategy",
    "prototypes": "sau.prototypes",
    "cutmix_label": "sau.cutmix_label",
    "mix_alpha": "sau.mix_alpha",
    "norm_statistics": "sau.norm_statistics",
    "fid_features": "metrics.features",
    "fid_reference": "metrics.reference",
    "seeds": "seeds",
    "data_seed": "data_seed",
    "n_draws": "n_draws",
}

# How the methods' authors train on 32x32 images (docs/protocol.md, Training recipes), batch 128 unless
# it is named. Lengths are in epochs of the set that is trained on.
_STRONG = {**_RESNET32, "policy": "autoaugment", "cutout": 16}
_PACO = {
    **_STRONG,
    "second_policy": "contrastive",
    "lr": 0.05,
    "weight_decay": 5e-4,
    "schedule": "step10",
    "epochs": 400,
    "warmup_epochs": 10,
    "paco_alpha": 0.01,
    "paco_temperature": 0.05,
    "queue_size": 1024,
}
RECIPES: dict[str, dict] = {
    "ldam": {**_RESNET32, "epochs": 200, "warmup_epochs": 5},
    "ride": {
        **_RESNET32,
        "nesterov": True,
        "policy": "rotate",
        "weight_decay": 5e-4,
        "epochs": 200,
        "warmup_epochs": 5,
    },
    "bsce": {
        **_STRONG,
        "weight_decay": 5e-4,
        "schedule": "cosine",
        "batch_size": 512,
        "n_steps": 13_000,
        "warmup_steps": 800,
    },
    "paco": _PACO,
    "gpaco": {**_PACO, "lr": 0.1, "second_policy": "contrastive_blur02"},
}


def recipe(name: str, part: str = "classifier") -> dict:
    """Changes for config.vary that train the final classifier as the authors of a method do.

    Args:
        name: a key of RECIPES. part: "extractor": its length alone, which is also that of what is
            trained on the real images.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {name!r}")
    settings = {"method": name, **RECIPES[name]}
    if part == "extractor":
        settings = {k: v for k, v in settings.items() if k.endswith(("_steps", "epochs"))}
    return {f"{part}.{key}": value for key, value in settings.items()}


def setting_path(name: str) -> str | None:
    """Where the setting of a parameter lives in the tree; a name with a dot is such a path already. None
    for any other name."""
    return PARAMETERS.get(name, name if "." in name else None)


def unknown(kind: str, name: str, known: Iterable[str], meant: Iterable[str] = ()) -> str:
    """The error text for a name that is none of the known ones. meant: what it may stand for; else the
    nearest of the known ones."""
    known = list(known)
    close = list(meant) or difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"unknown {kind} {name!r}{hint} (known: {', '.join(known)})"
