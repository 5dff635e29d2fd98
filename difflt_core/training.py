"""What the classifier and the diffusion training loops share: schedule, batches, crops, and exact
checkpoints.

Both loops draw everything random from (seed, step), so a checkpoint needs no random state, and step
k after a kill and a resume is step k of an undisturbed run, bit for bit on a CPU.
"""

import functools
import json
import math
import os
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .seeding import generator
from .store import load_tensors, save_tensors

__all__ = [
    "CHECK_EVERY",
    "batch_indices",
    "check_loss",
    "load_checkpoint",
    "lr_factor",
    "pack_state",
    "save_checkpoint",
    "set_lr",
    "unpack_state",
    "weighted_indices",
]

CHECK_EVERY = 25  # steps; reading the loss more often would make a GPU wait
CHECKPOINTS = ("checkpoint.safetensors", "checkpoint.previous.safetensors")  # newest first


def lr_factor(
    schedule: str, step: int, n_steps: int, warmup_steps: int, hold_steps: int = 0
) -> float:
    """Factor on the learning rate at a 0-based step: linear to 1 over the warm-up, then

    "cosine": half a cosine to 0; "constant": 1; "trapezoid": 1 for hold_steps, then a line to 0, so
    that runs of one first part may end in different ways (Hu et al. 2024, MiniCPM); "step": 0.01 after 80 % and 0.0001 after 90 % of the
    steps (LDAM's 160 and 180 of 200 epochs, PEERS.md 1.5); "step10": 0.1 and 0.01 there (PaCo).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(1, n_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "trapezoid":
        start = max(warmup_steps, hold_steps)
        return min(1.0, (n_steps - step) / max(1, n_steps - start))
    if schedule in ("step", "step10"):
        drop = {"step": 0.01, "step10": 0.1}[schedule]
        return drop ** ((step >= 0.8 * n_steps) + (step >= 0.9 * n_steps))
    return 1.0


def set_lr(optimizer, recipe, step: int, hold_steps: int = 0) -> None:
    """Give every parameter group the learning rate of a 0-based step of the recipe."""
    schedule = (recipe.schedule, step, recipe.n_steps, recipe.warmup_steps, hold_steps)
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr * lr_factor(*schedule)


def batch_indices(n_images: int, batch_size: int, step: int, seed: int) -> torch.Tensor:
    """Indices int64 (B,) of step's batch: epochs of shuffled data laid end to end, computed from
    (seed, step) alone."""
    first, last = step * batch_size, (step + 1) * batch_size
    epochs = range(first // n_images, (last - 1) // n_images + 1)
    order = torch.cat([_epoch_order(n_images, epoch, seed) for epoch in epochs])
    start = first - epochs[0] * n_images
    return order[start : start + batch_size]


def weighted_indices(weights: torch.Tensor, batch_size: int, step: int, seed: int) -> torch.Tensor:
    """Indices int64 (B,) of step's batch, drawn with replacement in proportion to weights (N,)."""
    return torch.multinomial(weights, batch_size, True, generator=generator(seed, "draw", step))


@functools.lru_cache(maxsize=4)
def _epoch_order(n_images: int, epoch: int, seed: int) -> torch.Tensor:
    return torch.randperm(n_images, generator=generator(seed, "epoch", epoch))


def save_checkpoint(
    work: Path, step: int, model, optimizer, extra: dict | None = None, recipe: dict | None = None
) -> None:
    """Write weights, optimiser state and extra tensors after `step` steps; keep the one before.

    Args:
        recipe: the settings of the run; a resume compares them. Learning rate, batch and noise are
            functions of (recipe, step), so nothing else is needed to go on exactly.
    """
    tensors = pack_state(model, optimizer, extra)
    newest, previous = (Path(work) / name for name in CHECKPOINTS)
    if newest.exists():
        os.replace(newest, previous)
    metadata = {"step": str(step), "recipe": json.dumps(recipe or {}, sort_keys=True)}
    save_tensors(newest, tensors, metadata)


def load_checkpoint(work: Path, model, optimizer, recipe: dict | None = None) -> tuple[int, dict]:
    """Restore the newest readable checkpoint in place.

    Returns:
        The next step (0 when there is none) and the extra tensors.

    Raises:
        ValueError: the checkpoint was written with other settings; names those that differ.
    """
    for name in CHECKPOINTS:
        path = Path(work) / name
        if not path.exists():
            continue
        try:
            step, saved, part = _read_checkpoint(path)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            message = f"checkpoint {path} cannot be read ({error}): set aside, going on without it"
            warnings.warn(message, stacklevel=2)
            os.replace(path, path.with_suffix(".corrupt"))
            continue
        _check_recipe(path, saved, recipe or {})
        return step, unpack_state(part, model, optimizer)
    return 0, {}


def pack_state(model, optimizer, extra: dict | None = None) -> dict:
    """Weights, optimiser state and extra tensors under one flat naming, for a safetensors file."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optim.{i}.{k}": v for k, v in state.items() if torch.is_tensor(v)}
    return tensors | {f"extra.{k}": v for k, v in (extra or {}).items()}


def unpack_state(tensors: dict, model, optimizer) -> dict:
    """Restore weights and optimiser state in place from pack_state's tensors; the extra ones are
    returned."""
    part: dict = {"model": {}, "optim": {}, "extra": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        part[kind][rest] = tensor
    model.load_state_dict(part["model"])
    state: dict = {}
    for name, tensor in part["optim"].items():
        i, _, key = name.partition(".")
        state.setdefault(int(i), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return part["extra"]


def _read_checkpoint(path: Path) -> tuple[int, dict, dict]:
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    return int(metadata["step"]), json.loads(metadata["recipe"]), load_tensors(path)


def _check_recipe(path: Path, saved: dict, wanted: dict) -> None:
    wanted = json.loads(json.dumps(wanted, sort_keys=True))
    differing = [k for k in sorted(saved.keys() | wanted.keys()) if saved.get(k) != wanted.get(k)]
    if differing:
        lines = "; ".join(f"{k}: {saved.get(k)!r} there, {wanted.get(k)!r} here" for k in differing)
        raise ValueError(
            f"checkpoint {path} belongs to another run ({lines}). Use the settings it was written "
            "with, or move it away to start from step 0."
        )


def check_loss(losses: torch.Tensor, first_step: int, what: str, ceiling: float) -> None:
    """Stop a run whose loss is not a number or runs away.

    Args:
        losses: float (n,) or (n, terms), of the steps first_step, first_step + 1, ...
        ceiling: a mean of the first term above it is a divergence (a noise predictor that predicts
            nothing has 1).

    Raises:
        FloatingPointError: naming the step; the last good checkpoint stays in the work folder.
    """
    losses = losses.float().cpu().reshape(len(losses), -1)
    bad = (~torch.isfinite(losses)).any(dim=1).nonzero()
    if len(bad):
        step = first_step + int(bad[0])
        fault = f"the loss is {losses[bad[0, 0]].tolist()} at step {step}"
    elif len(losses) and float(losses[:, 0].mean()) > ceiling:
        last = first_step + len(losses) - 1
        mean = float(losses[:, 0].mean())
        fault = f"the loss diverges: mean {mean:.3g} in steps {first_step} to {last}"
    else:
        return
    raise FloatingPointError(
        f"{what}: {fault}; the last good checkpoint is kept. "
        "Lower the learning rate, or look at the data for NaN."
    )
