"""Many variants at once: which stage needs which is derived by running the pipeline against a
planner instead of the store, and what is missing is built side by side.

Each worker builds one stage at a time, on one GPU or one CPU core. A worker whose parent is gone
stops, and its checkpoint stays.
"""

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace

from .artifacts import Artifact, Stage, Store
from .parallel import n_cores, n_processes
from .progress import bar

__all__ = ["Node", "Planner", "default_jobs"]

_COST = {
    "diffusion": 3.0,
    "samples": 1.0,
    "text2image": 10.0,
}  # of a stage in the progress bar; any other: 1


@dataclass(frozen=True)
class Node:
    stage: Stage
    config: dict
    inputs: dict[str, Artifact]

    @property
    def cost(self) -> float:
        return _COST.get(self.stage.name, 1.0)


class Planner:
    """Stands in for a Store: get() notes what would be built and returns an artifact without files."""

    def __init__(self, store: Store):
        self.store, self.context = store, store.context
        self.nodes: dict[str, Node] = {}  # by key, in an order in which they can be built

    def get(
        self, stage: Stage, config: dict, inputs: dict[str, Artifact] | None = None
    ) -> Artifact:
        key = self.store.recipe(stage, config, inputs or {})[1]
        self.nodes.setdefault(key, Node(stage, config, inputs or {}))
        return Artifact(self.store.root / stage.name / key, key, {})

    def run(self, jobs: int | None = None) -> None:
        """Build what is missing. jobs: how many stages side by side; None is default_jobs()."""
        missing = {k: n for k, n in self.nodes.items() if not self.store.find(n.stage.name, k)}
        jobs = jobs or default_jobs(self.context.device)
        if n_processes() > 1:
            for node in missing.values():
                self.store.get(node.stage, node.config, node.inputs)
            return
        # The share of a worker's cores, however few stages are missing: a run that was killed goes on
        # with as many threads as before.
        threads = self.context.threads or max(1, n_cores() // jobs)
        context = replace(self.context, threads=threads)
        if min(jobs, len(missing)) > 1:
            self._run_side_by_side(missing, min(jobs, len(missing)), context)
        else:
            for node in missing.values():
                Store(self.store.root, context).get(node.stage, node.config, node.inputs)

    def _run_side_by_side(self, missing: dict[str, Node], jobs: int, context) -> None:
        spawn = multiprocessing.get_context("spawn")
        reports, slots = spawn.Queue(), spawn.Queue()
        for slot in range(jobs):
            slots.put(slot)
        start = (reports, slots, _gpus(self.context.device))
        waiting, running, total = dict(missing), {}, sum(n.cost for n in missing.values())
        to_end = _cost_to_end(missing)
        longest_first = sorted(missing, key=to_end.__getitem__, reverse=True)
        pool = ProcessPoolExecutor(jobs, spawn, initializer=_start_worker, initargs=start)
        what = f"{len(missing)} stages, {jobs} at a time"
        try:
            with bar(total, what, "%", context=self.context) as progress:
                while waiting or running:
                    for key in [k for k in longest_first if k in waiting]:
                        if len(running) == jobs:
                            break
                        unbuilt = waiting.keys() | set(running.values())
                        if not any(a.key in unbuilt for a in waiting[key].inputs.values()):
                            task = (self.store.root, context, waiting.pop(key))
                            running[pool.submit(_build, *task)] = key
                    done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                    for future in done:
                        running.pop(future)
                        future.result()
                    while not reports.empty():
                        progress.update(reports.get())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list((pool._processes or {}).values()) if running else ():
                process.terminate()


def _cost_to_end(nodes: dict[str, Node]) -> dict[str, float]:
    """Cost of each node and of the longest chain of nodes that wait for it, so that the long chains
    start first and no worker is idle at the end. nodes: by key, in an order in which they can be
    built."""
    after = dict.fromkeys(nodes, 0.0)
    for key, node in reversed(nodes.items()):
        for needed in node.inputs.values():
            if needed.key in after:
                after[needed.key] = max(after[needed.key], after[key] + node.cost)
    return {key: node.cost + after[key] for key, node in nodes.items()}


def default_jobs(device: str) -> int:
    """DIFFLT_JOBS (set by ./run_all.sh --jobs) or the number of GPUs or of usable CPU cores."""
    if os.environ.get("DIFFLT_JOBS"):
        return int(os.environ["DIFFLT_JOBS"])
    if device != "cpu":
        import torch

        return torch.cuda.device_count()
    return n_cores()


_reports = None


def _gpus(device: str) -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if device == "cpu":
        return []
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]


def _start_worker(reports, slots, gpus: list[str]) -> None:
    """gpus: dealt out in turn, so that more workers than GPUs share them."""
    global _reports
    _reports = reports
    slot = slots.get()
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    threading.Thread(target=_stop_with_parent, args=(os.getppid(),), daemon=True).start()


def _stop_with_parent(parent: int) -> None:
    """End when the parent has: a training writes its checkpoint first."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
    os._exit(1)


def _build(root, context, node: Node) -> None:
    """Runs in a worker: build one stage and send how far it is, in units of the parent's bar."""
    sent = 0.0

    def report(share: float) -> None:
        nonlocal sent
        _reports.put(share * node.cost)
        sent += share

    Store(root, replace(context, report=report)).get(node.stage, node.config, node.inputs)
    report(1.0 - sent)
