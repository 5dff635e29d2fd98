"""Compiled steps are the steps as they are written, and what cannot be compiled goes on."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from difflt_core.config import ClassifierConfig, SauConfig
from difflt_core.data.long_tail import load_split
from difflt_core.engine.device import Compiled, compiled, how_compiled, to_device
from difflt_core.engine.provenance import ROOT
from difflt_core.generation.network import Denoiser, make_unet
from difflt_core.generation.noise import make_noise
from difflt_core.generation.training import StepLoss
from difflt_core.recognition.methods import make_objective
from difflt_core.recognition.networks import make_backbone
from difflt_core.recognition.sau import SauSteps

needs_compiler = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler"
)


def gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_alike(plain, fast) -> None:
    """Losses and gradients within a thousandth of their size."""
    for a, b in zip(plain, fast, strict=True):
        assert float((a - b).norm()) <= 1e-3 * float(a.norm())


@pytest.mark.parametrize("kind_of_noise", ["edm", "eps"])
def test_generator_step(trained, kind_of_noise):
    """As dynamo and autograd trace it; no kernel is built, which a CPU would have others of."""
    changes = {"alpha": 0.1, "tau": 1.0, "parameterisation": kind_of_noise}
    recipe = trained.config.diffusion.model_copy(update=changes)
    train = load_split(trained.data(), "train")
    settings = {"radius": "max", "aid_factor": 2.0}
    inputs = {"extractor": trained.train_extractor()}
    found = []
    for kind in (lambda f: f, lambda f: Compiled(f, "test", backend="aot_eager")):
        torch.manual_seed(0)
        size, channels = train.images.shape[1], train.images.shape[-1]
        unet = make_unet("nano", len(train.class_names), size, channels)
        loss = StepLoss(recipe, 0, train, "cpu", inputs, settings)
        loss.terms = kind(loss._terms)
        terms = loss(Denoiser(unet, make_noise(recipe)), 1)
        terms.sum().backward()
        found.append((terms.detach(), gradients(unet)))
    assert (found[0][0] > 0).all()
    assert_alike(*found)
    assert how_compiled() == {"test": "default"}


@needs_compiler
def test_classifier_step():
    """In float64: at the start of a training rounding grows from layer to layer."""
    found, g = [], torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 3, 16, 16, generator=g).double(), torch.arange(16) % 4
    for kind in (lambda f: f, lambda f: Compiled(f, "test")):
        torch.manual_seed(0)
        net = make_backbone("resnet32", 4, 3)
        objective = make_objective(ClassifierConfig(), net, [9, 5, 2, 1]).double()
        net.features = kind(net.features)
        loss = objective([x], y, torch.ones(16).double(), 0)
        loss.backward()
        found.append((loss.detach(), gradients(objective)))
    assert_alike(*found)
    assert how_compiled() == {"test": "default"}


def test_sau_step(trained):
    """The backbone in float64, as above; traced, as the generator's."""
    recipe = SauConfig(n_steps=2, batch_size=16, projector_width=32, flip=True)
    config = {"sau": recipe.settings(), "seed": 0}
    inputs = {"data": trained.data(), "synthetic": trained.synthetic()}
    found = []
    for kind in (lambda f: f, lambda f: Compiled(f, "test", backend="aot_eager")):
        sau = SauSteps(config, inputs, trained.store.context)
        inner = kind(sau.model.net.double().features)
        sau.model.net.features = lambda x, inner=inner: inner(x.double()).float()
        loss, logged = sau.step(0)
        loss.backward()
        found.append((logged[:2], gradients(sau.model)))
    assert_alike(*found)
    assert how_compiled() == {"test": "default"}


def test_what_cannot_be_compiled_goes_on_and_says_why():
    def broken(graph, inputs):
        raise NotImplementedError("no such kernel")

    double = Compiled(lambda x: 2 * x, "the step", backend=broken)
    with pytest.warns(UserWarning, match=r"the step cannot be compiled .*no such kernel"):
        assert double(torch.ones(())) == 2
    assert double(torch.ones(())) == 2  # and is not tried again
    assert "no such kernel" in how_compiled()["the step"]
    assert how_compiled() == {}


def test_more_graphs_than_its_limit_are_said(monkeypatch):
    monkeypatch.setattr("difflt_core.engine.device._MOST_GRAPHS", 12)
    times = Compiled(lambda x, tau: x * tau, "the step", backend="eager")
    for tau in range(12):  # a setting that is swept: dynamo's own limit is 8
        assert times(torch.ones(()), tau / 7) == torch.tensor(tau / 7)
    with pytest.warns(UserWarning, match=r"the step cannot be compiled .*recompile_limit"):
        for tau in range(12, 16):
            assert times(torch.ones(()), tau / 7) == torch.tensor(tau / 7)
    assert "recompile_limit" in how_compiled()["the step"]


def test_what_a_graph_gives_without_gradients_is_the_callers():
    """CUDA graphs write every output of a call to the same place."""
    same = Compiled(lambda x: x, "the step", backend="eager")
    same.mode, x = "reduce-overhead", torch.ones(2, requires_grad=True)
    assert same(x) is x
    with torch.inference_mode():
        assert same(x).data_ptr() != x.data_ptr()
    how_compiled()


def test_an_error_of_the_function_itself_is_not_hidden():
    def wrong(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Compiled(wrong, "the step", backend="eager")(torch.ones(()))
    how_compiled()


def test_on_a_cpu_nothing_is_compiled(monkeypatch):
    assert compiled(abs, "x", "cpu") is abs
    monkeypatch.setenv("DIFFLT_COMPILE", "off")
    assert compiled(abs, "x", "cuda") is abs
    monkeypatch.setenv("DIFFLT_COMPILE", "fast")
    with pytest.raises(ValueError, match="expected one of default, reduce-overhead, off"):
        compiled(abs, "x", "cuda")


def test_a_fresh_process_compiles():
    """As a worker's, which has imported little."""
    code = "from difflt_core.engine.device import Compiled; Compiled(abs, 'any'); print('made')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout == "made\n", run.stderr


def test_to_device_keeps_type_and_values():
    for values in (np.arange(3), torch.rand(2, 3), np.array([True, False])):
        found = to_device(values, "cpu")
        assert torch.equal(found, torch.as_tensor(values))


def test_a_batch_that_does_not_fit_goes_through_in_parts(trained, monkeypatch):
    more = {"diffusion.n_steps": 8, "diffusion.batch_size": 32, "diffusion.tau": 1.0}
    whole = trained.vary({**more, "seed": 31}).train_diffusion()
    call, sizes = StepLoss.__call__, []

    def little_memory(self, denoise, step, part=0, n_parts=1):
        if n_parts < 4:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        sizes.append((step, part, n_parts))
        return call(self, denoise, step, part, n_parts)

    monkeypatch.setattr(StepLoss, "__call__", little_memory)
    other = trained.vary({**more, "seed": 31, "diffusion.n_steps": 9})  # another key
    with pytest.warns(UserWarning, match="goes through in 4 parts"):
        parts = other.train_diffusion()
    assert sizes[:5] == [(0, 0, 4), (0, 1, 4), (0, 2, 4), (0, 3, 4), (1, 0, 4)]
    np.testing.assert_allclose(parts.array("loss")[0], whole.array("loss")[0], rtol=1e-4)
