"""The long fault suite: `python -m tests.faults --out FOLDER`, half an hour on two cores.

Each fault is done to a smoke run of notebooks 05 and 06, which have every stage, and then the same
command is left to finish: every file of an undisturbed run must come out with the same bytes. Outcomes
are written to figures/faults/.
"""

import argparse
import collections
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd

from difflt_core.provenance import ROOT, environment
from difflt_core.store import atomic_write

ARGUMENTS = ["--profile", "smoke", "--only", "05,06", "--set", "seeds=[0]", "--device", "cpu"]
COLUMNS = ["fault", "where", "tried", "lost"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--setup-kills", type=int, default=3, help="of the environment's set-up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, required=True, help="a folder for the runs, emptied first"
    )
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    draw, undisturbed = random.Random(options.seed), options.out / "undisturbed"
    if finish(undisturbed):
        print("the undisturbed run failed", file=sys.stderr)
        return 1
    wanted, rows = digests(undisturbed), []
    steps = {
        "kills": lambda: kills(options.out, options.kills, draw, wanted),
        "set-up": lambda: setup_kills(options.out / "fresh clone", options.setup_kills, draw),
        "storage": lambda: storage(undisturbed, wanted),
        "full disk": lambda: full_disk(options.out, wanted),
        "at once": lambda: at_once(options.out, wanted),
    }
    for name, step in steps.items():
        rows += step()
        print(name, *rows, sep="\n", file=sys.stderr, flush=True)
    table = pd.DataFrame(rows, columns=COLUMNS)
    text = f"**faults.** {environment('cpu')['hardware']}, seed {options.seed}\n\n"
    text += f"{table.to_markdown(index=False)}\n"
    folder = ROOT / "figures" / "faults"
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "faults.md", text)
    record = {"rows": rows, "seed": options.seed, "environment": environment("cpu")}
    atomic_write(folder / "faults.json", json.dumps(record, indent=1) + "\n")
    print(text)
    return int(table["lost"].sum() > 0)


def start(out: Path, *more: str, said=subprocess.DEVNULL) -> subprocess.Popen:
    command = [sys.executable, "-m", "difflt_core.runner", *ARGUMENTS, *more, "--out", str(out)]
    hidden = {"stdout": subprocess.DEVNULL, "stderr": said}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **hidden)


def finish(out: Path) -> int:
    """Run to the end; the exit status."""
    return start(out).wait()


def digests(out: Path) -> dict[str, str]:
    """Hashes of all tables, figures and artifacts; without the records of time and place."""
    found = {}
    for path in sorted((out / "figures").rglob("*")):
        if path.suffix not in ("", ".json"):
            found[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted((out / "runs" / "cache").glob("*/*/manifest.json")):
        if "corrupt" not in path.parent.name:
            found[str(path.parent.relative_to(out))] = json.loads(path.read_text())["files"]
    return found


def kills(folder: Path, n: int, draw: random.Random, wanted: dict) -> list[list]:
    """Rows: signal, stages that were under way, kills, and runs that did not end as they should."""
    tried, lost = collections.Counter(), collections.Counter()
    done = turn = 0
    while done < n:
        out, hit = folder / f"killed-{turn}", []
        turn += 1
        while done < n:
            process = start(out)
            try:
                process.wait(timeout=draw.uniform(1, 20))
                break  # it came to its end first: the next run starts from nothing
            except subprocess.TimeoutExpired:
                kind = draw.choice([signal.SIGKILL, signal.SIGTERM])
                os.kill(process.pid, kind)
                process.wait()
                hit.append((kind.name, under_way(out)))
                done += 1
        tried.update(hit)
        if finish(out) or digests(out) != wanted:
            lost.update(hit)
        else:
            shutil.rmtree(out)
    return [[kind, where, tried[kind, where], lost[kind, where]] for kind, where in sorted(tried)]


def under_way(out: Path) -> str:
    """The stages whose work folders are there, or what else a run does."""
    stages = {p.parent.name for p in (out / "runs" / "cache").glob("*/*.work")}
    return ", ".join(sorted(stages)) or "start, notebook or table"


def setup_kills(clone: Path, n: int, draw: random.Random) -> list[list]:
    """./run_all.sh in a fresh clone, killed while it makes the environment; at last it must hold what
    the lock names. The packages come from the index or from pip's cache."""
    if not n:
        return []
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    path = os.pathsep.join(
        p for p in environment["PATH"].split(os.pathsep) if Path(p) != Path(sys.executable).parent
    )
    hidden = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    settings = {"cwd": clone, "env": environment | {"PATH": path}, **hidden}
    tried = 0
    for _ in range(n):
        process = subprocess.Popen(["./run_all.sh", "--list"], start_new_session=True, **settings)
        try:
            process.wait(timeout=draw.uniform(1, 60))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            tried += 1
    whole = subprocess.run(["./run_all.sh", "--list"], **settings).returncode == 0
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    named = set(re.findall(r"^([\w.-]+)==", lock, re.MULTILINE))
    listed = subprocess.run(
        [clone / ".venv" / "bin" / "python", "-m", "pip", "list", "--format=json"],
        capture_output=True,
    )
    found = {package["name"].lower() for package in json.loads(listed.stdout or "[]")}
    whole &= {name.lower() for name in named} <= found
    shutil.rmtree(clone, ignore_errors=True)
    return [["SIGKILL", "environment set-up", tried, 0 if whole else tried]]


def storage(out: Path, wanted: dict) -> list[list]:
    """Damage each file of each artifact in turn; run again; compare."""
    harms = {
        "truncated": lambda data: data[: len(data) // 2],
        "emptied": lambda data: b"",
        "one bit flipped": lambda data: data[:-1] + bytes([data[-1] ^ 1]) if data else b"x",
    }
    rows = []
    for name, harm in harms.items():
        files = [p for p in (out / "runs" / "cache").glob("*/*/*") if p.is_file()]
        files = [p for p in files if ".work" not in str(p) and "corrupt" not in str(p)]
        for path in files:
            path.write_bytes(harm(path.read_bytes()))
        for done in (out / "runs" / "smoke").glob("*.done.json"):
            done.unlink()  # else the finished notebook does not look at its artifacts
        status = finish(out)
        lost = status != 0 or digests(out) != wanted
        rows.append([name, "every file of every artifact", len(files), len(files) * int(lost)])
    return rows


def full_disk(folder: Path, wanted: dict) -> list[list]:
    """Runs on a small disk of memory that fills up, then on the same one made larger; and read-only.
    Needs the right to mount; without it there are no rows."""
    rows = []
    for megabytes in (1, 3, 6):
        disk = folder / f"disk-{megabytes}"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True).returncode:
            return []
        try:
            # The runner looks at the free space first; the stages themselves are what is tried here.
            process = subprocess.run(
                [sys.executable, "-c", _ON_A_FULL_DISK, str(disk)], cwd=ROOT, capture_output=True
            )
            said = b"no space left" in process.stderr.lower()
            subprocess.run(["mount", "-o", "remount,size=2g", str(disk)], check=True)
            whole = finish(disk) == 0 and digests(disk) == wanted
            rows.append(
                ["no space left", f"a disk of {megabytes} MB", 1, int(not (said and whole))]
            )
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            process = start(disk, "--force", said=subprocess.PIPE)
            refused = b"cannot write to" in process.communicate()[1] and process.returncode == 1
            lost = not (refused and digests(disk) == wanted)
            rows.append(["read-only folder", f"a disk of {megabytes} MB", 1, int(lost)])
        finally:
            subprocess.run(["umount", str(disk)])
    return rows


_ON_A_FULL_DISK = """
import sys
from difflt_core import load_config, run_diffult
run_diffult(load_config("smoke").model_copy(update={"seed": 0}), sys.argv[1], "cpu", progress=False)
"""


def at_once(folder: Path, wanted: dict) -> list[list]:
    """Eight runs of one command in one folder, and two of different settings."""
    together = [start(folder / "eight") for _ in range(8)]
    failed = sum(process.wait() != 0 for process in together)
    built = list((folder / "eight" / "runs" / "cache").glob("*/*/manifest.json"))
    lost = failed or digests(folder / "eight") != wanted or len(built) > len(wanted)
    rows = [["8 runs at once", "one command, one folder", 8, 8 * int(bool(lost))]]
    two = [start(folder / "two"), start(folder / "two", "--set", "tau=1")]
    failed = sum(process.wait() != 0 for process in two)
    lost = failed or finish(folder / "two") or digests_missing(folder / "two", wanted)
    return [*rows, ["2 runs at once", "different settings, one folder", 2, 2 * int(bool(lost))]]


def digests_missing(out: Path, wanted: dict) -> bool:
    """Whether a file of an undisturbed run is not there, or not the same."""
    found = digests(out)
    return any(found.get(name) != digest for name, digest in wanted.items())


if __name__ == "__main__":
    sys.exit(main())
