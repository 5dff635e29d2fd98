"""Many variants at once: which stage needs which is derived by running the pipeline against a
planner instead of the store, and Dask builds what is missing, side by side.

Each stage runs in a process of its own, below a worker, and ends with it: a training writes its
checkpoint first. A worker that dies is replaced, and its stage goes on elsewhere.
"""

import os
import time
import uuid
from dataclasses import replace

from .artifacts import Artifact, Node, Stage, Store
from .cluster import connect, default_jobs, here, neighbours
from .code_version import code_version
from .parallel import from_main, n_cores, n_processes
from .progress import bar, read_share
from .stage_process import in_own_process

__all__ = ["Planner"]

_COST = {
    "diffusion": 3.0,
    "samples": 1.0,
    "text2image": 10.0,
}  # of a stage in the progress bar; any other: 1


def _cost(node: Node) -> float:
    return _COST.get(node.stage.name, 1.0)


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
        """Submit the stages, each after those that it needs, and wait for them."""
        context, futures, run = self.context, {}, uuid.uuid4().hex
        store = Store(self.store.root, replace(context, progress=False))
        slots, with_gpu = neighbours(client)
        gpu = {"GPU": 1} if context.device != "cpu" and with_gpu else None
        for key, priority in _cost_to_end(missing).items():
            node = missing[key]
            after = [futures[a.key] for a in node.inputs.values() if a.key in futures]
            options = {"priority": priority, "resources": gpu, "pure": False}
            # a scheduler answers a name that it knows from memory: another run's folder is not ours
            options["key"] = f"{node.stage.name}-{key}-{run}"
            futures[key] = client.submit(_build, node, store, slots, after, **options)
        try:
            self._watch(futures, missing)
        finally:  # also where a cell is interrupted: what is queued would keep its place
            client.cancel([f for f in futures.values() if not f.done()])
        for future in futures.values():
            if future.status == "error":
                future.result()
        if any(f.status != "finished" for f in futures.values()):
            raise ConnectionError(
                "the Dask scheduler went away; run again: what was finished is kept"
            )

    def _watch(self, futures: dict, missing: dict[str, Node]) -> None:
        """Show how far the stages are, until all are done or one failed."""
        files = {k: self.store.progress_file(n.stage.name, k) for k, n in missing.items()}
        total, shown, looked = sum(_cost(n) for n in missing.values()), 0.0, 0.0
        with bar(total, f"{len(missing)} stages", "%", context=self.context) as progress:
            while not all(f.done() for f in futures.values()):
                if any(f.status == "error" for f in futures.values()):
                    break
                time.sleep(0.05)
                if time.monotonic() - looked > 1:
                    looked = time.monotonic()
                    shares = {k: f.done() or read_share(files[k]) for k, f in futures.items()}
                    now = sum(_cost(missing[k]) * share for k, share in shares.items())
                    progress.update(max(0.0, now - shown))
                    shown = max(shown, now)


def _cost_to_end(nodes: dict[str, Node]) -> dict[str, float]:
    """Cost of each node and of the longest chain of nodes that wait for it, so that the long chains
    start first and no worker is idle at the end. nodes: by key, in an order in which they can be
    built."""
    after = dict.fromkeys(nodes, 0.0)
    for key, node in reversed(nodes.items()):
        for needed in node.inputs.values():
            if needed.key in after:
                after[needed.key] = max(after[needed.key], after[key] + _cost(node))
    return {key: _cost(node) + after[key] for key, node in nodes.items()}


def _build(node: Node, store: Store, slots: dict[str, int], after: list) -> None:
    """In a thread of a worker: build one stage in a process of its own, with its share of the cores.

    Args:
        slots: how many stages may run at once on each host. after: what it waits for.
    """
    if not store.find(node.stage.name, node.key):
        threads = store.context.threads or max(1, n_cores() // slots.get(here(), 1))
        store = Store(store.root, replace(store.context, threads=threads))
        what = f"{node.stage.name} {node.key[:8]}"
        in_own_process(what, store.context.device, _build_here, node, store)


def _build_here(node: Node, store: Store) -> None:
    """In that process, whose code is what the stage runs."""
    if code_version(node.stage.build, node.stage.chosen) != node.recipe["code"]:
        raise RuntimeError(
            f"{node.stage.name}: the worker on {os.uname().nodename} has other code than the run that sent "
            "it; give it the same checkout, and start it and a notebook's kernel again after an edit"
        )
    store.build(node)
