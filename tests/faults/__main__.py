"""The long fault suite: `python -m tests.faults --kills 50 --out FOLDER`, an hour on two cores.

A smoke run of notebook 05 is ended by SIGKILL or SIGTERM at random moments until the given number of
kills is reached, and then left to finish; every file of an undisturbed run must come out with the same
bytes. Then every file of every artifact is truncated, emptied and flipped in turn. Outcomes are
written to figures/faults/.
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
from pathlib import Path

import pandas as pd

from difflt_core.provenance import ROOT, environment
from difflt_core.store import atomic_write

ARGUMENTS = ["--profile", "smoke", "--only", "05", "--set", "seeds=[0]", "--device", "cpu"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, required=True, help="a folder for the runs, emptied first"
    )
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    started = time.monotonic()
    if finish(options.out / "undisturbed"):
        print("the undisturbed run failed", file=sys.stderr)
        return 1
    usual_s, wanted = time.monotonic() - started, digests(options.out / "undisturbed")
    rows = kills(options.out, options.kills, options.seed, usual_s, wanted)
    rows += storage(options.out / "undisturbed", wanted)
    table = pd.DataFrame(rows, columns=["fault", "where", "tried", "lost"])
    text = f"**faults.** {environment('cpu')['hardware']}, seed {options.seed}\n\n"
    text += f"{table.to_markdown(index=False)}\n"
    folder = ROOT / "figures" / "faults"
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "faults.md", text)
    record = {"rows": rows, "seed": options.seed, "environment": environment("cpu")}
    atomic_write(folder / "faults.json", json.dumps(record, indent=1) + "\n")
    print(text)
    return int(table["lost"].sum() > 0)


def start(out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "difflt_core.runner", *ARGUMENTS, "--out", str(out)]
    hidden = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
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


def kills(folder: Path, n: int, seed: int, usual_s: float, wanted: dict) -> list[list]:
    """Rows: signal, stages that were under way, kills, and runs that did not end as they should."""
    draw, tried, lost = random.Random(seed), collections.Counter(), collections.Counter()
    done = turn = 0
    while done < n:
        out, hit = folder / f"killed-{turn}", []
        turn += 1
        while done < n:
            process = start(out)
            try:
                process.wait(timeout=draw.uniform(1, max(5.0, 0.5 * usual_s)))
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


if __name__ == "__main__":
    sys.exit(main())
