"""The grid under fire: `python tests/cluster --out FOLDER`, half an hour on two cores.

A smoke run of notebooks 05 and 07 on a real Slurm (where it is installed; set up on the loopback where
none answers, which takes root), with one of two jobs cancelled in mid-training; smoke runs of notebook 05,
45 stages on four workers, of which three are killed at random moments; two runs in one folder, on two
schedulers. All must give the bytes of an undisturbed run. Outcomes go to figures/faults/cluster.md.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from difflt_core.engine.files import atomic_write
from difflt_core.engine.provenance import ROOT, environment

SLURM_CONF = """ClusterName=one
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/var/log/slurm/ctld.log
SlurmdLogFile=/var/log/slurm/d.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MailProg=/bin/true
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=20000 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
COLUMNS = ["what", "stages", "tried", "ended", "bytes as undisturbed", "built twice", "seconds"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/cluster", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="a folder for the runs, emptied first"
    )
    parser.add_argument("--kills", type=int, default=10, help="runs on four workers, three killed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder, draw, rows = options.out.resolve(), random.Random(options.seed), []
    shutil.rmtree(folder, ignore_errors=True)
    wanted = folder / "undisturbed"
    if start(wanted, "05,07").wait():
        print("the undisturbed run failed", file=sys.stderr)
        return 1
    rows.append(on_slurm(folder / "slurm", digests(wanted)))
    alone = folder / "undisturbed-05"
    start(alone, "05").wait()
    rows.append(killed_workers(folder, options.kills, draw, digests(alone)))
    rows.append(two_schedulers(folder / "two", digests(alone)))
    table = pd.DataFrame([row for row in rows if row], columns=COLUMNS)
    facts = environment("cpu")
    text = f"**cluster.** {facts['hardware']}, commit {facts['commit']}, seed {options.seed}\n\n"
    text += f"{table.to_markdown(index=False)}\n"
    results = ROOT / "figures" / "faults"
    atomic_write(results / "cluster.md", text)
    record = {"rows": table.to_dict("records"), "seed": options.seed, "environment": facts}
    atomic_write(results / "cluster.json", json.dumps(record, indent=1) + "\n")
    print(text)
    right = table["ended"].eq(table["tried"]) & table["bytes as undisturbed"].eq(table["tried"])
    return int(not right.all() or table["built twice"].any())


def start(out: Path, notebooks: str, *more: str, **settings) -> subprocess.Popen:
    command = ["./run_all.sh", "--profile", "smoke", "--only", notebooks, "--device", "cpu"]
    command += ["--out", str(out), *more]
    settings = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | settings
    active = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | active, **settings)


def digests(out: Path) -> dict[str, object]:
    """Hashes of all tables and artifacts, without the records of time and place."""
    found: dict[str, object] = {}
    for path in sorted((out / "figures").rglob("*.csv")):
        found[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted((out / "runs" / "cache").glob("*/*/manifest.json")):
        found[str(path.parent.relative_to(out))] = json.loads(path.read_text())["files"]
    return found


class Watch:
    """Artifacts as they appear: one that comes to a second time was built twice."""

    def __init__(self, out: Path):
        self.out, self.seen, self.twice = out, {}, set()

    def look(self) -> int:
        for path in self.out.glob("runs/cache/*/*/manifest.json"):
            if ".work-" not in str(path):
                with contextlib.suppress(FileNotFoundError):
                    made = path.stat().st_mtime_ns
                    if self.seen.setdefault(path, made) != made:
                        self.twice.add(path)
        return len(self.seen)

    def until(self, process: subprocess.Popen, done=lambda: False, n_seen=float("inf")) -> None:
        while process.poll() is None and not done() and len(self.seen) < n_seen:
            self.look()
            time.sleep(0.2)
        self.look()


def on_slurm(out: Path, wanted: dict) -> list | None:
    """The cluster of docs/scaling.md, word for word."""
    if not shutil.which("slurmctld") and not shutil.which("sinfo"):
        print("Slurm is not installed here: that part is skipped", file=sys.stderr)
        return None
    started_here = set_up_slurm()
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    snippet = re.search(r"```python\n(from dask_jobqueue.*?)```", text, re.S)[1]
    os.environ["DASK_JOBQUEUE__SLURM__INTERFACE"] = "lo"
    os.environ["DASK_JOBQUEUE__SLURM__LOG_DIRECTORY"] = str(out.parent / "slurm-logs")
    names: dict = {}
    exec(compile(snippet, "docs/scaling.md", "exec"), names)
    cluster, began = names["cluster"], time.monotonic()
    try:
        run, watch = start(out, "05,07", "--scheduler", cluster.scheduler_address), Watch(out)
        trained = "runs/cache/diffusion/*.work-*"
        watch.until(run, lambda: any(out.glob(trained)) and len(jobs()) == 2)
        subprocess.run(["scancel", jobs()[0]], check=True)
        watch.until(run)
    finally:
        cluster.close()
        if started_here:
            for name in ("slurmd", "slurmctld"):
                subprocess.run(["pkill", "-x", name])
    same = digests(out) == wanted
    seconds = round(time.monotonic() - began)
    what = "notebooks 05 and 07 on Slurm, two jobs, one cancelled (scancel) in mid-training"
    return [
        what,
        len(watch.seen),
        1,
        int(run.returncode == 0),
        int(same),
        len(watch.twice),
        seconds,
    ]


def jobs() -> list[str]:
    asked = ["squeue", "--noheader", "--states", "RUNNING", "--format", "%i"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.split()


def set_up_slurm() -> bool:
    """A Slurm of one node on the loopback, where none answers; whether it was started here."""
    if subprocess.run(["sinfo"], capture_output=True, timeout=60).returncode == 0:
        return False
    folders = "/etc/slurm /var/spool/slurmd /var/spool/slurmctld /var/log/slurm /run/munge"
    subprocess.run(f"mkdir -p {folders}; chown munge:munge /run/munge", shell=True, check=True)
    host = socket.gethostname().partition(".")[0]
    conf = SLURM_CONF.format(host=host, cpus=len(os.sched_getaffinity(0)))
    Path("/etc/slurm/slurm.conf").write_text(conf)
    subprocess.run(["su", "-s", "/bin/sh", "munge", "-c", "/usr/sbin/munged"])  # may run already
    for name in ("slurmctld", "slurmd"):
        subprocess.run([name], check=True)
    subprocess.run(["srun", "-n1", "hostname"], check=True, timeout=120, stdout=subprocess.DEVNULL)
    return True


def killed_workers(folder: Path, n: int, draw: random.Random, wanted: dict) -> list:
    """Row: n runs on four workers, of which three die by SIGKILL at random moments."""
    ended = same = twice = 0
    began = time.monotonic()
    for i in range(n):
        out = folder / f"killed-{i}"
        run, watch = start(out, "05", "--jobs", "4"), Watch(out)
        for share in sorted(draw.uniform(0.1, 0.9) for _ in range(3)):
            watch.until(run, n_seen=share * 45)
            workers = [p for p in below(run.pid) if is_worker(p)]
            if workers:
                os.kill(draw.choice(workers), signal.SIGKILL)
        watch.until(run)
        ended += run.returncode == 0
        same += digests(out) == wanted
        twice += len(watch.twice)
        print(
            f"killed {i}: {run.returncode}, {len(watch.seen)} stages", file=sys.stderr, flush=True
        )
        shutil.rmtree(out)
    seconds = round((time.monotonic() - began) / n)
    what = "notebook 05 on four workers, three of them killed (SIGKILL) at random moments"
    return [what, len(watch.seen), n, ended, same, twice, seconds]


def two_schedulers(out: Path, wanted: dict) -> list:
    """Row: two runs in one folder at once, one on workers of its own, one on another scheduler's."""
    began = time.monotonic()
    dask = [sys.executable, "-m", "dask"]
    hidden = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    port = address.rpartition(":")[2]
    settings = ["--host", "127.0.0.1", "--port", port, "--dashboard-address", "127.0.0.1:0"]
    scheduler = subprocess.Popen([*dask, "scheduler", *settings], **hidden)
    options = ["--nworkers", "2", "--nthreads", "1"]
    workers = subprocess.Popen([*dask, "worker", f"tcp://{address}", *options], **hidden)
    try:
        watch = Watch(out)
        runs = [start(out, "05"), start(out, "05", "--scheduler", f"tcp://{address}")]
        for run in runs:
            watch.until(run)
    finally:
        for process in (workers, scheduler):
            process.terminate()
            process.wait()
    right = sum(run.returncode == 0 for run in runs)
    same = 2 * (digests(out) == wanted)
    seconds = round(time.monotonic() - began)
    what = "notebook 05 twice at once in one folder, on two schedulers"
    return [what, len(watch.seen), 2, right, same, len(watch.twice), seconds]


def below(pid: int) -> list[int]:
    """All processes that a process has started, and theirs."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [d for p in map(int, found) for d in (p, *below(p))]


def is_worker(pid: int) -> bool:
    """Whether it is a Dask worker: started by its nanny, and with a clean process of ours directly below
    it, to fork stages from."""
    with contextlib.suppress(OSError):
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
            found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
            return any(
                b"forkserver" in Path(f"/proc/{p}/cmdline").read_bytes()
                for p in found.stdout.split()
            )
    return False


if __name__ == "__main__":
    sys.exit(main())
