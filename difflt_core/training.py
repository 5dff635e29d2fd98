"""What the classifier and the diffusion training loops share: schedule, batches, crops, and exact
checkpoints.

Both loops draw everything random from (seed, step), so a checkpoint needs no random state, and step
k after a kill and a resume is step k of an undisturbed run, bit for bit on a CPU.
"""

import math
import warnings
from pathlib import Path

import torch

from .seeding import generator
from .store import load_tensors, save_tensors

__all__ = ["batch_indices", "check_finite", "load_checkpoint", "save_checkpoint", "warmup_cosine"]


def warmup_cosine(step: int, n_steps: int, warmup_steps: int) -> float:
    """Factor on the learning rate at a 0-based step: linear to 1, then half a cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, n_steps - warmup_steps)))


def batch_indices(n_images: int, batch_size: int, step: int, seed: int) -> torch.Tensor:
    """Indices int64 (B,) of step's batch: epochs of shuffled data laid end to end, computed from
    (seed, step) alone."""
    first, last = step * batch_size, (step + 1) * batch_size
    epochs = range(first // n_images, (last - 1) // n_images + 1)
    order = torch.cat([_epoch_order(n_images, epoch, seed) for epoch in epochs])
    start = first - epochs[0] * n_images
    return order[start : start + batch_size]


def _epoch_order(n_images: int, epoch: int, seed: int) -> torch.Tensor:
    return torch.randperm(n_images, generator=generator(seed, "epoch", epoch))


def save_checkpoint(work: Path, step: int, model, optimizer, extra: dict | None = None) -> None:
    """Write step, weights and optimiser state to work/checkpoint.safetensors, whole or not at
    all."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optim.{i}.{k}": v for k, v in state.items() if torch.is_tensor(v)}
    tensors |= {f"extra.{k}": v for k, v in (extra or {}).items()}
    save_tensors(Path(work) / "checkpoint.safetensors", tensors, {"step": str(step)})


def load_checkpoint(work: Path, model, optimizer) -> tuple[int, dict]:
    """Restore the last checkpoint in place. Returns the next step (0 when there is none) and the
    extra tensors."""
    path = Path(work) / "checkpoint.safetensors"
    if not path.exists():
        return 0, {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as f:
            step = int(f.metadata()["step"])
        tensors = load_tensors(path)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        warnings.warn(
            f"checkpoint {path} cannot be read ({error}): starting from step 0", stacklevel=2
        )
        path.unlink()
        return 0, {}
    part = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        part.setdefault(kind, {})[rest] = tensor
    model.load_state_dict(part["model"])
    state: dict = {}
    for name, tensor in part.get("optim", {}).items():
        i, _, key = name.partition(".")
        state.setdefault(int(i), {})[key] = tensor
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    return step, part.get("extra", {})


def check_finite(loss: float, step: int, what: str) -> None:
    """Stop a run whose loss is not a number.

    Raises:
        FloatingPointError: naming the step; the last good checkpoint stays in the stage's work
            folder.
    """
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"{what}: the loss is {loss} at step {step}; the last good checkpoint is kept. "
            "Lower the learning rate, or look at the data for NaN."
        )
