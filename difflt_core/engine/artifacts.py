"""Artifacts: the results of the stages, kept under a key so that nothing is computed twice and
nothing is half written.

An artifact is a folder `<root>/<stage>/<key>/` with arrays (.npy), tensors (.safetensors), .json,
and a manifest with the size and SHA-256 of each file. The key hashes the stage's resolved settings,
the keys of its inputs, and the code that the stage runs. Only safe formats are read: never a
pickle.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from . import parallel
from .code_version import code_version
from .device import how_compiled
from .precision import set_kernels, which_kernels
from .progress import Context, bar
from .provenance import environment

__all__ = [
    "Artifact",
    "Stage",
    "Store",
    "atomic_write",
    "file_sha256",
    "finish_chunks",
    "load_tensors",
    "new_folder",
    "open_chunks",
    "save_tensors",
    "unfilled",
    "writable",
]

_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Stage:
    """A function (work folder, config, inputs, context) -> None that writes its results into work /
    "out"."""

    name: str
    build: Callable
    parallel: bool = False  # every process of a group takes part; else the main one builds alone
    # {"package.module.TABLE": key or keys}: entries of a dispatch table that its code depends on
    chosen: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Artifact:
    path: Path
    key: str
    manifest: dict = field(repr=False)

    def array(self, name: str, mmap: bool = True) -> np.ndarray:
        return np.load(
            self.path / f"{name}.npy", mmap_mode="r" if mmap else None, allow_pickle=False
        )

    def tensors(self, name: str) -> dict:
        return load_tensors(self.path / f"{name}.safetensors")

    def json(self, name: str) -> dict:
        return json.loads((self.path / f"{name}.json").read_text(encoding="utf-8"))


class Store:
    """Finds artifacts, or builds them once however many processes ask.

    Args:
        root: folder of the cache; made when missing.
        context: handed to every build function (device, progress): things that do not change a
            result.
    """

    def __init__(self, root: Path, context: Context | None = None):
        self.root = Path(root)
        self.context = context or Context()
        self._verified: dict[Path, dict] = {}  # sizes and times of files whose hashes were right

    def get(
        self, stage: Stage, config: dict, inputs: dict[str, Artifact] | None = None
    ) -> Artifact:
        """The artifact of a stage for these settings and inputs, built when it is missing or
        damaged."""
        inputs = inputs or {}
        recipe, key = self.recipe(stage, config, inputs)
        folder = self._folder(stage.name)
        final = folder / key
        lock = FileLock(folder / f"{key}.lock")
        if parallel.rank() == 0:
            lock.acquire()
        try:
            found = self._load(final, key) if parallel.rank() == 0 else None
            if not parallel.from_main(found is not None):
                found = self._build(stage, config, inputs, recipe, final)
            return found or self._load(final, key)
        except (OSError, SafetensorError) as error:
            if not _DISK_FULL.search(str(error)):
                raise
            raise OSError(
                errno.ENOSPC,
                f"no space left in {self.root} while building {stage.name}; free some, or use "
                "another --out, and run again: what was finished is kept",
            ) from error
        finally:
            lock.release()

    def recipe(self, stage: Stage, config: dict, inputs: dict[str, Artifact]) -> tuple[dict, str]:
        """What an artifact is made from, and the key that is its hash."""
        recipe = {
            "stage": stage.name,
            "config": config,
            "inputs": {name: a.key for name, a in inputs.items()},
            "code": code_version(stage.build, stage.chosen),
        }
        return recipe, _key(recipe)

    def find(self, stage_name: str, key: str) -> Artifact | None:
        """The whole and undamaged artifact of a key, or None; nothing is built."""
        with FileLock(self._folder(stage_name) / f"{key}.lock"):
            return self._load(self.root / stage_name / key, key)

    def _folder(self, stage_name: str) -> Path:
        folder = self.root / stage_name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _build(self, stage, config, inputs, recipe, final: Path) -> Artifact | None:
        work = final.with_name(f"{final.name}.work")  # survives a kill: checkpoints live here
        out, main = work / "out", parallel.rank() == 0
        if main:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
        parallel.barrier()
        started = time.monotonic()
        set_kernels(self.context.device)
        how_compiled()  # since here
        if main or stage.parallel:
            company = contextlib.nullcontext() if stage.parallel else parallel.alone()
            with company, _threads(self.context.threads):
                stage.build(work, config, inputs, self.context)
        if not main:
            parallel.barrier()
            return None
        elapsed_s = time.monotonic() - started
        files = {p.name: [p.stat().st_size, file_sha256(p)] for p in sorted(out.iterdir())}
        manifest = {
            "recipe": recipe,
            "files": files,
            "elapsed_s": round(elapsed_s, 2),
            "environment": environment(self.context.device),
            "kernels": which_kernels() | {"compiled": how_compiled()},
        }
        atomic_write(out / _MANIFEST, json.dumps(manifest, indent=1))
        os.replace(out, final)
        shutil.rmtree(work, ignore_errors=True)
        parallel.barrier()
        return Artifact(final, final.name, manifest)

    def _load(self, final: Path, key: str) -> Artifact | None:
        if not final.exists():
            return None
        fault = None
        try:
            manifest = json.loads((final / _MANIFEST).read_text(encoding="utf-8"))
            if _key(manifest["recipe"]) != key:
                fault = "made from other settings: a folder of another run"
            stats = {name: (final / name).stat() for name in manifest["files"]}
            facts = {name: (s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats.items()}
            changed = facts != self._verified.get(final)  # else they need not be hashed again
            for name, (size, digest) in manifest["files"].items():
                if facts[name][0] != size or (changed and file_sha256(final / name) != digest):
                    fault = f"{name} is not what was written"
        except (OSError, ValueError, KeyError, TypeError) as error:
            fault = f"{type(error).__name__}: {error}"
        if fault is None:
            self._verified[final] = facts
            # Left by a kill between the last two lines of _build.
            shutil.rmtree(final.with_name(f"{key}.work"), ignore_errors=True)
            return Artifact(final, key, manifest)
        aside = final.with_name(f"{key}.corrupt-{uuid.uuid4().hex}")
        os.replace(final, aside)
        warnings.warn(
            f"damaged artifact {final} ({fault}): moved to {aside.name}, building it again",
            stacklevel=2,
        )
        return None


# What the system, safetensors and numpy say, the last without an errno.
_DISK_FULL = re.compile("No space left|Not enough free space|[0-9]+ requested and [0-9]+ written")


def _key(recipe: dict) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:20]


def open_chunks(work: Path, name: str, shape: tuple, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Memory-mapped uint8 images of a shape in work/<name>_images.npy, and a byte per chunk of rows
    that says whether it is written: what is there after a kill is not made again."""
    paths = {
        work / f"{name}_images.npy": shape,
        work / f"{name}_done.npy": (-(-shape[0] // chunk),),
    }
    if parallel.rank() == 0:
        try:
            whole = all(np.load(p, mmap_mode="r").shape == s for p, s in paths.items())
        except (OSError, ValueError):
            whole = False
        for path, wanted in paths.items() if not whole else ():
            writable(path, np.uint8, wanted)
    parallel.barrier()
    if not shape[0]:  # nothing to make, and nothing can be mapped
        return np.zeros(shape, np.uint8), np.zeros(0, np.uint8)
    return tuple(np.load(path, mmap_mode="r+") for path in paths)


def unfilled(images: np.ndarray, done: np.ndarray, chunk: int, what: str, context):
    """The slices of rows that are still to be written, with a bar; several processes share them.

    images, done: from open_chunks. A slice counts as written when the loop asks for the next one.
    """
    N = len(images)
    with bar(N, what, "image", min(int((done == 1).sum()) * chunk, N), context) as progress:
        for i in np.flatnonzero(done == 0):
            if i % parallel.n_processes() != parallel.rank():
                continue
            part = slice(i * chunk, min((i + 1) * chunk, N))
            yield part
            images.flush()
            done[i] = 1
            done.flush()
            progress.update(part.stop - part.start)


def writable(path: Path, dtype, shape: tuple[int, ...]) -> np.ndarray:
    """A new .npy file of zeros, mapped for writing; an empty one cannot be mapped. Its space is taken
    at once: on a full disk that is an error, and a write to a hole would kill the process."""
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


def finish_chunks(work: Path, name: str, labels, info: dict) -> None:
    """All is written: work/<name>_images.npy becomes work/out/images.npy, beside labels.npy int64
    (N,) and info.json, which says where the images come from."""
    parallel.barrier()
    if parallel.rank() == 0:
        out = work / "out"
        np.save(out / "labels.npy", np.asarray(labels, dtype=np.int64))
        (out / "info.json").write_text(json.dumps(info), encoding="utf-8")
        os.replace(work / f"{name}_images.npy", out / "images.npy")


@contextlib.contextmanager
def _threads(n: int | None):
    """Give torch n threads for a while. A result may round differently with another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write a whole file or nothing: a temporary beside it, flushed to disk, then renamed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
    if to.exists():
        raise FileExistsError(f"{to}: is there already; choose another folder, or remove it first")
    work = to.with_name(f".{to.name}.{os.getpid()}.part")
    work.mkdir(parents=True)
    try:
        yield work
        os.replace(work, to)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def save_tensors(path: Path, tensors: dict, metadata: dict[str, str] | None = None) -> None:
    """Atomic safetensors file; tensors are moved to the CPU and made contiguous."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata
        )
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path: Path) -> dict:
    return load_file(path)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
