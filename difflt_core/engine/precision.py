"""How many bits a stage computes in, and what to say when a batch does not fit. It decides numbers, so
it counts in a stage's version."""

import os
import warnings

__all__ = ["fast_bf16", "half_precision", "out_of_memory", "set_kernels", "which_kernels"]


def half_precision(precision: str, device: str) -> bool:
    """Whether to compute in bf16: for "bf16", and for "auto" where the device is fast at it.

    Raises:
        ValueError: bf16 on a GPU that has none.
    """
    import torch

    if precision == "bf16" and device == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError("precision: bf16 was asked for, but this GPU has none; use fp32 or auto")
    return precision == "bf16" or (precision == "auto" and fast_bf16(device))


def fast_bf16(device: str) -> bool:
    """Whether the device, "cpu" or "cuda", has instructions for bf16."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def set_kernels(device: str) -> None:
    """On a GPU: the fastest convolution of each shape, and fp32 that is fp32, as on a CPU: what has to be
    fast is in bf16. With DIFFLT_DETERMINISTIC=1 only kernels that give the same bits in every run."""
    import torch

    if device == "cpu":
        return
    exact = os.environ.get("DIFFLT_DETERMINISTIC") == "1"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # torch's advice to switch it on
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
    torch.backends.cudnn.benchmark = not exact
    # attention whose gradients add up in any order
    for fused in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{fused}_sdp")(not exact)
    if exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(exact, warn_only=True)


def which_kernels() -> dict[str, bool]:
    """The outcome of set_kernels, for the provenance."""
    import torch

    return {
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def out_of_memory(error: Exception, setting: str, batch_size: int) -> MemoryError:
    """The error to raise when a batch does not fit; the last checkpoint stays where it is."""
    first_line = str(error).splitlines()[0]
    remedy = (
        f"try --set {setting}={batch_size // 2}"
        if batch_size > 1
        else "take smaller images or a smaller network"
    )
    return MemoryError(
        f"{setting}: a batch of {batch_size} does not fit into memory ({first_line}); "
        f"{remedy}. The last checkpoint is kept, for more "
        "memory; another batch is another training, from its start."
    )
