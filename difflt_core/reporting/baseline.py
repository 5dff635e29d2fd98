"""A classifier on the real images alone, of any profile and method: trained, tested and written
down, without the generator: `python -m difflt_core.reporting.baseline --profile cifar10 --set method=bsce`.

Writes figures/<profile>/baseline_<method>.*: accuracy overall, by shot group and by class, and the
confusion matrix.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from ..data.long_tail import load_split
from ..engine.files import refuse_existing
from ..experiments.pipeline import Pipeline
from ..experiments.results import group_rule, predictions
from ..options import build_parser, read_run, told
from ..recognition.accuracy import class_accuracy, confusion, group_accuracy
from .figures import confusion_matrix
from .items import Report, summarise
from .predict import save_model

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    parser = build_parser("python -m difflt_core.reporting.baseline", __doc__)
    parser.add_argument(
        "--model", type=Path, metavar="DIR",
        help="the first seed's also goes into this new folder, for difflt_core.reporting.predict",
    )  # fmt: skip
    run = read_run(argv, parser)
    if run is None:
        return 2
    saved = run.options.model

    def work() -> None:
        if saved:  # before the work
            refuse_existing(saved)
        pipeline = Pipeline(run.config, run.out, run.device, data_dir=run.data_dir)
        pipeline.build([{"seed": s} for s in run.config.seeds], stages=("train_on_real",))
        first = pipeline.vary({"seed": run.config.seeds[0]})
        if saved:
            first.build([{}], stages=("train_extractor",))
        report = Report(pipeline, run.out)
        text = report_baseline(pipeline, report)
        if saved:
            save_model(first, saved, "train_on_real")
        print(f"{text.to_markdown(disable_numparse=True)}\n{report.paths()}")

    return told(parser.prog, work)


def report_baseline(pipeline: Pipeline, report: Report) -> pd.DataFrame:
    """Write baseline_<method>: a table of accuracies in % over the seeds, and a confusion matrix."""
    config, train = pipeline.config, load_split(pipeline.data(), "train")
    data = config.data
    test = load_split(pipeline.data(), "test")
    K, counts = len(train.class_names), train.class_counts
    columns = [f"{name} ({n})" for name, n in zip(train.class_names, counts, strict=True)]
    rows, shares = [], []
    for seed in config.seeds:
        variant = pipeline.vary({"seed": seed})
        predicted = predictions(variant, variant.train_on_real())
        groups = group_accuracy(predicted, test.labels, counts, data.many_above, data.few_below)
        per_class = dict(zip(columns, class_accuracy(predicted, test.labels, K), strict=True))
        rows.append({"method": config.classifier.method, "seed": seed, **groups, **per_class})
        shares.append(confusion(predicted, test.labels, K))
    runs, name = pd.DataFrame(rows), f"baseline_{config.classifier.method}"
    table = summarise(runs, "method", list(runs.columns[2:]))
    caption = (
        f"Top-1 accuracy in % of {config.classifier.arch} on the real images alone, last step, "
        f"test set of {len(test.labels)}; class (training images). {group_rule(pipeline)}"
    )
    shown = report.table(name, table.T if K <= 20 else table.iloc[:, :4].T, caption, runs)
    fig, ax = plt.subplots(figsize=(5.4, 4.6))
    confusion_matrix(ax, np.mean(shares, axis=0), train.class_names)
    report.figure(f"{name}_confusion", fig, "Share in % of each class's test images by prediction")
    return shown


if __name__ == "__main__":
    sys.exit(main())
