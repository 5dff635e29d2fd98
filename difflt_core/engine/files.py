"""Files that are whole or not there: written beside their place, flushed to disk, then renamed (those of
a stage with its whole folder). Only safe formats are read: never a pickle."""

import contextlib
import hashlib
import io
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

__all__ = [
    "atomic_write",
    "file_sha256",
    "flush",
    "load_tensors",
    "new_folder",
    "refuse_existing",
    "save_array",
    "save_tensors",
    "writable",
]


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write a whole file or nothing: a temporary beside it, flushed to disk, then renamed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data.encode("utf-8") if isinstance(data, str) else data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `to` at the end: complete, or not there at all.

    Raises:
        FileExistsError: `to` is there already.
    """
    refuse_existing(to)
    work = to.with_name(f".{to.name}.{uuid.uuid4().hex[:8]}.part")
    work.mkdir(parents=True)
    try:
        yield work
        os.replace(work, to)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def refuse_existing(to: Path) -> None:
    """Raise FileExistsError where a new folder cannot go."""
    if to.exists():
        raise FileExistsError(f"{to}: is there already; name a new one, or remove it first")


def save_array(path: Path, array: np.ndarray) -> None:
    """Atomic .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    atomic_write(path, buffer.getvalue())


def save_tensors(path: Path, tensors: dict, metadata: dict[str, str] | None = None) -> None:
    """Atomic safetensors file; tensors are moved to the CPU and made contiguous."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata
        )
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until what was written into a file is on the disk."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())


def load_tensors(path: Path) -> dict:
    return load_file(path)


def writable(path: Path, dtype, shape: tuple[int, ...]) -> np.ndarray:
    """A new .npy file of zeros, mapped for writing, which its artifact flushes before it stands; an empty
    one cannot be mapped. Its space is taken at once: on a full disk that is an error, and a write to a
    hole would kill the process."""
    if 0 in shape:
        np.save(path, np.zeros(shape, dtype))
        return np.zeros(shape, dtype)
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with open(path, "r+b") as f:
        size = f.seek(0, os.SEEK_END)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(f.fileno(), 0, size)
        else:
            f.seek(size - array.nbytes)
            for start in range(0, array.nbytes, 1 << 20):
                f.write(bytes(min(1 << 20, array.nbytes - start)))
    return array


def file_sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
