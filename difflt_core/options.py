"""The command line of ./run_all.sh, in the standard library alone: it is read before any package is
installed."""

import argparse
import ast
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .notebooks import local_parameters
from .profiles import PROFILES

if TYPE_CHECKING:
    from .config import RunConfig

__all__ = [
    "USER_ERRORS",
    "Run",
    "add_hours",
    "build_parser",
    "read_run",
    "read_settings",
    "set_environment",
    "told",
]


# What the user of a program can mend: a setting, a file, the disk, too little memory, a learning rate.
USER_ERRORS = (ValueError, OSError, MemoryError, FloatingPointError)

_WHAT = """Runs the notebooks in order and leaves tables and figures in figures/<profile>/, executed
notebooks in runs/<profile>/. Makes the environment .venv on first use, unless an active one already
has the packages."""


def build_parser(prog: str = "", what: str = _WHAT) -> argparse.ArgumentParser:
    """Of ./run_all.sh, or of a program that takes a profile, its parameters and a machine alone."""
    parser = argparse.ArgumentParser(
        prog=prog or "./run_all.sh",
        description=what,
        epilog="Exit status: 0 done, 1 a failure, 2 wrong usage. A killed run continues where it stopped.",
    )
    add = parser.add_argument
    add(
        "--profile",
        default="demo",
        choices=tuple(PROFILES),
        help="size of the run (default: %(default)s)",
    )
    add(
        "--set",
        dest="parameters",
        action="append",
        default=[],
        type=_assignment,
        metavar="NAME=VALUE",
        help="a parameter that --list names, or any setting by its path, like diffusion.lr=3e-4; repeatable",
    )
    add(
        "--out",
        type=_path,
        metavar="DIR",
        help="where runs/ and figures/ go (default: this checkout)",
    )
    add(
        "--cache",
        type=_path,
        metavar="DIR",
        help="where what is trained is kept, and found (default: DIFFLT_CACHE, or runs/cache in --out)",
    )
    add(
        "--data-dir",
        type=_path,
        metavar="DIR",
        help="where data sets lie or are downloaded to (default: data)",
    )
    add("--download", action="store_true", help="fetch a data set that is not in --data-dir")
    _add_machine(parser)
    if not prog:
        _add_run(parser)
    return parser


def add_hours(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--hours", type=_hours, metavar="H", help=what)


def _add_run(parser: argparse.ArgumentParser) -> None:
    """What a run of notebooks takes."""
    add = parser.add_argument
    add("--only", type=_numbers, metavar="01,05", help="run these notebooks only")
    add_hours(
        parser,
        "of notebook 12: measure how fast this machine is, and train as long as fits into so many hours",
    )
    add(
        "--list",
        action="store_true",
        help="show notebooks, their items and times, and the parameters",
    )
    add("--dry-run", action="store_true", help="check everything and show what would run")
    add("--force", action="store_true", help="run notebooks again although they are finished")
    add(
        "--verify",
        action="store_true",
        help="read every byte of the cache and set damaged artifacts aside, instead of a run",
    )
    add(
        "--gc",
        nargs="?",
        const="list",
        choices=("list", "remove"),
        help="list what of the cache no figure in figures/ was made of, instead of a run; remove: remove it",
    )
    add(
        "--test",
        nargs="?",
        const="all",
        choices=("all", "quick"),
        help="run the test suite instead; quick: a minute's worth of it",
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    """What it runs on."""
    add = parser.add_argument
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: auto")
    add(
        "--jobs",
        type=_positive,
        metavar="N",
        help="stages built side by side (default: one per GPU or CPU core)",
    )
    add(
        "--scheduler",
        metavar="ADDRESS",
        help="of a Dask cluster that builds them instead, like tcp://HOST:8786 (default: "
        "DIFFLT_SCHEDULER, or workers on this machine)",
    )


def set_environment(options: argparse.Namespace) -> None:
    """Let the options about the machine reach every process."""
    if options.cache:
        os.environ["DIFFLT_CACHE"] = str(options.cache.resolve())
    if options.download:
        os.environ["DIFFLT_DOWNLOAD"] = "1"
    if options.jobs:
        os.environ["DIFFLT_JOBS"] = str(options.jobs)
    if options.scheduler:
        os.environ["DIFFLT_SCHEDULER"] = options.scheduler


@dataclass(frozen=True)
class Run:
    """A command line, checked: what a module that trains without a notebook needs to begin."""

    config: "RunConfig"
    device: str
    out: str  # "" is the checkout
    data_dir: str  # "" is data/ in the checkout
    options: argparse.Namespace  # with those of the parser's own


def told(prog: str, work: Callable[[], None]) -> int:
    """The exit status of a program's work: what its user can mend is one message, and no traceback."""
    try:
        work()
    except USER_ERRORS as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    return 0


def read_run(argv: list[str] | None, parser: argparse.ArgumentParser) -> Run | None:
    """The run that a command line asks for; None, and a message, where its settings are wrong.

    Args:
        parser: of build_parser, with options of its own or without.
    """
    options = parser.parse_args(argv)
    set_environment(options)
    try:
        device, values, config = read_settings(options)
        for name, numbers in local_parameters().items():
            if name in values:
                where = " or ".join(numbers)
                raise ValueError(f"{name} is a parameter of notebook {where} alone")
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return None
    out, data_dir = str(options.out or ""), str(options.data_dir or "")
    return Run(config, device, out, data_dir, options)


def read_settings(options: argparse.Namespace) -> tuple[str, dict, "RunConfig"]:
    """The device, the values of the parameters and the configuration that options ask for, which
    takes the packages.

    Raises:
        ValueError: there is no such device, or a value does not fit its setting.
    """
    from .config import load_config, parse_parameters
    from .engine.cluster import is_here
    from .engine.progress import resolve_device

    device = resolve_device(options.device) if is_here() else options.device  # the workers know
    local = local_parameters()
    own = [(name, text) for name, text in options.parameters if name in local]
    settings = [(name, text) for name, text in options.parameters if name not in local]
    values = parse_parameters(settings, options.profile)
    config = load_config(options.profile, **values)
    return device, values | {name: _literal(name, text) for name, text in own}, config


def _literal(name: str, text: str):
    """The value of a notebook's own parameter."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise ValueError(f"{name}: expected a number, a list or True, got {text!r}") from None


def _path(text: str) -> Path:
    """Relative to where ./run_all.sh was called, which it leaves for the checkout."""
    return Path(os.environ.get("DIFFLT_FROM", ""), text)


def _numbers(text: str) -> list[str]:
    numbers = [part.strip() for part in text.split(",") if part.strip()]
    if not numbers or not all(n.isdigit() and len(n) <= 2 for n in numbers):
        raise argparse.ArgumentTypeError(f"expected notebook numbers like 01,05, got {text!r}")
    return [n.zfill(2) for n in numbers]


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = 0.0
    if not 0 < hours < 10_000:
        raise argparse.ArgumentTypeError(f"expected hours above 0, like 2 or 0.5, got {text!r}")
    return hours


def _assignment(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not all(part.isidentifier() for part in name.split(".")):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value
