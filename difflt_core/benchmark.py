"""How fast the generator trains and samples, against a plain reference, in one run:
`python -m difflt_core.benchmark --preset cifar --device auto`; --classifier: benchmark_classifier.py.

Reference: fp32, NCHW, two separate forwards for L_CBDM, per-tensor EMA and optimiser, 1,000
ancestral steps, guidance in two calls. Fast: what build_diffusion and build_samples do. Each mode
runs in a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import multiprocessing
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from .benchmark_classifier import compare_epochs
from .benchmark_sau import measure_sau
from .classifiers import extract, load_classifier
from .config import DiffusionConfig, SamplingConfig, load_config
from .data import LongTail, load_split
from .diffusion import (
    PRESETS,
    StepLoss,
    compile_where_it_pays,
    load_diffusion,
    make_schedule,
    make_unet,
)
from .diffusion import memory_format as layout_of
from .generation.quality import fid
from .pipeline import Pipeline
from .progress import Context, fast_bf16, resolve_device
from .provenance import ROOT, environment
from .sampling import generate
from .store import atomic_write
from .timing import peak_gib, seconds

SIZES = {"tiny": (8, 1, 10), "cifar": (32, 3, 100), "imagenet64": (64, 3, 1000)}  # pixels, C, K
BATCHES = {"tiny": 64, "cifar": 16, "imagenet64": 4}
REFERENCE_STEPS = 1000  # ancestral steps of the reference sampler


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m difflt_core.benchmark", description=__doc__)
    parser.add_argument("--preset", default="tiny", choices=PRESETS)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--batch", type=int, help="images per step (default: by preset)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default: 5)")
    parser.add_argument(
        "--samplers",
        type=int,
        metavar="N",
        help="instead, compare the samplers on the"
        " demo's generator, N images per class: images/s and FID",
    )
    parser.add_argument(
        "--classifier",
        choices=("resnet32", "resnet32x4"),
        help="instead, compare an epoch of this classifier with the usual loop",
    )
    parser.add_argument(
        "--sau",
        choices=("resnet32", "resnet32x4"),
        help="instead, compare a step of SAU with four forwards one after the other",
    )
    parser.add_argument(
        "--fid",
        action="store_true",
        help="instead, time FID at 2,048 dimensions beside scipy's sqrtm",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "figures" / "benchmark")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    device, batch = resolve_device(options.device), options.batch or BATCHES[options.preset]
    if options.classifier:
        return _write_epochs(options.out, options.classifier, device, options.steps)
    if options.sau:
        return _write_sau(options.out, options.sau, device, options.batch or 32, options.steps)
    if options.fid:
        return _write_fid(options.out)
    if options.samplers:
        return _write_samplers(options.out, device, options.samplers)
    arguments = (options.preset, device, batch, options.steps)
    rows = [_in_a_process(measure, mode, *arguments) for mode in ("reference", "fast")]
    table = _compare(*rows, _ROWS)
    name = f"{options.preset}-{device}"
    face = f"{options.preset}, batch {batch}, {environment(device)['hardware']}"
    text = f"**{name}.** {face}\n\n{table.to_markdown(disable_numparse=True)}\n"
    record = {"arguments": arguments, "modes": rows, "environment": environment(device)}
    _write(options.out, name, text, record)
    return 0


def _write_epochs(out: Path, arch: str, device: str, n_steps: int) -> int:
    rows = compare_epochs(arch, device, n_steps)
    shown = pd.DataFrame(rows).map(lambda v: f"{v:.4g}" if isinstance(v, float) else v)
    name, hardware = f"classifier-{arch}-{device}", environment(device)["hardware"]
    face = f"{arch}, batch 128, {n_steps} timed steps, {hardware}"
    text = f"**{name}.** {face}\n\n{shown.to_markdown(index=False, disable_numparse=True)}\n"
    record = {"n_steps": n_steps, "rows": rows, "environment": environment(device)}
    _write(out, name, text, record)
    return 0


def _write_sau(out: Path, arch: str, device: str, batch: int, n_steps: int) -> int:
    rows = [_in_a_process(measure_sau, m, arch, device, batch, n_steps) for m in ("plain", "ours")]
    table, name = _compare(*rows, _SAU_ROWS), f"sau-{arch}-{device}"
    face = f"SAU, {arch}, batch {batch} seen four times, {environment(device)['hardware']}"
    text = f"**{name}.** {face}\n\n{table.to_markdown(disable_numparse=True)}\n"
    _write(out, name, text, {"modes": rows, "environment": environment(device)})
    return 0


def _write_fid(out: Path, D: int = 2048) -> int:
    """Our FID and the textbook's on the same features, always on the CPU."""
    import scipy.linalg

    g = np.random.default_rng(0)
    real, fake = g.normal(size=(2 * D, D)), 1.1 * g.normal(size=(2 * D, D)) + 0.1

    def textbook(_) -> float:
        a, b = np.cov(real.T), np.cov(fake.T)
        offset = np.square(real.mean(axis=0) - fake.mean(axis=0)).sum()
        return offset + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)

    ways = {
        "scipy's sqrtm": textbook,
        "difflt_core.generation.quality.fid": lambda _: fid(real, fake),
    }
    rows = [{"way": n, "s": seconds(call, 1, "cpu"), "FID": call(0)} for n, call in ways.items()]
    table = pd.DataFrame(rows).map(lambda v: f"{v:.8g}" if isinstance(v, float) else v)
    hardware = environment("cpu")["hardware"]
    text = f"**fid-cpu.** Two sets of {2 * D} features of {D} dimensions, float64, {hardware}\n\n"
    text += f"{table.to_markdown(index=False, disable_numparse=True)}\n"
    _write(out, "fid-cpu", text, {"rows": rows, "environment": environment("cpu")})
    return 0


def _write(out: Path, name: str, text: str, record: dict) -> None:
    atomic_write(out / f"{name}.md", text)
    atomic_write(out / f"{name}.json", json.dumps(record, indent=1) + "\n")
    print(text)


def _compare(reference: dict, fast: dict, kinds: dict) -> pd.DataFrame:
    rows = {}
    for key, (label, better, form) in kinds.items():
        a, b = reference[key], fast[key]
        ratio = "" if better is None else f"{b / a if better == 'more' else a / b:.3g}x"
        rows[label] = [form.format(a), form.format(b), ratio]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["reference", "fast", "gain"])


_ROWS = {
    "precision": ("precision", None, "{}"),
    "loss": ("loss of the first step", None, "{:.4f}"),
    "train_images_per_s": ("training, images/s", "more", "{:.4g}"),
    "train_gflop_per_s": ("training, model GFLOP/s", "more", "{:.4g}"),
    "train_share": ("training, share of the measured matmul peak", "more", "{:.2f}"),
    "sample_images_per_s": ("sampling, images/s", "more", "{:.4g}"),
    "sample_gflop_per_s": ("sampling, model GFLOP/s", "more", "{:.4g}"),
    "peak_gflop_per_s": ("matmul peak in its precision, GFLOP/s", "more", "{:.4g}"),
    "mem_gib": ("peak memory, GiB", "less", "{:.2f}"),
}


_SAU_ROWS = {
    "precision": ("precision", None, "{}"),
    "loss": ("loss of the first step", None, "{:.4f}"),
    "step_s": ("a step, s", "less", "{:.3g}"),
    "images_per_s": ("images/s", "more", "{:.4g}"),
    "mem_gib": ("peak memory, GiB", "less", "{:.2f}"),
}


def _in_a_process(function, *arguments) -> dict:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def measure(mode: str, preset: str, device: str, batch: int, n_steps: int) -> dict:
    """One mode's images/s, FLOP/s, share of peak and memory.

    Returns:
        A row; train_images_per_s counts an image once per step with L_CBDM (two forwards, one
        backward); the reference sampler is timed over n_steps of its 1,000 steps.
    """
    fast = mode == "fast"
    half = fast and fast_bf16(device)
    precision = "bf16" if half else "fp32"
    size, channels, K = SIZES[preset]
    recipe = DiffusionConfig(
        preset=preset, batch_size=batch, tau=1.0, alpha=0.0, precision=precision
    )
    train = _noise_images(max(4 * batch, K), size, channels, K)
    loss = StepLoss(recipe, 0, train, device, {}, {})
    torch.manual_seed(0)
    unet = make_unet(preset, K, size, channels).to(device)
    if fast:
        unet = unet.to(memory_format=layout_of(preset, device))
        compile_where_it_pays(unet, Context(device), preset)
    step, losses = _training_step(unet, loss, fast), []
    step_s = seconds(lambda i: losses.append(float(step(i))), n_steps, device)
    flop = _forward_gflop(preset)
    peak = matmul_gflop_per_s(device, torch.bfloat16 if half else torch.float32)
    sampled_s, n_forwards = _sample(unet.eval(), preset, precision, batch, n_steps, device, fast)
    train_rate = 3 * 2 * flop * batch / step_s  # two forwards, and a backward of twice their cost
    return {
        "precision": precision if fast else "fp32",
        "loss": losses[0],
        "train_images_per_s": batch / step_s,
        "train_gflop_per_s": train_rate,
        "train_share": train_rate / peak,
        "sample_images_per_s": batch / sampled_s,
        "sample_gflop_per_s": flop * n_forwards * batch / sampled_s,
        "peak_gflop_per_s": peak,
        "mem_gib": peak_gib(device),
    }


def _training_step(unet, loss: StepLoss, fast: bool):
    """A function of the step number that trains one step and returns its loss."""
    from diffusers.training_utils import EMAModel

    options = {"fused": True} if fast else {"foreach": False, "fused": False}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=0.0, **options)
    ema = EMAModel(unet.parameters(), decay=0.999, foreach=fast)

    def in_two_calls(xt, t, y, return_dict):
        halves = [a.chunk(2) for a in (xt, t, y)]
        eps = [unet(*(h[i] for h in halves), return_dict=False)[0] for i in (0, 1)]
        return (torch.cat(eps),)

    def step(i: int) -> torch.Tensor:
        total = loss(unet if fast else in_two_calls, i).sum()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        ema.step(unet.parameters())
        return total.detach()

    return step


def _sample(unet, preset, precision, batch, n_steps, device, fast) -> tuple[float, int]:
    """Seconds for one batch of finished images, and network calls per image (guidance: two each)."""
    schedule = make_schedule(DiffusionConfig(preset=preset))
    labels, indices = np.arange(batch) % SIZES[preset][2], np.zeros(batch, int)
    if fast:
        config = SamplingConfig(sampler="dpm++", n_steps=20, guidance=2.0, precision=precision)
        sampled_s = seconds(
            lambda i: generate(unet, schedule, config, labels, indices, i), 1, device
        )
        return sampled_s, 2 * config.n_steps
    x = torch.randn(batch, unet.config.in_channels, *(unet.config.sample_size,) * 2, device=device)
    y = torch.from_numpy(labels).to(device)
    null = torch.full_like(y, unet.config.num_class_embeds - 1)

    @torch.no_grad()
    def one_step(i: int) -> None:
        t = schedule.timesteps[i]
        eps_y, eps_null = (unet(x, t, label, return_dict=False)[0] for label in (y, null))
        schedule.step(eps_null + 2.0 * (eps_y - eps_null), t, x)

    return REFERENCE_STEPS * seconds(one_step, n_steps, device), 2 * REFERENCE_STEPS


SAMPLERS = [
    ("ddpm", 1000),
    ("ddim", 50),
    ("dpm++", 50),
    ("dpm++", 20),
    ("dpm++ karras", 20),
    ("dpm++ karras", 10),
]


def _write_samplers(out: Path, device: str, n_per_class: int) -> int:
    rows, protocol = compare_samplers(device, n_per_class)
    shown = rows.map(lambda v: f"{v:.4g}" if isinstance(v, float) else v)
    text = f"**samplers-{device}.** {protocol}\n\n{shown.to_markdown(index=False, disable_numparse=True)}\n"
    record = {
        "protocol": protocol,
        "rows": rows.to_dict("records"),
        "environment": environment(device),
    }
    _write(out, f"samplers-{device}", text, record)
    return 0


def compare_samplers(device: str, n_per_class: int) -> tuple[pd.DataFrame, str]:
    """Images/s and FID of each sampler with the demo's generator, and the protocol in words."""
    pipeline = Pipeline(load_config("demo"), device=device)
    config, K = pipeline.config, pipeline.config.data.n_classes
    phi0 = load_classifier(pipeline.train_extractor(), device)
    unet = load_diffusion(pipeline.train_diffusion(), device)
    schedule = make_schedule(config.diffusion)
    real = extract(phi0, load_split(pipeline.data(), "val").images)[0]
    labels, indices = np.repeat(np.arange(K), n_per_class), np.tile(np.arange(n_per_class), K)
    rows = []
    for name, n_steps in SAMPLERS:
        recipe = SamplingConfig(sampler=name, n_steps=n_steps, guidance=config.sampling.guidance)
        started = time.perf_counter()
        images = generate(unet, schedule, recipe, labels, indices, seed=0)
        rate = len(labels) / (time.perf_counter() - started)
        score = fid(real, extract(phi0, images)[0])
        rows.append({"sampler": name, "steps": n_steps, "images/s": rate, "FID": score})
    table = pd.DataFrame(rows)
    table.insert(3, "gain", table["images/s"] / table["images/s"][0])
    protocol = (
        f"Embedded digits, the demo's generator (seed {config.seed}), guidance "
        f"{config.sampling.guidance:g}, {len(labels)} generated images, balanced; FID of phi_0's "
        f"features against the {len(real)} images of the balanced validation part; "
        f"{environment(device)['hardware']}"
    )
    return table, protocol


def matmul_gflop_per_s(device: str, dtype: torch.dtype, n: int = 0) -> float:
    """The rate of a large square matrix product: the peak that the shares refer to."""
    n = n or (8192 if device == "cuda" else 2048)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / 1e9 / seconds(lambda _: a @ b, 5, device)


def _forward_gflop(preset: str) -> float:
    """Model GFLOP of one image through one forward."""
    from torch.utils.flop_counter import FlopCounterMode

    size, channels, K = SIZES[preset]
    with torch.device("meta"):
        unet = make_unet(preset, K, size, channels)
        zeros = torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            unet(torch.zeros(1, channels, size, size), zeros, zeros)
    return counter.get_total_flops() / 1e9


def _noise_images(n: int, size: int, channels: int, n_classes: int) -> LongTail:
    images = np.random.default_rng(0).integers(0, 256, (n, size, size, channels), np.uint8)
    names = tuple(map(str, range(n_classes)))
    return LongTail(images, np.arange(n) % n_classes, names, "train", "noise")


if __name__ == "__main__":
    sys.exit(main())
