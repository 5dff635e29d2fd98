"""The generator's presets: sizes and FLOPs as their comments state them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from difflt_core.generation.network import PRESETS, make_unet


@pytest.mark.parametrize(
    "preset, n_classes, size, channels, n_parameters, gflop",
    [
        ("nano", 10, 8, 1, 160_401, 0.00752),
        ("tiny", 10, 8, 1, 635_681, 0.030),
        ("small16", 10, 16, 3, 2_389_395, 0.275),
        ("small32", 10, 32, 3, 2_397_180, 0.279),
        # docs/protocol.md (CBDM) counts 35,751,427 and 35,797,507; the null class adds one embedding of 512.
        ("cifar", 10, 32, 3, 35_751_427 + 512, 12.44),
        ("cifar", 100, 32, 3, 35_797_507 + 512, 12.44),
        ("imagenet64", 1000, 64, 3, 199_179_459, 135.9),
    ],
)
def test_parameters_and_flops(preset, n_classes, size, channels, n_parameters, gflop):
    with torch.device("meta"):
        unet = make_unet(preset, n_classes, size, channels)
        zeros = torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            unet(torch.zeros(1, channels, size, size), zeros, zeros)
    assert sum(p.numel() for p in unet.parameters()) == n_parameters
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, rel=0.01)
    (embedding,) = [m for m in unet.modules() if isinstance(m, torch.nn.Embedding)]
    assert embedding.num_embeddings == unet.config.num_class_embeds == n_classes + 1


def test_every_preset_is_tested_and_has_a_size_it_fits():
    for preset, arguments in PRESETS.items():
        smallest = arguments.get("patch", 1) * 2 ** (len(arguments["block_out_channels"]) - 1)
        with pytest.raises(ValueError, match=f"divides by {smallest}, got 33"):
            make_unet(preset, 10, 33, 3)


def test_a_network_of_patches_has_the_pixels_in_their_places():
    unet = make_unet("small32", 10, 32, 3)
    unet.unet.forward = lambda x, c_noise, y, return_dict: (x,)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(unet(x, torch.zeros(2), torch.zeros(2, dtype=torch.long))[0], x)
    assert (unet.config.in_channels, unet.config.sample_size) == (3, 32)
