"""The training loop of every stage: schedule, backward and update, curve, checks, checkpoints, bar.

A stage hands it a step, which draws everything random from (seed, k): so a checkpoint needs no random
state, and step k after a kill and a resume is step k of an undisturbed run, bit for bit on a CPU.
"""

import contextlib
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable

import torch

from .checkpoint import load_checkpoint, save_checkpoint, unpack_state
from .parallel import from_main, n_processes, rank
from .precision import out_of_memory
from .progress import bar

__all__ = ["CHECK_EVERY", "check_loss", "lr_factor", "run", "set_lr"]

CHECK_EVERY = 25  # steps; reading the loss more often would make a GPU wait


def run(
    step: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, recipe, *,
    work, identity: dict, what: str, setting: str, context, n_logged: int = 1,
    memory=None, start: dict | None = None, hold_steps: int = 0,
    clip_norm: float | None = None, ceiling: float = float("inf"), accelerator=None,
    divisible: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Train a model for recipe.n_steps steps, or for those that a checkpoint in `work` leaves.

    A checkpoint is written every context.checkpoint_s seconds, and when the process is asked to end
    (SIGTERM), which it then does. After the last step none is written: a process that is asked to end there
    repeats the steps since its last checkpoint.

    Args:
        step: of the 0-based number k: the loss, a scalar, and what the curve keeps, float (n_logged,),
            its terms first.
        recipe: has n_steps, batch_size, lr, schedule and warmup_steps. identity: settings of the run,
            which a checkpoint must agree with. what: names it in its bar and its errors. setting:
            where its batch size is set.
        memory: what a run carries beside weights and moments, or None: state() -> tensors by name,
            restore(tensors, k), after_step(). start: pack_state of an earlier run that this one goes
            on from; hold_steps: its length.
        clip_norm: of the gradient. ceiling: of the mean of the first term, see check_loss.
        accelerator: of a stage on several processes. divisible: whether step also takes (k, i, n),
            for part i of n of its batch: then a batch that does not fit into memory goes through in
            parts, and the gradients add up.

    Returns:
        The curve, float32 (n_steps, n_logged).
    """
    kept = _Kept(work, model, optimizer, identity, memory, context)
    first = kept.restore(recipe.n_steps, n_logged, start, hold_steps)
    model.train()
    before = hold_steps if start is not None else 0
    progress = bar(recipe.n_steps, what, initial=first, context=context, before=before)
    gradients = _Gradients(step, optimizer, accelerator, divisible, setting, recipe.batch_size)
    with progress, _Ending() as ending:
        for k in range(first, recipe.n_steps):
            set_lr(optimizer, recipe, k, hold_steps)
            # forward and backward
            logged = gradients.of(k)
            # update
            _clip(model, clip_norm, accelerator)
            optimizer.step()
            if memory is not None:
                memory.after_step()
            # look at the loss, and keep what a killed run goes on from
            kept.curve[k] = logged
            kept.after(k + 1, what, ceiling, ending, accelerator)
            progress.update()
    return kept.curve


class _Gradients:
    """Forward and backward of a step, in as many parts as it takes to fit into memory."""

    def __init__(self, step, optimizer, accelerator, divisible: bool, setting: str, batch: int):
        self.step, self.optimizer = step, optimizer
        self.backward = accelerator.backward if accelerator else torch.Tensor.backward
        # processes would have to agree on the number of parts
        self.divisible = divisible and n_processes() == 1
        self.setting, self.batch, self.n_parts = setting, batch, 1

    def of(self, k: int) -> torch.Tensor:
        """The gradients of step k, in the parameters; what its curve keeps, float (n_logged,)."""
        while True:
            try:
                return self._all_parts(k)
            except torch.OutOfMemoryError as error:
                if not self._divide():
                    smallest = self.batch // self.n_parts
                    raise out_of_memory(error, self.setting, smallest) from None
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()

    def _all_parts(self, k: int) -> torch.Tensor:
        logged, n = [], self.n_parts
        for i in range(n):
            loss, terms = self.step(k, i, n) if n > 1 else self.step(k)
            if i == 0:
                self.optimizer.zero_grad(set_to_none=True)
            self.backward(loss / n)
            logged.append(terms.detach() / n)
        return sum(logged)

    def _divide(self) -> bool:
        """Twice as many parts from here on, where the batch can be divided so."""
        if not self.divisible or self.batch % (2 * self.n_parts):
            return False
        self.n_parts *= 2
        warnings.warn(
            f"{self.setting}: a batch of {self.batch} does not fit into memory; it goes through in "
            f"{self.n_parts} parts, whose gradients add up (a result may round differently, and dropout draws others)",
            stacklevel=2,
        )
        return True


class _Kept:
    """The curve of a run, and its checkpoints."""

    def __init__(self, work, model, optimizer, identity: dict, memory, context):
        self.work, self.model, self.optimizer = work, model, optimizer
        self.identity, self.memory, self.every_s = identity, memory, context.checkpoint_s
        self.checked, self.saved_at = 0, time.monotonic()

    def restore(self, n_steps: int, n_logged: int, start: dict | None, hold_steps: int) -> int:
        """Go back to the last checkpoint, or to an earlier run's end, and return the next step."""
        first, extra = load_checkpoint(self.work, self.model, self.optimizer, self.identity)
        if not first and start is not None:
            first, extra = hold_steps, unpack_state(start, self.model, self.optimizer)
        device = next(self.model.parameters()).device
        self.curve = torch.zeros(n_steps, n_logged, device=device)
        if first:
            self.curve[:first] = extra.pop("curve")[:first].to(device)
            if self.memory is not None:
                self.memory.restore(extra, first)
        self.checked = first
        return first

    def after(self, done: int, what: str, ceiling: float, ending: "_Ending", accelerator) -> None:
        """After `done` steps: check the losses now and then, and write a checkpoint where one is due."""
        last = done == len(self.curve)
        look, save = done % CHECK_EVERY == 0 or last, False
        if not last and (look or n_processes() == 1):
            due = ending.asked or time.monotonic() - self.saved_at >= self.every_s
            save = from_main(due)  # the processes must agree
        if look or save:
            new, first = slice(self.checked, done), self.checked
            if accelerator:
                self.curve[new] = accelerator.reduce(self.curve[new], "mean")
            # the first steps may start anywhere
            check_loss(self.curve[new], first, what, ceiling if first else math.inf)
            self.checked = done
        if save:
            self._save(done)
            if ending.asked:
                ending.now()

    def _save(self, done: int) -> None:
        if rank() == 0:
            extra = {"curve": self.curve} | (self.memory.state() if self.memory else {})
            save_checkpoint(self.work, done, self.model, self.optimizer, extra, self.identity)
        self.saved_at = time.monotonic()


class _Ending(contextlib.AbstractContextManager):
    """Inside, SIGTERM is noted instead of obeyed, so that a checkpoint can be written first."""

    def __init__(self):
        self.asked, self.before = False, None

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, *_) -> None:
        self.asked = True

    def __exit__(self, *_) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
            self.before = None
            if self.asked:  # at the last step, or with an error on its way
                os.kill(os.getpid(), signal.SIGTERM)

    def now(self) -> None:
        """End as the process would have without us."""
        self.__exit__()
        raise SystemExit(128 + signal.SIGTERM)


def _clip(model: torch.nn.Module, norm: float | None, accelerator) -> None:
    """Shorten the gradient to a norm, where one is given."""
    if norm is not None:
        clip = accelerator.clip_grad_norm_ if accelerator else torch.nn.utils.clip_grad_norm_
        clip(model.parameters(), norm)


def lr_factor(
    schedule: str, step: int, n_steps: int, warmup_steps: int, hold_steps: int = 0
) -> float:
    """Factor on the learning rate at a 0-based step: linear to 1 over the warm-up, then

    "cosine": half a cosine to 0; "constant": 1; "trapezoid": 1 for hold_steps, then a line to 0, so
    that runs of one first part may end in different ways (Hu et al. 2024, MiniCPM); "step": 0.01
    after 80 % and 0.0001 after 90 % of the steps, LDAM's 160 and 180 of 200 epochs (docs/protocol.md,
    Training recipes); "step10": 0.1 and 0.01 there (PaCo).
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
