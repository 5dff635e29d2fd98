"""Many variants at once: which stage needs which is derived by running the pipeline against a
planner instead of the store, and Dask builds what is missing, side by side.

Each stage runs in a process of its own, below a worker, and ends with it: a training writes its
checkpoint first. A worker that dies is replaced, and its stage goes on elsewhere.
"""

import os
import time
import uuid
from dataclasses import replace
from typing import Any

from .artifacts import Artifact, Node, Stage, Store
from .cluster import connect, default_jobs, here, neighbours
from .code_version import code_version
from .parallel import from_main, n_cores, n_processes
from .progress import bar, read_share
from .stage_process import in_own_process
from .time_left import TimeLeft, cost_to_end

__all__ = ["Planner"]

_LOST = "the Dask scheduler went away; run again: what was finished is kept"


class Planner:
    """Stands in for a Store: get() notes what would be built and returns an artifact without files."""

    def __init__(self, store: Store):
        self.store, self.context = store, store.context
        self.nodes: dict[str, Node] = {}  # by key, in an order in which they can be built

    def get(
        self, stage: Stage, config: dict, inputs: dict[str, Artifact] | None = None
    ) -> Artifact:
        node = self.store.plan(stage, config, inputs or {})
        self.nodes.setdefault(node.key, node)
        return Artifact(self.store.root / stage.name / node.key, node.key, {})

    def run(self, jobs: int | None = None) -> None:
        """Build what is missing. jobs: how many stages side by side; None is default_jobs()."""
        nodes = self.nodes.items()
        missing = {k: n for k, n in nodes if not self.store.find(n.stage.name, k)}
        missing = {k: self.nodes[k] for k in from_main(list(missing))}
        if not missing:
            return
        client = connect(self.context, jobs) if n_processes() == 1 else None
        if client is not None:
            self._run_on(client, missing)
            return
        store = self.store
        if n_processes() == 1:  # as many threads as a worker has
            threads = self.context.threads or n_cores() // (
                jobs or default_jobs(self.context.device)
            )
            store = Store(store.root, replace(self.context, threads=max(1, threads)))
        for node in missing.values():
            store.build(node)

    def _run_on(self, client, missing: dict[str, Node]) -> None:
        """Hand the stages out to workers, each after those that it needs, and wait for them."""
        store = Store(self.store.root, replace(self.context, progress=False))
        stages = _Handout(client, missing, store)
        try:
            self._watch(stages, missing)
        finally:  # also where a cell is interrupted
            under_way = [f for f in stages.futures.values() if not f.done()]
            if under_way:
                client.cancel(under_way)
        for future in stages.futures.values():
            if future.status == "error":
                future.result()
        if stages.failed:
            raise ConnectionError(_LOST)

    def _watch(self, stages: "_Handout", missing: dict[str, Node]) -> None:
        """Keep the workers busy and show how far the stages are, until all are done or one failed."""
        files = {k: self.store.progress_file(n.stage.name, k) for k, n in missing.items()}
        for file in files.values():  # a killed run may have got farther than its checkpoint
            file.unlink(missing_ok=True)
        time_left, looked = TimeLeft(missing), time.monotonic()
        with bar(1.0, f"{len(missing)} stages", "%", context=self.context) as progress:
            while stages.left and not stages.failed:
                stages.go_on()
                time.sleep(0.05)
                if (passed := time.monotonic() - looked) > 1:
                    looked += passed
                    running = {key: read_share(files[key]) for key in stages.futures}
                    time_left.look(running, stages.built, passed)
                    progress.n = time_left.share
                    progress.refresh()


class _Handout:
    """The missing stages on their way to Dask's workers: as many as there are places, and of those whose
    inputs are there the one from which the longest chain starts.

    Given all at once, Dask queues a stage where its inputs are, behind whatever runs there, and does not
    move it when another worker falls idle: it is made for tasks of seconds.

    Args:
        missing: by key, in an order in which they can be built. store: that the workers build in.
    """

    def __init__(self, client, missing: dict[str, Node], store: Store):
        self.client, self.store, self.run = client, store, uuid.uuid4().hex
        to_end = cost_to_end(missing)
        self.waiting = {k: missing[k] for k in sorted(missing, key=lambda k: -to_end[k])}
        self.futures: dict[str, Any] = {}  # by key, of what is under way or failed
        self.built: set[str] = set()
        self._slots: dict[str, int] = {}  # most places seen, by host
        self._resources: dict[str, int] | None = None
        self._look_at, self._shared = 0.0, False

    @property
    def left(self) -> bool:
        return bool(self.waiting or self.futures)

    @property
    def failed(self) -> bool:
        return any(future.status in ("error", "cancelled") for future in self.futures.values())

    def go_on(self) -> None:
        """Hand out a stage for every free place; looks for them where a stage ended, and once in a second."""
        done = {key for key, future in self.futures.items() if future.status == "finished"}
        for key in done:  # Dask would build again what it has to remember and a worker took with it
            del self.futures[key]
        self.built |= done
        ended = bool(done) and not self._shared  # else another run would never come first
        if not ended and time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + 1
        ready = [key for key, node in self.waiting.items() if self._can_begin(node)]
        for key in ready[: self._n_free() if ready else 0]:
            node = self.waiting.pop(key)
            options = {"resources": self._resources, "pure": False}
            # a scheduler answers a name that it knows from memory: another run's folder is not ours
            options["key"] = f"{node.stage.name}-{key}-{self.run}"
            self.futures[key] = self.client.submit(_build, node, self.store, self._slots, **options)

    def _can_begin(self, node: Node) -> bool:
        return not {a.key for a in node.inputs.values()} & (
            self.waiting.keys() | self.futures.keys()
        )

    def _n_free(self) -> int:
        """Places where nothing of anybody's is under way; where there is none yet, one may wait for it."""
        try:
            slots, resources = neighbours(self.client, self.store.context.device)
            known = {key for keys in self.client.processing().values() for key in keys}
        except (
            OSError,
            KeyError,
            AttributeError,
        ) as error:  # a client that was closed has no scheduler
            raise ConnectionError(_LOST) from error
        if self._resources and not resources:
            return 0  # the workers with GPUs are away
        self._resources = resources
        self._slots |= {host: max(n, self._slots.get(host, 1)) for host, n in slots.items()}
        ours = {future.key for future in self.futures.values()}
        self._shared = bool(known - ours)
        return max(0, max(sum(slots.values()), 1) - len(known | ours))


def _build(node: Node, store: Store, slots: dict[str, int]) -> None:
    """In a thread of a worker: build one stage in a process of its own, with its share of the cores.

    Args:
        slots: how many stages may run at once on each host.
    """
    if not store.find(node.stage.name, node.key):
        threads = store.context.threads or max(1, n_cores() // slots.get(here(), 1))
        store = Store(store.root, replace(store.context, threads=threads))
        what = f"{node.stage.name} {node.key[:8]}"
        in_own_process(what, store.context.device, _build_here, node, store)


def _build_here(node: Node, store: Store) -> None:
    """In that process, whose code is what the stage runs."""
    # of torch.compile: by default as many as the machine has cores, for each stage
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(store.context.threads))
    if code_version(node.stage.build, node.stage.chosen) != node.recipe["code"]:
        raise RuntimeError(
            f"{node.stage.name}: the worker on {os.uname().nodename} has other code than the run that sent "
            "it; give it the same checkout, and start it and a notebook's kernel again after an edit"
        )
    store.build(node)
