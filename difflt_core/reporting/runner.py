"""What ./run_all.sh does once the environment stands: check everything cheap, then execute
notebooks with papermill."""

import contextlib
import hashlib
import json
import os
import sys
import time
from pathlib import Path

from ..data.sources import fingerprint
from ..engine.cluster import default_jobs, is_here, share_workers
from ..engine.files import atomic_write, file_sha256
from ..engine.provenance import ROOT
from ..engine.upkeep import upkeep
from ..experiments.imagenet_sample import check_imagenet
from ..experiments.own_images import check_own_images
from ..experiments.pipeline import Pipeline
from ..experiments.results import given_ratios
from ..experiments.sizing import sized
from ..generation.quality import INCEPTION, check_inception
from ..notebooks import Notebook, UsageError, asked_for, find_notebooks, plan_run, show_plan
from ..options import USER_ERRORS, build_parser, read_settings, set_environment
from ..profiles import PROFILES
from .claims import side_by_side, write_claims
from .page import write_page

__all__ = ["check_settings", "execute", "lengths_for", "main"]


# What notebooks would refuse when their turn comes.
_OF_THEIR_DATA = {"06": check_imagenet, "12": check_own_images}
_OF_FID = {"01", "09"}


def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    os.environ.pop("DIFFLT_FROM", None)  # of this command line, not of what a notebook starts
    set_environment(options)
    try:
        if options.dry_run and (options.verify or options.gc):
            raise UsageError(
                "--dry-run: is of a run, not of --verify or --gc; --gc alone removes nothing"
            )
        if options.verify or options.gc:
            return upkeep((options.out or ROOT).resolve(), options.verify, options.gc == "remove")
        values, data = check_settings(options)
        plan = plan_run(options, values)  # what is wrong is said before anything is measured
        if options.hours and not options.dry_run:
            plan = plan_run(options, values | lengths_for(options))
    except UsageError as error:
        print(f"run_all.sh: {error}", file=sys.stderr)
        return 2
    except USER_ERRORS as error:
        print(f"run_all.sh: {error}", file=sys.stderr)
        return 1
    if options.dry_run:
        print(show_plan(plan))
        return 0
    return _run(plan, options, data)


def check_settings(options) -> tuple[dict, str]:
    """The checks of values, device and data that need the packages; returns the values, and what tells
    the data from others (data/sources.fingerprint)."""
    try:
        _, values, config = read_settings(options)
        asked = asked_for(options)
        for number, check in _OF_THEIR_DATA.items():
            if number in asked:
                check(config)
        given_ratios(values.get("ratios"), config)
        data_dir = (options.data_dir or ROOT / "data").resolve()
        data = fingerprint(config.data, data_dir, options.download)
        if config.metrics.features == "inception" and not _OF_FID.isdisjoint(asked):
            check_inception(data_dir / INCEPTION, options.download)
        return values, data
    except ValueError as error:
        raise UsageError(str(error)) from None


def lengths_for(options, measure: bool = True) -> dict:
    """The lengths of the trainings that fit into --hours, by parameter: measured once for these options and
    written to runs/<profile>/sizing.json, so that the same command goes on with the same settings.

    Args:
        measure: False where another program looks for what ./run_all.sh has fixed.

    Raises:
        UsageError: too few hours, another machine's, a folder that cannot be read, or nothing fixed
            where nothing may be measured.
    """
    if not is_here():
        raise UsageError(
            "--hours: measures this machine, and a cluster would train; leave --scheduler out, or set the "
            "lengths (--set n_diffusion_steps=...)"
        )
    device, values, config = read_settings(options)
    for name in ("extractor.epochs", "classifier.epochs"):
        if values.get(name) is not None:
            raise UsageError(
                f"--hours: fits the lengths of the trainings; leave {name} out, or --hours"
            )
    out = (options.out or ROOT).resolve()
    pipeline = Pipeline(config, out, device, data_dir=options.data_dir or "")
    path = out / "runs" / options.profile / "sizing.json"
    nothing = UsageError(
        f"--hours {options.hours:g}: {path} has nothing of these options; give those of the ./run_all.sh "
        "--hours that trained, or the lengths (--set n_diffusion_steps=...)"
    )
    if not path.exists() and not measure:
        raise nothing
    try:
        asked = {
            "hours": options.hours,
            "values": values,
            "device": device,
            "jobs": default_jobs(device),
            "data": pipeline.data().key,
        }
        asked = json.loads(json.dumps(asked))  # as a record has it
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.with_suffix(".lock"), "measures"):
            records = _records(path)
            record = next((r for r in records if r["asked"] == asked), None)
            if record is None:
                if not measure:
                    raise nothing
                record = {"asked": asked, **sized(pipeline, options.hours)}
                atomic_write(path, json.dumps([*records, record], indent=1) + "\n")
    except ValueError as error:
        raise UsageError(str(error)) from None
    print(record["words"], file=sys.stderr, flush=True)
    return record["parameters"] | {n: v for n, v in values.items() if n in record["parameters"]}


def _records(path: Path) -> list[dict]:
    """What was measured before, one record for each set of options."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [r for r in found if {"asked", "parameters", "words"} <= r.keys()]
    except (OSError, ValueError, AttributeError):
        return []


def _run(plan, options, data: str) -> int:
    started, made, out = time.monotonic(), [], Path(plan[0][1]["out"])
    for i, (notebook, parameters) in enumerate(plan, 1):
        print(
            f"[{i}/{len(plan)}] {notebook.path.stem} ({options.profile})",
            file=sys.stderr,
            flush=True,
        )
        try:
            elapsed_s = execute(notebook, parameters, options.force, data)
        except KeyboardInterrupt:
            print("\nrun_all.sh: stopped; the same command continues from here", file=sys.stderr)
            return 1
        except NotebookFailed as error:
            print(f"\nrun_all.sh: {error}", file=sys.stderr)
            return 1
        except OSError as error:  # of the runner's own files: a stage's is a NotebookFailed
            print(
                f"\nrun_all.sh: {error}; mend that (a full disk: free some space) and run again: what was "
                "finished is kept",
                file=sys.stderr,
            )
            return 1
        finally:
            page = _pages(out, options.profile)
        made.append((notebook, elapsed_s))
    print(_summary(made, out / "figures" / options.profile, page, time.monotonic() - started))
    return 0


def _pages(out: Path, profile: str) -> Path | None:
    """Claims and the page of all, after each notebook; None, and why, where they cannot be written."""
    try:
        write_claims(out / "figures" / profile, profile)
        side_by_side(out / "figures")
        return write_page(find_notebooks(), out, profile)
    except OSError as error:
        print(f"run_all.sh: no page: {error}", file=sys.stderr)
        return None


_ERROR_LINES = 25  # of an error, on the terminal


class NotebookFailed(Exception):
    pass


def execute(
    notebook: Notebook, parameters: dict, force: bool = False, data: str = ""
) -> float | None:
    """Run one notebook into runs/<profile>/, with an HTML page beside it.

    Args:
        data: what tells its data from others, which parameters do not: a folder's files may change.

    Returns seconds, or None when it had finished before with the same source, parameters, data and code.

    Raises:
        NotebookFailed: naming the notebook, the cell, the error, and where the executed copy is.
    """
    runs = Path(parameters["out"]) / "runs" / parameters["profile"]
    executed, done = runs / notebook.path.name, runs / f"{notebook.path.stem}.done.json"
    wanted = _fingerprint(notebook, parameters, data)
    figures = runs.parent.parent / "figures" / parameters["profile"]
    with _alone(runs / f"{notebook.path.stem}.lock"):
        if not force and _finished(done, wanted):
            return None
        started = time.monotonic()
        _run_cells(notebook, parameters, executed)
        elapsed_s = time.monotonic() - started
        outputs = [p for p in sorted(figures.glob("*")) if p.stem in notebook.items]
        record = {
            "fingerprint": wanted,
            "elapsed_s": round(elapsed_s, 1),
            "outputs": {str(p): file_sha256(p) for p in [*outputs, executed]},
        }
        atomic_write(done, json.dumps(record, indent=1))
        return elapsed_s


@contextlib.contextmanager
def _alone(lock: Path, does: str = "is at this notebook"):
    """One run at a time is at a notebook, or at what it does; another says that it waits."""
    from filelock import FileLock, Timeout

    try:
        held = FileLock(lock).acquire(timeout=1)
    except Timeout:
        print(
            f"another run {does} in {lock.parent}; waiting for it (--out DIR: a folder of "
            "your own)",
            file=sys.stderr,
            flush=True,
        )
        held = FileLock(lock).acquire()
    with held:
        yield


def _run_cells(notebook: Notebook, parameters: dict, executed: Path) -> None:
    """Execute a notebook; its copy and the page of it are there where a cell fails, too.

    Raises:
        NotebookFailed: as execute.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    # the kernel inherits it, and where its stages are built
    os.environ["DIFFLT_PAPERMILL"] = "1"
    share_workers(parameters["device"])
    temporary = executed.with_name(f".{executed.name}")
    source, target = (  # papermill formats a path
        str(path).replace("{", "{{").replace("}", "}}") for path in (notebook.path, temporary)
    )
    try:
        papermill.execute_notebook(
            source,
            target,
            parameters,
            cwd=notebook.path.parent,
            kernel_name="python3",
            progress_bar=False,
            stderr_file=sys.stderr,
            extra_arguments=["--IPKernelApp.log_level=40"],
        )
    except papermill.PapermillExecutionError as error:
        os.replace(temporary, executed)
        _to_html(executed)
        lines = str(error.evalue).strip().splitlines()[:_ERROR_LINES]
        message = "\n".join(lines)  # the names of unreadable files, one in a line
        raise NotebookFailed(
            f"{notebook.path.name}, cell {error.cell_index + 1}: {error.ename}: {message}\n"
            f"  executed copy: {executed}"
        ) from None
    except DeadKernelError as error:
        raise NotebookFailed(
            f"{notebook.path.name}: the kernel died ({error}), perhaps out of memory; run again"
        ) from None
    os.replace(temporary, executed)
    _to_html(executed)


def _fingerprint(notebook: Notebook, parameters: dict, data: str) -> str:
    """Of the source, the parameters, the data and the package: when one changes, the notebook runs again
    (on cached artifacts)."""
    settings = [parameters, PROFILES[parameters["profile"]], data]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for cell in notebook.content["cells"]:
        digest.update("".join(cell["source"]).encode())
    package = Path(__file__).parents[1]
    for source in sorted([*package.rglob("*.py"), *package.rglob("*.json")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _finished(done: Path, wanted: str) -> bool:
    try:
        record = json.loads(done.read_text())
        return record["fingerprint"] == wanted and all(
            file_sha256(Path(p)) == digest for p, digest in record["outputs"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def _to_html(executed: Path) -> None:
    """Drop the progress bars' text from the executed copy, point its links from where it lies now, a
    folder deeper than notebooks/, and write a page beside it."""
    import nbformat
    from nbconvert import HTMLExporter

    book = nbformat.read(executed, 4)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        elif "](../../" not in cell.source:
            cell.source = cell.source.replace("](../", "](../../")
    atomic_write(executed, nbformat.writes(book))
    atomic_write(executed.with_suffix(".html"), HTMLExporter().from_notebook_node(book)[0])


def _summary(made, figures: Path, page: Path | None, total_s: float) -> str:
    lines = ["", f"{'notebook':25} {'seconds':>9}  made"]
    for notebook, elapsed_s in made:
        seconds = "finished" if elapsed_s is None else f"{elapsed_s:.0f}"
        lines.append(f"{notebook.path.stem:25} {seconds:>9}  {', '.join(notebook.items)}")
    lines.append(f"figures and tables: {figures}")
    if page is not None:
        lines += [f"executed notebooks: {page.parent}", f"all on one page: {page}"]
    lines.append(f"total: {total_s:.0f} s")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
