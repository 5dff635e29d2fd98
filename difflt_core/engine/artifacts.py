"""Artifacts: the results of the stages, kept under a key so that nothing is computed twice and
nothing is half written.

An artifact is a folder `<root>/<stage>/<key>/` with arrays (.npy), tensors (.safetensors), .json,
and a manifest with the size and SHA-256 of each file. The key hashes the stage's resolved settings,
the keys of its inputs, and the code that the stage runs. Only safe formats are read: never a
pickle.
"""

import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from . import parallel
from .code_version import code_version
from .device import how_compiled
from .files import atomic_write, file_sha256, flush, load_tensors
from .live_code import refuse_replaced
from .precision import set_kernels, which_kernels
from .progress import Context, bar, catch_up, read_share
from .provenance import environment
from .time_left import own_steps

__all__ = [
    "Artifact",
    "Node",
    "Stage",
    "Store",
    "check",
    "lease",
    "set_aside_damaged",
]

_MANIFEST = "manifest.json"
# Steps from which on a training on a GPU is compiled. That takes each process tens of seconds, so it is no
# use to a short one; where it begins to pay is a guess until a GPU says.
_LONG = 10_000
_leases: dict[Path, FileLock] = {}
_ME = uuid.uuid4().hex[:8]  # containers of one host name may have equal process numbers


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
class Node:
    """An artifact that may not be there yet: what it is made from, and the key that is its hash."""

    stage: Stage
    recipe: dict
    key: str
    inputs: dict[str, "Artifact"]

    @property
    def config(self) -> dict:
        return self.recipe["config"]


@dataclass(frozen=True)
class Artifact:
    path: Path
    key: str
    manifest: dict = field(repr=False)

    def array(self, name: str) -> np.ndarray:
        return np.load(self.path / f"{name}.npy", mmap_mode="r", allow_pickle=False)

    def tensors(self, name: str) -> dict:
        return load_tensors(self.path / f"{name}.safetensors")

    def json(self, name: str) -> dict:
        return json.loads((self.path / f"{name}.json").read_text(encoding="utf-8"))


class Store:
    """Finds artifacts, or builds them once however many processes and hosts ask.

    Args:
        root: folder of the cache; made when missing. Hosts may share it.
        context: handed to every build function (device, progress): things that do not change a
            result.
    """

    def __init__(self, root: Path, context: Context | None = None):
        self.root = Path(root).resolve()  # workers have other working folders
        self.context = context or Context()

    def get(
        self, stage: Stage, config: dict, inputs: dict[str, Artifact] | None = None
    ) -> Artifact:
        """The artifact of a stage for these settings and inputs, built when it is missing or
        damaged."""
        return self.build(self.plan(stage, config, inputs or {}))

    def build(self, node: Node) -> Artifact:
        """The same, of a plan."""
        stage, key, lock = node.stage, node.key, None
        final = self._folder(stage.name) / key
        _hold(lease(self.root))

        def find_or_lock() -> bool:
            nonlocal lock
            if self._load(final, key) is None:
                lock = self._lock(stage.name, key)
            return self._load(final, key, set_aside=True) is not None

        try:
            # of a group only the main process locks, and the others hear what it found
            if not parallel.main_first(find_or_lock):
                self._build(node, final)
        except (OSError, SafetensorError) as error:
            if not _DISK_FULL.search(str(error)):
                raise
            raise OSError(
                errno.ENOSPC,
                f"no space left in {self.root} while building {stage.name}; free some, or use "
                "another --out, and run again: what was finished is kept",
            ) from error
        finally:
            if lock is not None:
                lock.release()
        for _ in range(60):  # another process of the group may see the folder a little later
            if (found := self._load(final, key)) is not None:
                return found
            time.sleep(0.5)
        raise FileNotFoundError(
            f"{final}: was built, and cannot be seen; give all processes one --out"
        )

    def plan(self, stage: Stage, config: dict, inputs: dict[str, Artifact]) -> Node:
        """A precision "auto" becomes what it is on this device, so that a cache never mixes two.

        Raises:
            ValueError: this process has put something else in the place of the stage's code.
        """
        recipe = {
            "stage": stage.name,
            "config": _resolved(config, self.context.auto_precision),
            "inputs": {name: a.key for name, a in inputs.items()},
            "code": code_version(stage.build, stage.chosen),
            "packages": _numeric_packages(),
        }
        refuse_replaced(stage.build, stage.chosen)
        return Node(stage, recipe, _key(recipe), inputs)

    def find(self, stage_name: str, key: str) -> Artifact | None:
        """The whole artifact of a key, by its manifest and sizes, or None; nothing is built."""
        return self._load(self.root / stage_name / key, key)

    def progress_file(self, stage_name: str, key: str) -> Path:
        """Where whoever builds an artifact writes the share that is done, 0 to 1."""
        return self.root / stage_name / f"{key}.progress"

    def _folder(self, stage_name: str) -> Path:
        folder = self.root / stage_name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _lock(self, stage_name: str, key: str) -> FileLock:
        """The lock of a key. Where another run builds it, a bar says what is waited for, how far it
        is and how long that may take."""
        lock = FileLock(self._folder(stage_name) / f"{key}.lock")
        try:
            return lock.acquire(timeout=2).lock
        except Timeout:
            pass
        what = f"waiting: another run builds {stage_name} {key[:8]}"
        told = self.progress_file(stage_name, key)
        with bar(100, what, "%", context=self.context) as progress:
            there = 100 * read_share(told)[0]
            catch_up(progress, there)
            while True:
                share = 100 * read_share(told)[0]
                progress.update(max(0.0, share - there))
                there = max(there, share)
                with contextlib.suppress(Timeout):
                    return lock.acquire(timeout=2).lock

    def _build(self, node: Node, final: Path) -> None:
        """In a work folder of this attempt's own; the key is locked."""
        stage = node.stage
        told = self.progress_file(stage.name, final.name)
        told.unlink(missing_ok=True)  # of an attempt that may have got farther than its checkpoint
        work = parallel.main_first(lambda: _attempt(final))
        context, started = replace(self.context, share_file=told), time.monotonic()
        set_kernels(context.device)

        def build() -> None:
            with _threads(context.threads), _compiled_if_long(node):
                stage.build(work, node.config, node.inputs, context)

        def finish() -> None:
            out = work / "out"
            made = sorted(out.iterdir())
            for path in made:
                flush(path)
            files = {p.name: [p.stat().st_size, file_sha256(p)] for p in made}
            manifest = {
                "recipe": node.recipe,
                "files": files,
                "elapsed_s": round(time.monotonic() - started, 2),
                "environment": environment(context.device_here),
                "kernels": which_kernels() | {"compiled": how_compiled()},
            }
            atomic_write(out / _MANIFEST, json.dumps(manifest, indent=1))
            os.replace(out, final)
            told.unlink(missing_ok=True)
            shutil.rmtree(work, ignore_errors=True)

        try:
            build() if stage.parallel else parallel.main_first(build)
            parallel.barrier()
            parallel.main_first(finish)
        except OSError as error:
            if self._load(final, final.name) is None:
                raise
            # A host that does not see our lock took the attempt over, or made one of its own.
            shutil.rmtree(work, ignore_errors=True)
            warnings.warn(
                f"{final}: another host built it at the same time ({error})", stacklevel=2
            )
        finally:
            how_compiled()  # what a stage that failed has left

    def _load(self, final: Path, key: str, set_aside: bool = False) -> Artifact | None:
        """set_aside: move away what is damaged, which takes the key's lock."""
        if not final.exists():
            return None
        manifest, fault = check(final, key)
        if fault is None:
            return Artifact(final, key, manifest)
        if set_aside:
            aside = set_aside_damaged(final)
            warnings.warn(
                f"damaged artifact {final} ({fault}): moved to {aside.name}, building it again",
                stacklevel=2,
            )
        return None


@contextlib.contextmanager
def _compiled_if_long(node: Node):
    """Where DIFFLT_COMPILE says nothing, it is off for a training of few steps (see _LONG)."""
    steps = own_steps(node)
    if not steps or steps >= _LONG or "DIFFLT_COMPILE" in os.environ:
        yield
        return
    os.environ["DIFFLT_COMPILE"] = "off"
    try:
        yield
    finally:
        del os.environ["DIFFLT_COMPILE"]


def set_aside_damaged(final: Path) -> Path:
    """Move a damaged artifact, whose key is locked, out of the way, and return where it is. What is left of
    the attempt that made it may share its damaged files, and is removed."""
    aside = final.with_name(f"{final.name}.corrupt-{uuid.uuid4().hex}")
    os.replace(final, aside)
    for work in final.parent.glob(f"{final.name}.work-*"):
        shutil.rmtree(work, ignore_errors=True)
    return aside


def lease(root: Path) -> Path:
    """The file that this process locks, until it ends, when it first asks the cache root for an artifact:
    nothing is removed while another process holds one."""
    return root / "in-use" / f"{socket.gethostname()}-{os.getpid()}-{_ME}.lock"


def _hold(path: Path) -> None:
    if path in _leases:
        return
    _leases[path] = FileLock(path)
    with contextlib.suppress(OSError):  # from a cache that is read-only nothing is removed either
        path.parent.mkdir(parents=True, exist_ok=True)
        _leases[path].acquire(timeout=0)


def check(final: Path, key: str, hashes: bool = False) -> tuple[dict, str | None]:
    """The manifest of an artifact, and what is wrong with it, or None. hashes: read every byte, which
    ./run_all.sh --verify does; else settings and sizes are compared."""
    manifest: dict = {}
    try:
        manifest = json.loads((final / _MANIFEST).read_text(encoding="utf-8"))
        if _key(manifest["recipe"]) != key:
            return manifest, "made from other settings: a folder of another run"
        for name, (size, digest) in manifest["files"].items():
            there = (final / name).stat().st_size
            if there != size or (hashes and file_sha256(final / name) != digest):
                return manifest, f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return manifest, f"{type(error).__name__}: {error}"
    return manifest, None


def _attempt(final: Path) -> Path:
    """The work folder of this attempt, with an empty out/. The newest one that a killed attempt left is
    adopted, by a new name: should its process live on a host that does not see our lock, its next file
    fails, and it never writes beside us."""
    work = final.with_name(f"{final.name}.work-{uuid.uuid4().hex[:8]}")
    left = sorted(final.parent.glob(f"{final.name}.work-*"), key=lambda p: p.stat().st_mtime)
    if left:
        os.replace(left.pop(), work)
    for older in left:
        shutil.rmtree(older, ignore_errors=True)
    shutil.rmtree(work / "out", ignore_errors=True)
    (work / "out").mkdir(parents=True)
    return work


def _resolved(config: dict, auto_precision: str) -> dict:
    """Settings with what "auto" is in place of it."""
    return {
        name: _resolved(value, auto_precision)
        if isinstance(value, dict)
        else auto_precision
        if (name, value) == ("precision", "auto")
        else value
        for name, value in config.items()
    }


@functools.cache
def _numeric_packages() -> dict[str, str]:
    """Versions of the packages whose arithmetic a result has, as far as they promise to keep it: the
    first number, or the first two while the first is 0."""
    found = {}
    for name in ("torch", "torchvision", "diffusers", "numpy", "pillow"):
        major, minor = importlib.metadata.version(name).split(".")[:2]
        found[name] = major if major != "0" else f"0.{minor}"
    return found


# What the system, safetensors and numpy say, the last without an errno.
_DISK_FULL = re.compile("No space left|Not enough free space|[0-9]+ requested and [0-9]+ written")


def _key(recipe: dict) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:20]


@contextlib.contextmanager
def _threads(n: int | None):
    """Give torch n threads for a while. A result may round differently with another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
