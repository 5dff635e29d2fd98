"""What missing stages take: for their order, and for the time left that a bar shows."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .artifacts import Node

__all__ = ["TimeLeft", "cost_to_end", "costs", "own_steps"]

# Relative cost of a stage, from the CPU hours of our own runs. Of trainings: of the longest of its kind,
# shorter ones in proportion to their steps. Any other stage: next to nothing.
_COST = {
    "diffusion": 8.0,
    "sau": 4.0,
    "samples": 1.0,
    "extractor": 0.6,
    "classifier": 0.6,
    "text2image": 10.0,
}
_LITTLE = 0.02
_RECIPE = {
    "extractor": "classifier",
    "samples": "diffusion",
}  # where it is not called like the stage
_SLOWER = (
    "arch",
    "width",
    "crop_size",
    "method",
    "preset",
    "branches",
)  # settings that tell speeds apart
_DOUBT = 0.1  # of a stage: so much has to be done before what was seen outweighs the mean


class TimeLeft:
    """How far missing stages are, as a share of the time that they take together.

    What is left is reckoned by the time that the stages of like networks took here; where none has run
    yet, by _COST and the mean of the others.
    """

    def __init__(self, missing: Mapping[str, "Node"]):
        self._costs = costs(missing)
        self._kinds = {key: _kind(node) for key, node in missing.items()}
        self._shares = dict.fromkeys(missing, 0.0)
        # by kind: cost of what was done, and seconds of the stages that did it
        self._done: dict[tuple, float] = defaultdict(float)
        self._busy: dict[tuple, float] = defaultdict(float)

    def look(
        self,
        running: Mapping[str, tuple[float, float]],
        built: Collection[str],
        passed: float,
    ) -> None:
        """
        Args:
            running: by key, the share that is done of each stage under way, and the one that it began
                with. built: keys of finished ones. passed: seconds since the last look.
        """
        now = {**running, **dict.fromkeys(built, (1.0, 0.0))}
        for key, (share, began) in now.items():
            kind, before = self._kinds[key], max(began, self._shares[key])
            self._done[kind] += self._costs[key] * max(0.0, share - before)
            self._shares[key] = max(share, before)
            if key in running:
                self._busy[kind] += passed

    @property
    def share(self) -> float:
        """0 to 1; it falls where stages turn out to be slower than was thought."""
        busy, done = sum(self._busy.values()), sum(self._done.values())
        if not busy or not done:
            return 0.0
        left = 0.0
        for key, kind in self._kinds.items():
            doubt = _DOUBT * self._costs[key]
            seconds = self._busy[kind] + doubt * busy / done
            left += (
                (1 - self._shares[key]) * self._costs[key] * seconds / (self._done[kind] + doubt)
            )
        return busy / (busy + left)


def _kind(node: "Node") -> tuple:
    """What stages have in common whose cost is told by their steps alone."""
    recipe = node.config.get(_RECIPE.get(node.stage.name, node.stage.name)) or {}
    return node.stage.name, *(recipe.get(name) for name in _SLOWER)


def costs(nodes: Mapping[str, "Node"]) -> dict[str, float]:
    """What building each node takes, see _COST."""
    longest: dict[str, int] = {}
    for node in nodes.values():
        longest[node.stage.name] = max(_steps(node)[1], longest.get(node.stage.name, 1))
    found = {}
    for key, node in nodes.items():
        own, whole = _steps(node)
        share = own / longest[node.stage.name] if whole else 1
        found[key] = _COST.get(node.stage.name, _LITTLE) * share
    return found


def own_steps(node: "Node") -> int:
    """Of a training, the steps that this stage makes itself; 0 of any other stage."""
    return _steps(node)[0]


def _steps(node: "Node") -> tuple[int, int]:
    """Of a training, the steps that this stage makes itself, and with those of its first part, which
    another stage makes; (0, 0) of any other stage."""
    name = node.stage.name
    if name not in ("diffusion", "sau", "extractor", "classifier"):
        return 0, 0
    recipe = node.config[_RECIPE.get(name, name)]
    whole = recipe["n_steps"]
    before = int(recipe["plain_share"] * whole) if "plain" in node.inputs else 0
    return whole - before, whole


def cost_to_end(missing: dict[str, "Node"]) -> dict[str, float]:
    """Cost of each node and of the longest chain of nodes that wait for it, so that the long chains
    start first and no worker is idle at the end. missing: by key, in an order in which they can be
    built."""
    own, after = costs(missing), dict.fromkeys(missing, 0.0)
    for key, node in reversed(missing.items()):
        for needed in node.inputs.values():
            if needed.key in after:
                after[needed.key] = max(after[needed.key], after[key] + own[key])
    return {key: own[key] + after[key] for key in missing}
