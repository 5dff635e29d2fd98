"""Exact checkpoints of a training run: two files, the newest and the one before, each whole or not
there, with a hash of what it holds."""

import contextlib
import hashlib
import json
import os
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .files import load_tensors, save_tensors

__all__ = ["load_checkpoint", "pack_state", "save_checkpoint", "unpack_state"]

CHECKPOINTS = ("checkpoint.safetensors", "checkpoint.previous.safetensors")  # newest first


def save_checkpoint(
    work: Path, step: int, model, optimizer, extra: dict | None = None, recipe: dict | None = None
) -> None:
    """Write weights, optimiser state and extra tensors after `step` steps; keep the one before.

    Args:
        recipe: the settings of the run; a resume compares them. Learning rate, batch and noise are
            functions of (recipe, step), so nothing else is needed to go on exactly.
    """
    tensors = {k: v.detach().cpu() for k, v in pack_state(model, optimizer, extra).items()}
    newest, previous = (Path(work) / name for name in CHECKPOINTS)
    if newest.exists():
        os.replace(newest, previous)
    metadata = {"step": str(step), "recipe": json.dumps(recipe or {}, sort_keys=True)}
    metadata["sha256"] = _digest(tensors)
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
            with contextlib.suppress(FileNotFoundError):  # another process of this run was first
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
    for (
        parameter,
        moments,
    ) in optimizer.state.items():  # a file holds no strides: those of the weight
        for name, tensor in moments.items():
            if torch.is_tensor(tensor) and tensor.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
    return part["extra"]


def _read_checkpoint(path: Path) -> tuple[int, dict, dict]:
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    tensors = load_tensors(path)
    if _digest(tensors) != metadata["sha256"]:
        raise ValueError("its tensors are not those that were written")
    return int(metadata["step"]), json.loads(metadata["recipe"]), tensors


def _digest(tensors: dict) -> str:
    """SHA-256 of the names and bytes of tensors on the CPU."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_recipe(path: Path, saved: dict, wanted: dict) -> None:
    wanted = json.loads(json.dumps(wanted, sort_keys=True))
    differing = [k for k in sorted(saved.keys() | wanted.keys()) if saved.get(k) != wanted.get(k)]
    if differing:
        lines = "; ".join(f"{k}: {saved.get(k)!r} there, {wanted.get(k)!r} here" for k in differing)
        raise ValueError(
            f"checkpoint {path} belongs to another run ({lines}). Use the settings it was written "
            "with, or move it away to start from step 0."
        )
