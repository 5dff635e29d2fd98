"""Where stages are built: workers of our own on this machine, or somebody's Dask cluster."""

import functools
import logging
import os
import sys
from multiprocessing import spawn

from .parallel import n_cores
from .precision import fast_bf16
from .progress import Context, resolve_device

__all__ = [
    "connect", "default_jobs", "facts", "here", "is_here", "neighbours", "open_local", "share_workers",
]  # fmt: skip

_SCHEDULER = "DIFFLT_SCHEDULER"  # its address; ./run_all.sh --scheduler sets it
# Of workers of our own: Dask looks a hundred times a second at what each of them does, and fifty times
# whether its event loop is late, for tasks of milliseconds; ours take seconds to hours.
_QUIET = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.system-monitor.interval": "5s",
}


def default_jobs(device: str) -> int:
    """DIFFLT_JOBS (set by ./run_all.sh --jobs) or the number of GPUs or of usable CPU cores."""
    if os.environ.get("DIFFLT_JOBS"):
        return int(os.environ["DIFFLT_JOBS"])
    if device != "cpu":
        import torch

        return max(1, torch.cuda.device_count())  # a cluster's may be elsewhere
    return n_cores()


def connect(context: Context, jobs: int | None = None, timeout_s: float = 30):
    """A client of DIFFLT_SCHEDULER, or of workers of our own; None where one stage at a time is all
    that is wanted, which this process builds itself.

    Raises:
        ConnectionError: nobody answers at DIFFLT_SCHEDULER.
    """
    address = os.environ.get(_SCHEDULER)
    if address:
        client = _client(address, timeout_s)
        if (
            getattr(client, "status", "") == "closed"
        ):  # its scheduler went away; there may be another now
            _client.cache_clear()
            client = _client(address, timeout_s)
        return client
    jobs = jobs or default_jobs(context.device)
    return _client(open_local(jobs, context.device)) if jobs > 1 else None


@functools.cache
def _client(address: str, timeout_s: float = 30):
    from distributed import Client

    try:
        return Client(address, timeout=timeout_s, set_as_default=False)
    except OSError as error:
        raise ConnectionError(
            f"{_SCHEDULER}: nobody answers at {address} ({error}); start a scheduler there (docs/scaling.md), "
            "or leave --scheduler out to use this machine"
        ) from None


@functools.cache
def _cluster(jobs: int, device: str):
    import dask
    from distributed import Nanny, Scheduler, SpecCluster

    gpus = _gpus(device)
    workers = {}
    for i in range(jobs):
        options = {"host": "127.0.0.1", "nthreads": 1, "memory_limit": 0}
        # not its errors either: a stage's is raised here, and when a run ends on a busy machine a worker
        # may find the scheduler gone before it
        options["silence_logs"] = logging.CRITICAL
        options["preload"] = ["difflt_core.engine.stage_process"]
        if gpus:  # dealt out in turn, so that more workers than GPUs share them
            options |= {
                "env": {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]},
                "resources": {"GPU": 1},
            }
        workers[i] = {"cls": Nanny, "options": options}
    scheduler = {"host": "127.0.0.1", "port": 0, "dashboard_address": "127.0.0.1:0"}
    scheduler["allowed_failures"] = 10  # workers that die at one stage
    of_scheduler = {"cls": Scheduler, "options": scheduler}
    _leave_scripts_alone()
    with dask.config.set(_QUIET):  # a nanny keeps it for the workers that it starts
        cluster = SpecCluster(workers, of_scheduler, silence_logs="error")
    print(f"{jobs} workers; dashboard: {cluster.dashboard_link}", file=sys.stderr, flush=True)
    return cluster


@functools.cache
def _leave_scripts_alone() -> None:
    """Let Dask's workers not run the caller's script, as a spawned process does before anything else: one
    without a main guard would open workers in each of them. No stage is a function of a script."""
    given = spawn.get_preparation_data

    def facts_for_child(name: str) -> dict:
        found = given(name)
        if name.startswith("Dask Worker"):
            found = {k: v for k, v in found.items() if not k.startswith("init_main")}
        return found

    spawn.get_preparation_data = facts_for_child


def open_local(jobs: int, device: str) -> str:
    """The address of a scheduler in this process with so many workers on this machine, which end
    with it."""
    return _cluster(jobs, device).scheduler_address


def neighbours(client, device: str) -> tuple[dict[str, int], dict[str, int] | None]:
    """Stages that may run at once on each host of a cluster, and what each takes of a worker's resources: as
    many as it has threads; where GPUs are asked for and any worker offers some, as many as are offered.
    Threads at a stage that was cancelled, which goes on to its end, are not counted."""
    workers = client.scheduler_info(n_workers=-1)["workers"]
    count = device != "cpu" and any("GPU" in worker["resources"] for worker in workers.values())
    slots: dict[str, int] = {}
    for address, worker in workers.items():
        host, n = address.rpartition(":")[0], worker["nthreads"]
        if count:
            n = min(n, int(worker["resources"].get("GPU", 0)))
        if worker.get("status", "running") != "running":  # it is about to end, or paused
            n = 0
        n -= worker.get("metrics", {}).get("task_counts", {}).get("cancelled", 0)
        slots[host] = slots.get(host, 0) + max(0, n)
    return slots, {"GPU": 1} if count else None


def here() -> str:
    """The host of the worker that this thread belongs to, as neighbours names it."""
    from distributed import get_worker

    return get_worker().address.rpartition(":")[0]


def share_workers(device: str) -> None:
    """Open workers, where one stage at a time is not all that is wanted and no cluster is named, for
    this process and those that it starts. device: "auto", "cpu" or "cuda"."""
    device = resolve_device(device)
    jobs = default_jobs(device)
    if jobs > 1 and not os.environ.get(_SCHEDULER):
        os.environ[_SCHEDULER] = open_local(jobs, device)


def is_here() -> bool:
    """Whether stages are built on this machine: no cluster is named."""
    address = os.environ.get(_SCHEDULER, "")
    return not address or "//127.0.0.1:" in address


def facts(device: str) -> tuple[str, str]:
    """What "auto" is, as a device and as a precision: on the workers of DIFFLT_SCHEDULER, which a
    machine without a GPU may use, else here. device: "auto", "cpu" or "cuda"."""
    if is_here():
        return _facts(device)
    client = _client(os.environ[_SCHEDULER])
    try:
        client.wait_for_workers(1, timeout=10)
    except TimeoutError:  # they may stand in a queue for hours
        where = os.environ[_SCHEDULER]
        print(f"waiting for a worker at {where} (dask worker {where})", file=sys.stderr, flush=True)
        client.wait_for_workers(1)
    workers = client.scheduler_info(n_workers=-1)["workers"]
    asked = max(workers, key=lambda worker: "GPU" in workers[worker]["resources"])
    return client.run(_facts, device, workers=[asked])[asked]  # also where all of them are busy


def _facts(device: str) -> tuple[str, str]:
    found = resolve_device(device)
    return found, "bf16" if fast_bf16(found) else "fp32"


def _gpus(device: str) -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if device == "cpu":
        return []
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
