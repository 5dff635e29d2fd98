"""`python -m difflt_core.benchmarks NAME [options]`: each writes figures/benchmark/<name>.md and
.json, with the machine that gave the numbers."""

import argparse
import sys

from ..engine.progress import resolve_device
from . import (
    allocator,
    augment,
    classifier,
    cost,
    generator,
    memory,
    samplers,
    sau,
    throughput,
)
from .shared import add_shared_options

__all__ = ["BENCHMARKS", "main"]

BENCHMARKS = {
    "throughput": throughput,
    "samplers": samplers,
    "classifier": classifier,
    "sau": sau,
    "augment": augment,
    "generator": generator,
    "cost": cost,
    "memory": memory,
    "allocator": allocator,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m difflt_core.benchmarks", description=__doc__)
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, module in BENCHMARKS.items():
        about = module.__doc__
        one = names.add_parser(name, help=" ".join(about.split(":")[0].split()), description=about)
        add_shared_options(one)
        module.add_options(one)
    options = parser.parse_args(argv)
    try:
        options.device = resolve_device(options.device)
    except ValueError as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    BENCHMARKS[options.name].run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
