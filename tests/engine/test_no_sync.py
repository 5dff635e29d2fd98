"""No training step waits for its device: nothing that depends on what is there is read by the host.

Run on a CPU, where such a read costs nothing, so it is caught by what is called.
"""

import contextlib
import sys

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2.functional._color import _hsv_to_rgb

from difflt_core import Pipeline
from difflt_core.data import policies
from difflt_core.data.augment import POLICIES
from difflt_core.engine import loop, seeding
from difflt_core.engine.device import to_device

aten = torch.ops.aten
# They need a number, or a shape, from the device.
READS = {
    aten._local_scalar_dense, aten.nonzero, aten.nonzero_numpy, aten.masked_select,
    aten.bincount, aten.repeat_interleave, aten.unique_dim, aten._unique2, aten.equal,
}  # fmt: skip
INDEXES = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
CALLS = {
    getattr(torch.Tensor, name)
    for name in (
        "cpu", "numpy", "tolist", "item", "nonzero", "__bool__", "__int__", "__float__", "__index__",
        "__array__", "new_tensor",
    )
}  # fmt: skip
MOVES = {torch.Tensor.to, torch.tensor, torch.as_tensor}  # where a device is named
# What may look at a tensor, because it is the host's: the order of an epoch, torchvision's magnitudes
# and what its operations do to every image; the one way to a device; and what torchvision copies in
# colours from hues: 144 bytes, not waited for.
HOST = {
    f.__code__
    for f in (
        seeding._epoch_order.__wrapped__, policies._operation, policies._table.__wrapped__, to_device,
        _hsv_to_rgb,
    )
}  # fmt: skip


class Synchronises(AssertionError):
    pass


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        if packet in READS:
            raise Synchronises(f"{func} reads from the device")
        if packet in INDEXES:
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            filled = packet is not aten.index and args[2].numel() == 1  # torch fills under the mask
            if masks and not filled:
                raise Synchronises(f"{func} by a mask: its shape comes from the device")
        return func(*args, **kwargs or {})


class _Calls(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, caller = kwargs or {}, sys._getframe(1)
        if func in CALLS and not _on_the_host(caller):
            raise Synchronises(f"{func} reads from the device, or waits for a copy to it")
        moves = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, (str, torch.device))]
        if func in MOVES and moves and not _on_the_host(caller) and not _of_torch(caller):
            raise Synchronises(f"{func} waits for a copy; use engine.device.to_device")
        return func(*args, **kwargs)


def _on_the_host(frame) -> bool:
    """Whether the call, or what called it, is one of HOST."""
    while frame is not None and frame.f_code not in HOST:
        frame = frame.f_back
    return frame is not None


def _of_torch(frame) -> bool:
    return "/torch/" in frame.f_code.co_filename


@contextlib.contextmanager
def no_sync():
    with _Calls(), _Operators():
        yield


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).any()),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: np.asarray(x),
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.to("cpu"),
        lambda x: x.new_tensor([0.3, 0.6]),
        lambda x: torch.tensor([0.3, 0.6], device="cpu"),
        lambda x: torch.bincount(x.long()),
        lambda x: torch.nn.functional.one_hot(x.long(), 3),
    ],
)
def test_the_guard_sees(read):
    with pytest.raises(Synchronises), no_sync():
        read(torch.ones(3))


def test_the_guard_lets_pass():
    with no_sync():
        x = to_device(np.ones(3), "cpu")
        x[x > 2] = 0.0
        x = torch.where(x > 0, x, -x)[torch.tensor([0, 1])]
        assert x.shape == (2,)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_policy(policy, channels):
    x = torch.rand(64, channels, 12, 12) * 2 - 1
    with no_sync():
        POLICIES[policy](x, True, 0)


@pytest.fixture
def guarded(monkeypatch):
    """Steps early and late of every training are guarded, from the learning rate to the checkpoint."""
    factor, stack, steps = loop.lr_factor, contextlib.ExitStack(), []

    def watched(schedule, step, *rest):
        stack.close()
        if step in (1, 2, 3, 6, 7, 8):
            stack.enter_context(no_sync())
            steps.append(step)
        return factor(schedule, step, *rest)

    monkeypatch.setattr(loop, "lr_factor", watched)
    yield steps
    stack.close()


def pipeline(trained, **changes) -> Pipeline:
    steps = {f"{part}.n_steps": 10 for part in ("extractor", "diffusion", "classifier", "sau")}
    return trained.vary({**steps, **{k.replace("__", "."): v for k, v in changes.items()}})


READINGS = ("own", "other", "difference", "sample")


@pytest.mark.parametrize("reading", READINGS)
def test_generator(trained, guarded, reading):
    more = {"diffusion__plain_share": 0.5, "diffusion__schedule": "trapezoid"}
    more |= {"diffusion__flip": True, "diffusion__class_balance": 0.5, "diffusion__augment": 0.15}
    pipeline(
        trained, diffusion__aid_reading=reading, diffusion__alpha=0.05, **more
    ).train_diffusion()
    assert 8 in guarded


def test_generator_of_eps(trained, guarded):
    more = {"diffusion__parameterisation": "eps", "diffusion__cbdm_labels": "prior"}
    pipeline(trained, diffusion__tau=1.0, diffusion__alpha=0.1, **more).train_diffusion()
    assert 8 in guarded


@pytest.mark.parametrize("method", ["ce", "cb", "bsce", "ldam", "ride", "paco", "gpaco"])
def test_classifier(trained, guarded, method):
    policy = {"ride": "rotate", "ce": "randaugment"}.get(method, "autoaugment")
    more = {"classifier__policy": policy, "classifier__second_policy": "contrastive"}
    more |= {"classifier__flip": True, "classifier__cutout": 2}
    pipeline(trained, classifier__method=method, **more).train_on_real()
    assert 8 in guarded


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_mixed_images(trained, guarded, mix):
    pipeline(trained, classifier__mix=mix).train_classifier()
    assert 8 in guarded


@pytest.mark.parametrize(
    "branches, strategy",
    [(b, s) for b in ("both", "aware") for s in ("pos_neg", "neg_only", "drop", "trust")]
    + [("unaware", "pos_neg")],  # which has no contrast
)
def test_sau(trained, guarded, strategy, branches):
    more = {"sau__policy": "autoaugment", "sau__second_policy": "contrastive", "sau__flip": True}
    pipeline(trained, sau__branches=branches, sau__strategy=strategy, **more).train_sau()
    assert 8 in guarded
