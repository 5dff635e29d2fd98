"""What a run is: one frozen, validated tree of settings, the named profiles, and variations of
them.

A key of the cache is a hash of the resolved settings, so nothing that changes a result may live
outside this tree.
"""

from collections.abc import Iterable
from operator import attrgetter
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .profiles import PARAMETERS, PROFILES, setting_path, unknown

__all__ = [
    "ClassifierConfig",
    "DataConfig",
    "DiffusionConfig",
    "FilterConfig",
    "MetricsConfig",
    "RunConfig",
    "SamplingConfig",
    "SauConfig",
    "SyntheticConfig",
    "Text2ImageConfig",
    "TrainingConfig",
    "load_config",
    "parse_parameters",
    "vary",
]

PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


Precision = Literal["auto", "fp32", "bf16"]  # auto: bf16 where the device is fast at it
Policy = Literal[
    "none", "rotate", "autoaugment", "randaugment", "contrastive", "contrastive_blur02"
]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(_Config):
    """Which images, and how they are cut to a long tail (docs/protocol.md, Long-tail protocol)."""

    name: Literal["digits", "cifar10", "cifar100", "fashion_mnist", "imagenet_lt", "folder"] = (
        "digits"
    )
    path: str = ""  # of the files, inside the data folder; "" is the data folder itself
    n_classes: Annotated[int, Field(ge=2)] | None = 10  # None: as many as the data have
    n_max: PositiveInt | None = 400  # images of the largest class; None: what the data have
    imb_ratio: Annotated[float, Field(ge=1)] | None = 50.0  # n_max / n_min; None: no cut
    imb_type: Literal["exp", "step"] = "exp"
    image_size: Annotated[int, Field(ge=8, le=256)] = 8  # pixels
    n_test: PositiveInt = 200  # digits: balanced, per class
    # Per class, balanced, for tuning only: of digits, and of what a cut leaves out of an image set
    # without a validation part, where every class has as many
    n_val: PositiveInt = 100
    nuisance: Annotated[float, Field(ge=0, le=2)] = 1.0  # digits: of position, rotation, ...
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2  # folder without train/ and test/
    val_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    many_above: PositiveInt = 100  # shot groups: many n > 100
    few_below: PositiveInt = 20  # few n < 20, medium between

    @property
    def is_small(self) -> bool:
        """Whether two CPU cores are what it is run on: a stage has one of them, and the costly
        variants of a table one seed."""
        return self.image_size <= 16

    @property
    def own_classes(self) -> int | None:
        """How many classes the data set has, where no files are needed to know it."""
        known = {"digits": 10, "cifar10": 10, "cifar100": 100, "fashion_mnist": 10}
        return known.get(self.name)

    @property
    def from_files(self) -> bool:
        """Whether it is image files, in class sizes of their own."""
        return self.name in ("folder", "imagenet_lt")

    @model_validator(mode="after")
    def _check(self):
        known = self.own_classes
        size = {"cifar10": 32, "cifar100": 32, "fashion_mnist": 28}.get(self.name)
        if known and (self.n_classes or known) > known:
            raise ValueError(f"n_classes: {self.name} has {known} classes, got {self.n_classes}")
        if size and self.n_classes not in (None, known):
            raise ValueError(f"n_classes: {self.name} is used whole, with {known} classes")
        if size and self.image_size > size:
            raise ValueError(
                f"image_size: expected at most {size}, as {self.name} has, got {self.image_size}"
            )
        if self.name == "folder" and self.n_max and self.imb_ratio is None:
            raise ValueError(
                f"n_max: {self.n_max} cuts nothing without imb_ratio; add --set imb_ratio=R, or leave n_max out"
            )
        if not self.from_files and None in (self.n_max, self.imb_ratio):
            raise ValueError(f"n_max, imb_ratio: {self.name} needs both")
        if self.name == "digits" and self.path:
            raise ValueError(
                f"path: the digits are embedded, got {self.path!r}; for images in class folders use "
                "profile folder, or dataset=folder"
            )
        if self.name == "digits" and self.n_classes is None:
            raise ValueError("n_classes: digits need it, up to 10; got none")
        sizes = (self.n_classes, self.n_max, self.imb_ratio)
        if self.name == "imagenet_lt" and any(size is not None for size in sizes):
            raise ValueError(
                f"n_classes, n_max, imb_ratio: imagenet_lt is used as its lists have it, got {sizes}; "
                "leave them out"
            )
        # the protocol truncates n_max * (1 / r): 49 * (1 / 49) is below 1
        if self.n_max and self.imb_ratio and int(self.n_max * (1 / self.imb_ratio)) < 1:
            raise ValueError(
                f"imb_ratio: {self.imb_ratio:g} with n_max={self.n_max} leaves the rarest class without "
                f"an image; use imb_ratio < {self.n_max}"
            )
        if self.few_below > self.many_above + 1:
            raise ValueError(
                f"few_below: expected <= many_above + 1 = {self.many_above + 1}, got {self.few_below}"
            )
        return self


class TrainingConfig(_Config):
    """What every classifier's training has."""

    arch: Literal[
        "small_cnn", "resnet32", "resnet32x4", "resnet10", "resnet10_cifar", "resnet50"
    ] = "small_cnn"
    width: PositiveInt = 32  # of small_cnn
    precision: Precision = "fp32"
    n_steps: PositiveInt = 1500
    epochs: Annotated[float, Field(gt=0)] | None = None  # of the set trained on, instead of n_steps
    batch_size: PositiveInt = 128
    lr: Annotated[float, Field(gt=0)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    warmup_epochs: Annotated[float, Field(ge=0)] | None = None  # instead of warmup_steps
    schedule: Literal["cosine", "step", "step10"] = "cosine"  # engine/loop.lr_factor
    nesterov: bool = True
    flip: bool = False  # mirror half of the images
    shift: Annotated[int, Field(ge=0, le=8)] = 1  # random-crop padding, pixels
    border: Literal["edge", "black"] = "edge"  # what the padding shows; black: the CIFAR protocol
    policy: Policy = "none"  # after crop and flip (data/augment.py)
    cutout: Annotated[int, Field(ge=0)] = 0  # side of the square, pixels; in policy's view
    second_policy: Policy = "none"  # of the second view (PaCo, GPaCo, SAU)

    def in_steps(self, n_images: int) -> Self:
        """The same recipe with its length in steps, of a training set of so many images."""
        per_epoch, change = -(-n_images // self.batch_size), {}
        if self.epochs is not None:
            change = {"n_steps": max(1, round(self.epochs * per_epoch)), "epochs": None}
        if self.warmup_epochs is not None:
            steps = round(self.warmup_epochs * per_epoch)
            change |= {"warmup_steps": steps, "warmup_epochs": None}
        return self.model_copy(update=change)

    def settings(self) -> dict:
        """What a training reads, in JSON's types: its length is in steps, see in_steps."""
        return self.model_dump(mode="json", exclude={"epochs", "warmup_epochs"})


class ClassifierConfig(TrainingConfig):
    """phi_0 (with omega unused) or the final classifier: each has a network and recipe of its own."""

    mix: Literal["none", "mixup", "cutmix"] = "none"
    # 0: the arrays' images. Else random crops of so many pixels from the image files (ImageNet).
    crop_size: Annotated[int, Field(ge=0, le=512)] = 0
    # docs/protocol.md, Losses
    method: Literal["ce", "cb", "bsce", "ldam", "paco", "gpaco", "ride"] = "ce"
    n_experts: Annotated[int, Field(ge=2)] = 3  # RIDE
    ride_diversity: float = -0.45
    paco_alpha: Annotated[float, Field(ge=0)] = 0.01  # PaCo, GPaCo
    paco_temperature: Annotated[float, Field(gt=0)] = 0.05
    queue_size: PositiveInt = 1024
    omega: Annotated[float, Field(ge=0)] = 0.3  # weight of a generated image; a real one weighs 1
    normalise_weights: bool = True  # divide by the sum of weights in the batch, not by B

    @model_validator(mode="after")
    def _check(self):
        if self.mix != "none" and self.method in ("paco", "gpaco"):
            raise ValueError(f"mix: {self.method} contrasts whole images; use none, got {self.mix}")
        if self.method in ("paco", "gpaco") and self.queue_size < self.batch_size:
            raise ValueError(
                f"queue_size: {self.method} puts a whole batch of {self.batch_size} images into its queue, "
                f"got {self.queue_size}; give it more room, or lower batch_size"
            )
        for name, off in (("policy", "none"), ("second_policy", "none"), ("cutout", 0)):
            if self.crop_size and getattr(self, name) != off:
                raise ValueError(
                    f"{name}: crops of image files (crop_size) have no such change; use {off}, got "
                    f"{getattr(self, name)}"
                )
        return self


class SauConfig(TrainingConfig):
    """SAU's network and its two branches (docs/protocol.md, SAU); policy and second_policy: v2, v3."""

    lr: Annotated[float, Field(gt=0)] = 0.01
    weight_decay: Annotated[float, Field(ge=0)] = 5e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    nesterov: bool = False
    second_policy: Policy = "contrastive"
    branches: Literal["both", "unaware", "aware"] = "both"
    # What noisy images are to the others; "trust", a control, takes them by their label.
    strategy: Literal["pos_neg", "neg_only", "drop", "trust"] = "pos_neg"
    temperature: Annotated[float, Field(gt=0)] = 0.1
    mix_alpha: Annotated[float, Field(gt=0)] = 1.0  # lambda is of Beta(alpha, alpha); 1: uniform
    projector_width: PositiveInt = 256
    projector_dim: PositiveInt = 128
    # Of the images trained on, or the authors' second draw from the whole data, which leaks.
    prototypes: Literal["trained", "second draw"] = "trained"
    cutmix_label: Literal["area", "nominal"] = "area"  # nominal: the authors'
    # Which images batch norm's statistics for testing are of: the views of training, mixed ones among
    # them (the authors'), or one more pass over the images themselves.
    norm_statistics: Literal["views", "images"] = "views"


class DiffusionConfig(_Config):
    """The generator and its loss L = L_DDPM + L_CBDM(tau) + alpha * L_AID (docs/protocol.md, DiffuLT)."""

    parameterisation: Literal["edm", "eps"] = "edm"  # generation/noise.py
    edm_mean: float = -1.2  # of ln sigma in training (Karras et al. 2022)
    edm_std: Annotated[float, Field(gt=0)] = 1.2
    sigma_data: Annotated[float, Field(gt=0)] = 0.5  # spread of the images in [-1, 1]
    n_timesteps: Annotated[int, Field(ge=2)] = 1000  # T, of eps
    beta_schedule: Literal["linear", "cosine"] = "linear"  # of eps
    preset: Literal["nano", "tiny", "small16", "small32", "cifar", "imagenet64"] = "tiny"
    precision: Precision = "auto"
    n_steps: PositiveInt = 1000
    # Plain first: L_CBDM and L_AID join after this share of the steps (CBDM's authors: 50k after
    # 200k plain ones). Variants of a generator share the first part, which is trained once.
    plain_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    batch_size: PositiveInt = 64
    lr: Annotated[float, Field(gt=0)] = 2e-3
    # trapezoid: constant in the plain part, then a line to 0
    schedule: Literal["cosine", "constant", "trapezoid"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.998
    clip_norm: Annotated[float, Field(gt=0)] = 1.0  # of the gradient
    flip: bool = False  # mirror half of the images
    # Probability of each of five changes of an image, of which the network is told
    # (generation/augmentation.py): against copies of rare classes. 0: none; at 0.5 one image in
    # twenty stays as it is, which are all that L_AID and sampling ask for.
    augment: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    head_share: Share = 1.0  # of the many-shot classes' images, shown to the generator (table 4)
    # Classes are drawn in proportion to n_c^(1 - class_balance): 0 is every image alike, 0.5 the
    # square root, 1 every class alike.
    class_balance: Share = 0.0
    label_dropout: Share = 0.1  # per sample, for classifier-free guidance
    tau: Annotated[float, Field(ge=0)] = 0.3  # 0 switches L_CBDM off
    cbdm_labels: Literal["prior", "uniform"] = "uniform"  # what y' is drawn from
    cbdm_weight: Literal["lambda", "eps"] = "eps"  # losses.class_balancing_weight
    alpha: Annotated[float, Field(ge=0)] = 0.1  # of L_AID, as in the paper; 0 switches it off
    # Which clean image L_AID looks at (training.StepLoss). A validation part of digits chose, with
    # other seeds than those of notebook 07, which shows all four.
    aid_reading: Literal["own", "other", "difference", "sample"] = "own"
    aid_formula: Literal["hinge", "squared"] = "hinge"  # generation/losses.AID_LOSSES
    aid_min_alpha_bar: Share = 0.5  # at which noise L_AID looks: 1 / (1 + sigma^2) above this
    aid_max_alpha_bar: Share = 1.0  # and at most this
    # Of the generator and its images, where repeats share them; None: each repeat has its own.
    seed: Annotated[int, Field(ge=0)] | None = None

    def canonical(self) -> "DiffusionConfig":
        """The same training, with one value for each setting that it does not use, so that generators
        which are one have one key."""
        unused: dict[str, Any] = {}
        if not self.alpha:  # any values serve
            unused = {"aid_reading": "sample", "aid_formula": "hinge"}
            unused |= {"aid_min_alpha_bar": 0.5, "aid_max_alpha_bar": 1.0}
            if not self.tau:
                unused |= {"cbdm_labels": "uniform", "cbdm_weight": "eps"}
        return self.model_copy(update=unused)

    @property
    def n_plain_steps(self) -> int:
        """Steps before L_CBDM and L_AID join."""
        return int(self.plain_share * self.n_steps)

    @model_validator(mode="after")
    def _check(self):
        if self.plain_share and self.schedule == "cosine":
            raise ValueError(
                "schedule: a plain first part (plain_share > 0) needs trapezoid or constant, whose "
                "first part does not depend on the second; got cosine"
            )
        looks = self.alpha > 0 and self.aid_reading != "sample"
        if looks and self.aid_min_alpha_bar >= self.aid_max_alpha_bar:
            raise ValueError(
                f"aid_max_alpha_bar: expected more than aid_min_alpha_bar = {self.aid_min_alpha_bar:g}, got "
                f"{self.aid_max_alpha_bar:g}, where L_AID looks at nothing; to switch it off set alpha = 0"
            )
        if self.aid_reading == "sample" and 0 < self.alpha and self.aid_min_alpha_bar < 0.01:
            raise ValueError(
                "aid_min_alpha_bar: expected >= 0.01 with aid_reading sample, whose images stop at "
                f"that noise, got {self.aid_min_alpha_bar:g}"
            )
        return self


class SamplingConfig(_Config):
    # generation/sampling.py; ddpm and ddim are for parameterisation eps, and lose spread in few
    # steps (ddim with an exact denoiser of sd 0.1: half of it at 20 steps, a tenth at 100)
    sampler: Literal["dpm++ 2m", "dpm++ 2m sde", "euler", "heun", "ddim", "ddpm"] = "dpm++ 2m"
    n_steps: PositiveInt = 20
    sigma_min: Annotated[float, Field(gt=0)] | None = None  # None: the training's own range
    sigma_max: Annotated[float, Field(gt=0)] | None = None
    guidance: Annotated[float, Field(ge=1)] = 2.0  # D_weak + guidance * (D_y - D_weak)
    guide: Literal["null", "earlier"] = "null"  # D_weak: no class, or the plain part's network
    guidance_from: Annotated[float, Field(ge=0)] = 0.0  # guided only while sigma is above this
    guidance_to: Annotated[float, Field(gt=0)] | None = None  # and at most this
    fill_to: Annotated[int, Field(ge=0)] = 0  # N_t, images per class; 0 means n_max
    batch_size: PositiveInt = 512
    precision: Precision = "fp32"

    @model_validator(mode="after")
    def _check(self):
        if self.guidance_to is not None and self.guidance_to <= self.guidance_from:
            raise ValueError(
                f"guidance_to: expected more than guidance_from = {self.guidance_from:g}, got "
                f"{self.guidance_to:g}; for no guidance at all set guidance = 1"
            )
        return self


class FilterConfig(_Config):
    """Sample types and what is kept (docs/protocol.md, Sample types)."""

    aid_factor: Annotated[float, Field(gt=1)] = 2.0  # AID while 1 < d <= aid_factor
    radius: Literal["max", "shrunk"] = "max"
    keep: Literal["all", "id", "aid", "ood", "id+aid"] = "id+aid"


class MetricsConfig(_Config):
    """How FID is measured (generation/quality.py)."""

    features: Literal["phi_0", "inception"] = "phi_0"
    # held-out: the validation part, or the test part where there is none
    reference: Literal["held-out", "long-tailed train", "balanced train"] = "held-out"
    n_per_class: PositiveInt = 100  # generated images per class, drawn for the measuring alone


class Text2ImageConfig(_Config):
    """Images from a text-to-image pipeline of diffusers, described by the user's prompts."""

    pipeline: str = ""  # a folder in diffusers' format, or a name on the Hugging Face hub
    revision: str = ""  # of a name: a commit or a tag; "" is what the hub has when it is fetched
    prompts: str = ""  # a file with lines "class: prompt"
    n_steps: PositiveInt = 100  # GLIDE's (docs/protocol.md, SAU)
    guidance: Annotated[float, Field(ge=1)] = 3.0
    surplus: Annotated[float, Field(ge=0)] = 0.0  # share drawn beyond the need, to be filtered
    batch_size: PositiveInt = 8
    precision: Literal["fp32", "bf16"] = "fp32"


class SyntheticConfig(_Config):
    """Where the synthetic images of SAU come from (docs/protocol.md, SAU)."""

    source: Literal["diffult", "folder", "npz", "text2image"] = "diffult"
    filtered: bool = True  # use what filtering.keep keeps; else all
    path: str = ""  # of the folder or the .npz, inside the data folder or absolute
    text2image: Text2ImageConfig = Text2ImageConfig()


class RunConfig(_Config):
    profile: str = "demo"
    data: DataConfig = DataConfig()
    extractor: ClassifierConfig = ClassifierConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    sampling: SamplingConfig = SamplingConfig()
    filtering: FilterConfig = FilterConfig()
    synthetic: SyntheticConfig = SyntheticConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    sau: SauConfig = SauConfig()
    metrics: MetricsConfig = MetricsConfig()
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0, 1, 2)  # the repeats of a table
    seed: Annotated[int, Field(ge=0)] = 0  # of this one run
    data_seed: Annotated[int, Field(ge=0)] = 0  # of the split, the draw and the rendering
    n_draws: Annotated[int, Field(ge=1)] = 1  # of the data, which the repeats take in turn

    @property
    def draw(self) -> int:
        """The data seed of this one run: that of repeat i is data_seed + 10 (i mod n_draws), so that
        neighbouring data seeds, of which one may be tuned on, share no draw."""
        repeat = self.seeds.index(self.seed) if self.seed in self.seeds else 0
        return self.data_seed + 10 * (repeat % self.n_draws)

    @model_validator(mode="after")
    def _check(self):
        if not self.seeds:
            raise ValueError("seeds: expected at least one seed, got none")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected each once, got {list(self.seeds)}")
        sampling, diffusion = self.sampling, self.diffusion
        if self.n_draws > 1 and diffusion.seed is not None:
            raise ValueError(
                "n_draws: repeats that share one generator (diffusion.seed) have one draw of the "
                f"data; expected 1, got {self.n_draws}"
            )
        if sampling.sampler in ("ddpm", "ddim"):
            if diffusion.parameterisation != "eps":
                raise ValueError(
                    f"sampler: {sampling.sampler} walks DDPM's timesteps; use it with "
                    "parameterisation eps, or choose dpm++ 2m, dpm++ 2m sde, euler or heun"
                )
            if diffusion.n_timesteps % sampling.n_steps:  # diffusers would step beside them
                raise ValueError(
                    f"n_sampling_steps: {sampling.sampler} expects a divisor of "
                    f"{diffusion.n_timesteps}, the timesteps of the diffusion model, got "
                    f"{sampling.n_steps}"
                )
        if sampling.guide == "earlier" and not diffusion.n_plain_steps:
            raise ValueError(
                "sampling.guide: earlier takes the network at the end of the plain part; set "
                "plain_share > 0"
            )
        return self


def load_config(profile: str = "demo", **parameters) -> RunConfig:
    """The configuration of a profile, with some parameters replaced.

    Args:
        profile: a key of PROFILES.
        **parameters: by the names of PARAMETERS, where None keeps the profile's value, or any setting by
            its path, like **{"diffusion.lr": 3e-4}, where None is a value.

    Raises:
        ValueError: unknown profile or parameter, wrong type, or out of range; one line per fault.
    """
    if profile not in PROFILES:
        raise ValueError(unknown("profile", profile, PROFILES))
    base = _validated({"profile": profile, **PROFILES[profile]})
    chosen = {k: v for k, v in parameters.items() if v is not None or "." in k}
    return vary(base, by_path(chosen))


def by_path(parameters: dict[str, Any]) -> dict[str, Any]:
    """What `vary` takes, of parameters by the names of PARAMETERS or by path.

    Raises:
        ValueError: there is no such parameter, or two names mean one setting or one length.
    """
    names: dict[str, str] = {}
    for name in parameters:
        path = setting_path(name)
        if path is None:
            others = [p for p in setting_paths(RunConfig().model_dump()) if p.endswith(f".{name}")]
            raise ValueError(unknown("parameter", name, PARAMETERS, others))
        if path in names:
            raise ValueError(f"{names[path]} and {name} are one setting, {path}; give one of them")
        names[path] = name
    for path, name in names.items():
        part, _, leaf = path.rpartition(".")
        other = names.get(f"{part}.{INSTEAD.get(leaf)}")
        if other:
            raise ValueError(f"{name} and {other} are one length; give one of them")
    return {path: parameters[name] for path, name in names.items()}


# A length in steps, and the one in epochs that it replaces.
INSTEAD = {"n_steps": "epochs", "warmup_steps": "warmup_epochs"}


def vary(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """A copy of config with dotted paths replaced: vary(c, {"diffusion.tau": 1.0}).

    Raises:
        ValueError: a path that does not exist, or a value that does not fit it.
    """
    tree = config.model_dump()
    for path, value in changes.items():
        *parents, leaf = path.split(".")
        node = tree
        for name in parents:
            node = node.get(name) if isinstance(node, dict) else None
        if not isinstance(node, dict) or leaf not in node:
            known = setting_paths(config.model_dump())
            alike = [p for p in known if p.split(".")[0] == path.split(".")[0]]  # of its section
            raise ValueError(unknown("setting", path, alike or known))
        node[leaf] = value
        if INSTEAD.get(leaf) in node:  # the length is given in steps now
            node[INSTEAD[leaf]] = None
    return _validated(tree)


def parse_parameters(
    given: Iterable[tuple[str, str]], profile: str | RunConfig = "demo"
) -> dict[str, Any]:
    """What `--set name=text` means for each pair, converted by the type of the setting it names. They
    are checked together, so that two that only fit each other may stand in any order.

    Args:
        profile: what they change, by name or resolved.

    Returns:
        By the names of PARAMETERS; a setting that has none there, or is None, by its path.

    Raises:
        ValueError: no such parameter, or text is not of its type or range.
    """
    changes: dict[str, Any] = {}
    for name, text in given:
        value: Any = None if text == "None" else text
        if name == "seeds":
            value = [part for part in text.replace(" ", "").strip("[]()").split(",") if part]
        changes[name] = value
    base = load_config(profile) if isinstance(profile, str) else profile
    paths = by_path({name: name for name in changes})  # path -> name
    config = vary(base, {path: changes[name] for path, name in paths.items()})
    flat = {path: name for name, path in PARAMETERS.items()}
    values = {}
    for path in paths:
        value = attrgetter(path)(config)
        name = path if value is None else flat.get(path, path)
        values[name] = list(value) if isinstance(value, tuple) else value
    return values


def _validated(tree: dict) -> RunConfig:
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ValueError("\n".join(_fault(e) for e in error.errors())) from None


def _fault(e: dict) -> str:
    if e["type"] == "value_error":
        return str(e["ctx"]["error"])
    path = ".".join(str(part) for part in e["loc"])
    name = next((k for k, v in PARAMETERS.items() if v == path), path)
    expected = e["msg"][0].lower() + e["msg"][1:].replace("a valid tuple", "a list like [0, 1]")
    return f"{name}: {expected}, got {e['input']!r}"


def setting_paths(tree: dict, prefix: str = "") -> list[str]:
    """The dotted path of every setting of a dumped configuration, in its order."""
    found: list[str] = []
    for name, value in tree.items():
        inside = isinstance(value, dict)
        found += setting_paths(value, f"{prefix}{name}.") if inside else [prefix + name]
    return found
