"""A cache over the months: `./run_all.sh --verify` reads every byte of it, `--gc` says what no figure was
made of."""

import json
import os
import shutil
import time
import uuid
from pathlib import Path

from filelock import FileLock, Timeout

from .artifacts import check, lease, set_aside_damaged
from .progress import bar
from .provenance import cache_folder

__all__ = ["unused", "upkeep", "verify"]


def upkeep(out: Path, verifying: bool, remove: bool) -> int:
    """What --verify and --gc do in the folder that holds runs/ and figures/; the exit status."""
    cache = cache_folder(out)
    if verifying:
        damaged = verify(cache)
        for folder, fault in damaged:
            print(f"damaged, set aside: {folder} ({fault})")
        print(f"{len(_artifacts(cache))} artifacts in {cache} are as they were written")
        return 1 if damaged else 0
    if remove and cache.resolve() != (out / "runs" / "cache").resolve():
        print(
            f"nothing is removed: {cache} serves other figures than those in {out}; leave out --cache"
        )
        return 1
    others = _others(cache) if remove else []
    notebooks = sorted((out / "runs").glob("*/*.lock")) if remove else []
    if busy := [lock.stem for lock in notebooks + others if _held(lock)]:
        print(
            f"nothing is removed while {', '.join(busy)} is at work (a notebook, or host-process: end it, "
            "or close its notebook); what it builds has no figure yet"
        )
        return 1
    for lock in others:  # of processes that have ended
        lock.unlink(missing_ok=True)
    total = 0
    for folder, why in unused(cache, out / "figures"):
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        done = "" if not remove else "removed: " if _remove(folder, cache) else "in use, left: "
        print(f"{size / 1e6:10.1f} MB  {done}{folder.relative_to(cache)}  ({why})")
        total += size
    hint = "" if remove or not total else "; ./run_all.sh --gc remove frees them"
    print(f"{total / 1e6:10.1f} MB in all, in {cache}{hint}")
    return 0


def verify(cache: Path) -> list[tuple[Path, str]]:
    """The artifacts whose bytes are not those that were written, and what is wrong; they are moved
    aside, and the next run builds them again."""
    damaged, folders = [], _artifacts(cache)
    with bar(len(folders), "verify", "artifact") as progress:
        for folder in folders:
            with FileLock(folder.with_name(f"{folder.name}.lock")):
                fault = check(folder, folder.name, hashes=True)[1] if folder.exists() else None
                if fault:
                    set_aside_damaged(folder)
                    damaged.append((folder, fault))
            progress.update()
    return damaged


def unused(cache: Path, figures: Path) -> list[tuple[Path, str]]:
    """Folders of the cache, and why they may go: artifacts that no figure's provenance names and no such
    artifact was made from, damaged ones, and what killed attempts and removals left."""
    wanted = set()
    for path in figures.rglob("*.json"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OSError(
                f"{path} is damaged ({error}); restore or remove it: nothing was removed"
            ) from None
        named = record.get("artifacts") if isinstance(record, dict) else None
        wanted |= {name.rpartition("/")[2] for name in named or ()}
    artifacts = {folder.name: folder for folder in _artifacts(cache)}
    todo = list(wanted)
    while todo:  # and what they were made from
        folder = artifacts.get(todo.pop())
        recipe = check(folder, folder.name)[0].get("recipe", {}) if folder else {}
        new = set(recipe.get("inputs", {}).values()) - wanted
        wanted |= new
        todo += new
    found = [(f, "no figure uses it") for key, f in artifacts.items() if key not in wanted]
    found += [(f, "damaged") for f in _left(cache, "corrupt")]
    found += [(f, "removed in part") for f in _left(cache, "removed")]
    for work in _left(cache, "work"):
        days = (time.time() - work.stat().st_mtime) / 86400
        found.append((work, f"an attempt that was not finished, last touched {days:.1f} days ago"))
    return found


def _artifacts(cache: Path) -> list[Path]:
    return sorted(f for f in cache.glob("*/*") if f.is_dir() and "." not in f.name)


def _left(cache: Path, kind: str) -> list[Path]:
    """Folders beside the artifacts, by the last ending of their names, <kind>-..."""
    return sorted(f for f in cache.glob(f"*/*.{kind}-*") if f.suffix.startswith(f".{kind}-"))


def _held(lock: Path) -> bool:
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def _others(cache: Path) -> list[Path]:
    """The leases of other processes than our own, which may have ended."""
    own = lease(cache)
    return sorted(lock for lock in own.parent.glob("*.lock") if lock != own)


def _remove(folder: Path, cache: Path) -> bool:
    """Whether nobody builds it now, and no other process than our own has begun to work in the cache, so
    that it could be removed."""
    key, out_of_sight = folder.name.partition(".")[0], f"{folder}.removed-{uuid.uuid4().hex}"
    if any(map(_held, _others(cache))):
        return False
    try:
        with FileLock(folder.with_name(f"{key}.lock"), timeout=0):
            os.replace(folder, out_of_sight)
            if any(map(_held, _others(cache))):  # who began in between may have found it
                os.replace(out_of_sight, folder)
                return False
            shutil.rmtree(out_of_sight)
    except Timeout:
        return False
    return True
