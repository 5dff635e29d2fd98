"""How many bits a stage computes in, and what to say when a batch does not fit. It decides numbers, so
it counts in a stage's version."""

__all__ = ["fast_bf16", "half_precision", "out_of_memory"]


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


def out_of_memory(error: Exception, setting: str, batch_size: int) -> MemoryError:
    """The error to raise when a batch does not fit; the last checkpoint stays where it is."""
    first_line = str(error).splitlines()[0]
    return MemoryError(
        f"{setting}: a batch of {batch_size} does not fit into memory ({first_line}); "
        f"try {max(1, batch_size // 2)}. Nothing is lost: the last checkpoint is kept."
    )
