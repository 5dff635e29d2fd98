"""The whole method in one call, and from the command line on one process or many:
`accelerate launch --num_processes 8 -m difflt_core.experiments.method --profile demo`."""

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..config import RunConfig
from ..data.long_tail import LongTail, load_split
from ..engine import parallel
from ..options import build_parser, read_run, told
from ..recognition.classifier import load_classifier
from ..recognition.networks import Backbone
from .pipeline import Pipeline
from .results import accuracy, kept

__all__ = ["DiffuLT", "run_diffult"]


@dataclass(frozen=True)
class DiffuLT:
    """What one run of the method leaves: the classifier, the images, their types, the
    accuracies."""

    pipeline: Pipeline

    @cached_property
    def classifier(self) -> Backbone:
        return load_classifier(
            self.pipeline.train_classifier(), self.pipeline.store.context.device_here
        )

    @property
    def images(self) -> np.ndarray:
        """Generated images uint8 (N_gen, H, W, C), memory-mapped."""
        return self.pipeline.generate().array("images")

    @property
    def labels(self) -> np.ndarray:
        return np.asarray(self.pipeline.generate().array("labels"))

    @property
    def types(self) -> np.ndarray:
        """int8 (N_gen,): index into ("ID", "AID", "OOD")."""
        return np.asarray(self.pipeline.type_samples().array("type"))

    @property
    def kept(self) -> np.ndarray:
        """Indices of the generated images that trained the classifier."""
        return kept(self.pipeline)

    @cached_property
    def accuracy(self) -> dict[str, float]:
        return accuracy(self.pipeline, self.pipeline.train_classifier())

    @property
    def train(self) -> LongTail:
        return load_split(self.pipeline.data(), "train")


def run_diffult(
    config: RunConfig,
    out: Path | str = "",
    device: str = "auto",
    progress: bool = True,
    data_dir: Path | str = "",
) -> DiffuLT:
    """The whole method: train phi_0 and the generator, fill the tail, type and filter, train the
    classifier.

    Args:
        config: from load_config. out, device, progress, data_dir: as for Pipeline.

    Returns:
        DiffuLT with classifier, images, labels, types, kept and accuracy (overall, many, medium,
        few, in %).
    """
    result = DiffuLT(Pipeline(config, out, device, progress, data_dir))
    result.pipeline.train_classifier()
    return result


def main(argv: list[str] | None = None) -> int:
    """Build DiffuLT's own chain for every seed of a profile, without a notebook."""
    parser = build_parser("python -m difflt_core.experiments.method", __doc__)
    run = read_run(argv, parser)
    if run is None:
        return 2

    def work() -> None:
        parallel.start(run.device)
        pipeline = Pipeline(run.config, run.out, run.device, data_dir=run.data_dir)
        pipeline.build([{"seed": s} for s in run.config.seeds])

    return told(parser.prog, work)


if __name__ == "__main__":
    sys.exit(main())
