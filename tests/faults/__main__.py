"""The long fault suite: `python tests/faults --out FOLDER`, half an hour on two cores.

Each fault is done to a run, the same command is left to finish, and every file must come out with the
bytes of an undisturbed run: a smoke run of notebooks 05 and 06, or their five stages alone. Outcomes
are written to figures/faults/.
"""

import argparse
import collections
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pandas as pd

from difflt_core.engine.files import atomic_write
from difflt_core.engine.provenance import ROOT, environment
from difflt_core.engine.upkeep import verify

ARGUMENTS = ["--profile", "smoke", "--only", "05,06", "--set", "seeds=[0]", "--device", "cpu"]
STAGES = """
import sys
from difflt_core import load_config, run_diffult
run_diffult(load_config("smoke"), sys.argv[1], "cpu", progress=False)
"""
HIDDEN = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--setup-kills", type=int, default=3, help="of the environment's set-up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, required=True, help="a folder for the runs, emptied first"
    )
    options = parser.parse_args()
    folder, draw = options.out.resolve(), random.Random(options.seed)
    shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    for name in ("undisturbed", "again"):
        process = start(folder / name, said=subprocess.PIPE)
        said = process.communicate()[1]
        if process.returncode:
            print(f"the undisturbed run failed:\n{said.decode()}", file=sys.stderr)
            return 1
    usual_s, wanted = (time.monotonic() - started) / 2, digests(folder / "undisturbed")
    stages(folder / "stages").wait()
    built = digests(folder / "stages")
    steps = {
        "undisturbed": lambda: [row("none", "two runs", 1, digests(folder / "again") != wanted)],
        "kills": lambda: kills(folder, options.kills, draw, usual_s, wanted),
        "set-up": lambda: setup_kills(folder / "fresh clone", options.setup_kills, draw),
        "storage": lambda: storage(folder / "stages", built),
        "full disk": lambda: full_disk(folder, built),
        "at once": lambda: at_once(folder, wanted, built),
    }
    rows = []
    for name, step in steps.items():
        try:
            rows += step()
        except Exception:
            traceback.print_exc()
            rows.append(row("the suite itself failed", name, 1, True))
        print(name, *rows, sep="\n", file=sys.stderr, flush=True)
    table = pd.DataFrame(rows, columns=["fault", "where", "tried", "lost"])
    facts = environment("cpu")
    text = f"**faults.** {facts['hardware']}, commit {facts['commit']}, seed {options.seed}\n\n"
    text += f"{table.to_markdown(index=False)}\n"
    results = ROOT / "figures" / "faults"
    results.mkdir(parents=True, exist_ok=True)
    atomic_write(results / "faults.md", text)
    record = {"rows": rows, "seed": options.seed, "environment": facts}
    atomic_write(results / "faults.json", json.dumps(record, indent=1) + "\n")
    print(text)
    return int(table["lost"].sum() > 0)


def row(fault: str, where: str, tried: int, lost: bool) -> list:
    return [fault, where, tried, tried if lost else 0]


def start(out: Path, *more: str, said=subprocess.DEVNULL) -> subprocess.Popen:
    """The smoke run."""
    command = [
        sys.executable,
        "-m",
        "difflt_core.reporting.runner",
        *ARGUMENTS,
        *more,
        "--out",
        str(out),
    ]
    settings = HIDDEN | {"stderr": said}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **settings)


def stages(out: Path, said=subprocess.DEVNULL) -> subprocess.Popen:
    """The five stages, without a notebook."""
    command = [sys.executable, "-W", "ignore", "-c", STAGES, str(out)]
    return subprocess.Popen(command, cwd=ROOT, **HIDDEN | {"stderr": said})


def digests(out: Path) -> dict[str, str]:
    """Hashes of all tables, figures and artifacts; without the records of time and place."""
    found = {}
    for path in sorted((out / "figures").rglob("*")):
        if path.suffix not in ("", ".json") and path.name[0] != ".":
            found[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted((out / "runs" / "cache").glob("*/*/manifest.json")):
        if "corrupt" not in path.parent.name:
            found[str(path.parent.relative_to(out))] = json.loads(path.read_text())["files"]
    return found


def kills(folder: Path, n: int, draw: random.Random, usual_s: float, wanted: dict) -> list[list]:
    """Rows: signal, stages that were under way, kills, and runs that did not end as they should."""
    tried, lost = collections.Counter(), collections.Counter()
    done = turn = 0
    while done < n:
        out, hit = folder / f"killed-{turn}", []
        turn += 1
        while done < n:
            began = time.time()
            process = start(out)
            try:
                process.wait(timeout=draw.uniform(1, min(20, usual_s / 2)))
                break  # it came to its end first: the next run starts from nothing
            except subprocess.TimeoutExpired:
                kind = draw.choice([signal.SIGKILL, signal.SIGTERM])
                os.kill(process.pid, kind)
                process.wait()
                hit.append((kind.name, under_way(out, began)))
                done += 1
        tried.update(hit)
        if start(out).wait() or digests(out) != wanted:
            lost.update(hit)
        else:
            shutil.rmtree(out)
    return [[kind, where, tried[kind, where], lost[kind, where]] for kind, where in sorted(tried)]


def under_way(out: Path, began: float) -> str:
    """The stages whose work folders this run has touched, or what else a run does."""
    work = (out / "runs" / "cache").glob("*/*.work-*")
    names = {p.parent.name for p in work if p.stat().st_mtime >= began}
    return ", ".join(sorted(names)) or "start, notebook or table"


def setup_kills(clone: Path, n: int, draw: random.Random) -> list[list]:
    """./run_all.sh in a fresh clone, killed while it makes the environment; at last pip must find
    every package of the lock in it. They come from the index or from pip's cache."""
    if not n:
        return []
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    hidden = ("VIRTUAL_ENV", "PYTHONPATH", "CONDA_PREFIX")
    variables = {k: v for k, v in os.environ.items() if k not in hidden}
    here = Path(sys.executable).parent
    path = [p for p in variables["PATH"].split(os.pathsep) if Path(p) != here]
    settings = {"cwd": clone, "env": variables | {"PATH": os.pathsep.join(path)}, **HIDDEN}
    command, tried = ["./run_all.sh", "--list"], 0
    for _ in range(n):
        process = subprocess.Popen(command, start_new_session=True, **settings)
        try:
            process.wait(timeout=draw.uniform(1, 60))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            tried += 1
    whole = subprocess.run(command, **settings).returncode == 0
    if whole:
        check = ["--dry-run", "--no-index", "--no-deps", "--require-hashes", "-r"]
        pip = [clone / ".venv" / "bin" / "python", "-m", "pip", "install", *check]
        whole = subprocess.run([*pip, "requirements.lock"], **settings).returncode == 0
    shutil.rmtree(clone, ignore_errors=True)
    return [row("SIGKILL", "environment set-up", max(1, tried), not whole)]


def storage(out: Path, built: dict) -> list[list]:
    """Damage files of all artifacts; run again; compare."""
    harms = {
        "truncated": lambda data: data[: len(data) // 2],
        "emptied": lambda data: b"",
        "one bit flipped": lambda data: data[:-1] + bytes([data[-1] ^ 1]) if data else b"x",
    }
    kinds = {"data of an artifact": False, "manifest of an artifact": True}
    rows = []
    for name, harm in harms.items():
        for kind, manifests in kinds.items():
            files = [out / key / file for key in built for file in built[key]]
            if manifests:
                files = [out / key / "manifest.json" for key in built]
            for path in files:
                path.write_bytes(harm(path.read_bytes()))
            if name == "one bit flipped":  # of the same size: --verify reads the bytes
                verify(out / "runs" / "cache")
            lost = stages(out).wait() != 0 or digests(out) != built
            rows.append(row(name, kind, len(files), lost))
    return rows


def full_disk(folder: Path, built: dict) -> list[list]:
    """Disks of memory that fill up, and are then made larger; at last one that is read-only. Needs the
    right to mount; without it there are no rows."""
    tried = lost = 0
    for megabytes in (1, 4, 12, 16, 20, 24, 28):
        disk = folder / f"disk-{megabytes}"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True).returncode:
            return []
        try:
            process = stages(disk, said=subprocess.PIPE)
            said = process.communicate()[1]
            if process.returncode:  # else it was enough
                tried += 1
                remount(disk, "size=2g")
                whole = stages(disk).wait() == 0 and digests(disk) == built
                lost += not (b"no space left in" in said and whole)
        finally:
            if megabytes < 28:
                subprocess.run(["umount", "-l", str(disk)])
    rows = [["no space left", "disks of 1 to 28 MB", tried, lost]]
    try:
        remount(disk, "ro")
        process = start(disk, said=subprocess.PIPE)
        said = process.communicate()[1]
        refused = b"cannot write to" in said and process.returncode == 1
        return [*rows, row("read-only folder", "start", 1, not refused)]
    finally:
        subprocess.run(["umount", "-l", str(disk)])


def remount(disk: Path, how: str) -> None:
    """Again while a process that is just ending still holds a file."""
    for _ in range(20):
        command = ["mount", "-o", f"remount,{how}", str(disk)]
        if not subprocess.run(command, capture_output=True).returncode:
            return
        time.sleep(0.5)
    raise OSError(f"cannot remount {disk}")


def at_once(folder: Path, wanted: dict, built: dict) -> list[list]:
    """Eight processes that want the same artifacts, and two runs of different settings."""
    together = [stages(folder / "eight") for _ in range(8)]
    failed = sum(process.wait() != 0 for process in together)
    artifacts = list((folder / "eight" / "runs" / "cache").glob("*/*/manifest.json"))
    lost = failed or digests(folder / "eight") != built or len(artifacts) != len(built)
    rows = [row("8 processes", "the same artifacts", 8, bool(lost))]
    two = [start(folder / "two"), start(folder / "two", "--set", "tau=1")]
    failed = sum(process.wait() != 0 for process in two)
    failed += start(folder / "two").wait()
    found = digests(folder / "two")
    lost = failed or any(found.get(name) != digest for name, digest in wanted.items())
    return [*rows, row("2 runs", "one folder, different settings", 2, bool(lost))]


if __name__ == "__main__":
    sys.exit(main())
