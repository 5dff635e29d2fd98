"""What ./run_all.sh does once the environment stands: check everything cheap, then execute
notebooks with papermill."""

import ast
import hashlib
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from .config import PARAMETERS, load_config, parse_parameters
from .datasets import fingerprint
from .options import build_parser
from .profiles import PROFILES
from .progress import resolve_device
from .provenance import ROOT
from .store import atomic_write, file_sha256
from .summary import write_page

__all__ = ["Notebook", "execute", "find_notebooks", "main"]

_COMMON = ("profile", "device", "out", "data_dir")  # parameters that every notebook has
_NEEDED_GB = {
    "smoke": 0.5,
    "demo": 1.0,
    "folder": 2.0,
    "cifar10": 8.0,
    "cifar10-jpeg": 8.0,
    "cifar100": 8.0,
    "imagenet": 20.0,  # 2.3 of real images, 14.3 of generated ones, and the models
}


class UsageError(Exception):
    """Wrong arguments: exit status 2."""


@dataclass(frozen=True)
class Notebook:
    path: Path

    @property
    def number(self) -> str:
        return self.path.name[:2]

    @property
    def content(self) -> dict:
        return json.loads(self.path.read_text(encoding="utf-8"))

    @property
    def parameters(self) -> list[str]:
        """Names assigned in the cell tagged `parameters`."""
        for cell in self.content["cells"]:
            if "parameters" in cell["metadata"].get("tags", []):
                tree = ast.parse("".join(cell["source"]))
                return [
                    t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets
                ]
        return []

    @property
    def items(self) -> list[str]:
        return self.content["metadata"]["difflt"]["items"]

    def runs_by_default(self, profile: str) -> bool:
        """Whether ./run_all.sh runs it without --only: not where its time is not measured yet."""
        return profile not in self.content["metadata"]["difflt"].get("not_in", [])

    def minutes(self, profile: str) -> str:
        return self.content["metadata"]["difflt"]["minutes"].get(profile, "?")


def find_notebooks(folder: Path | None = None) -> list[Notebook]:
    return [Notebook(p) for p in sorted((folder or ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))]


def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    if options.list:
        print(_listing())
        return 0
    try:
        plan = _plan(options)
    except UsageError as error:
        print(f"run_all.sh: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"run_all.sh: {error}", file=sys.stderr)
        return 1
    if options.dry_run:
        for notebook, parameters in plan:
            print(f"{notebook.path.name}  {parameters}")
        return 0
    return _run(plan, options)


def _plan(options) -> list[tuple[Notebook, dict]]:
    """Every check that costs nothing, before the first expensive step."""
    known = find_notebooks()
    numbers = options.only or [n.number for n in known if n.runs_by_default(options.profile)]
    missing = [n for n in numbers if n not in {k.number for k in known}]
    if missing:
        raise UsageError(
            f"no notebook {missing[0]}; there are {', '.join(n.path.stem for n in known)}"
        )
    chosen = [n for n in known if n.number in numbers]
    try:
        resolve_device(options.device)
        load_config(options.profile)
        values = parse_parameters(options.parameters, options.profile)
        config = load_config(options.profile, **values)
    except ValueError as error:
        raise UsageError(str(error)) from None
    for name in values:
        if not any(name in n.parameters for n in chosen):
            raise UsageError(
                f"none of the chosen notebooks has a parameter {name!r}; see ./run_all.sh --list"
            )
    data_dir = (options.data_dir or ROOT / "data").resolve()
    fingerprint(config.data, data_dir, options.download)  # says what is expected where
    out = (options.out or ROOT).resolve()
    for folder in (out / "figures" / options.profile, out / "runs" / options.profile):
        _check_writable(folder)
    free_gb = shutil.disk_usage(out).free / 1e9
    if free_gb < _NEEDED_GB[options.profile]:
        raise OSError(
            f"{free_gb:.2f} GB free in {out}, but profile {options.profile} needs "
            f"{_NEEDED_GB[options.profile]} GB; free some space or choose another --out"
        )
    common = {
        "profile": options.profile,
        "device": options.device,
        "out": str(out),
        "data_dir": str(data_dir),
    }
    return [(n, common | {k: v for k, v in values.items() if k in n.parameters}) for n in chosen]


def _check_writable(folder: Path) -> None:
    probe = folder / f".write-test.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"cannot write to {folder} ({error.strerror}); choose another folder with --out DIR"
        ) from None


def _run(plan, options) -> int:
    started, made, out = time.monotonic(), [], Path(plan[0][1]["out"])
    if options.download:
        os.environ["DIFFLT_DOWNLOAD"] = "1"
    if options.jobs:
        os.environ["DIFFLT_JOBS"] = str(options.jobs)
    for i, (notebook, parameters) in enumerate(plan, 1):
        print(
            f"[{i}/{len(plan)}] {notebook.path.stem} ({options.profile})",
            file=sys.stderr,
            flush=True,
        )
        try:
            elapsed_s = execute(notebook, parameters, options.force)
        except KeyboardInterrupt:
            print("\nrun_all.sh: stopped; the same command continues from here", file=sys.stderr)
            return 1
        except NotebookFailed as error:
            print(f"\nrun_all.sh: {error}", file=sys.stderr)
            return 1
        finally:
            page = write_page(find_notebooks(), out, options.profile)
        made.append((notebook, elapsed_s))
    print(_summary(made, out / "figures" / options.profile, page, time.monotonic() - started))
    return 0


class NotebookFailed(Exception):
    pass


def execute(notebook: Notebook, parameters: dict, force: bool = False) -> float | None:
    """Run one notebook into runs/<profile>/, with an HTML page beside it.

    Returns seconds, or None when it had finished before with the same source, parameters and code.

    Raises:
        NotebookFailed: naming the notebook, the cell, the error, and where the executed copy is.
    """
    import papermill
    from filelock import FileLock
    from nbclient.exceptions import DeadKernelError

    runs = Path(parameters["out"]) / "runs" / parameters["profile"]
    executed, done = runs / notebook.path.name, runs / f"{notebook.path.stem}.done.json"
    wanted = _fingerprint(notebook, parameters)
    figures = runs.parent.parent / "figures" / parameters["profile"]
    with FileLock(runs / f"{notebook.path.stem}.lock"):
        if not force and _finished(done, wanted):
            return None
        started = time.monotonic()
        os.environ["DIFFLT_PAPERMILL"] = "1"  # the kernel inherits it, and DIFFLT_JOBS
        temporary = executed.with_name(f".{executed.name}")
        try:
            papermill.execute_notebook(
                notebook.path,
                temporary,
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
            message = str(error.evalue).strip().splitlines() or [""]
            raise NotebookFailed(
                f"{notebook.path.name}, cell {error.cell_index + 1}: {error.ename}: {message[0]}\n"
                f"  executed copy: {executed}"
            ) from None
        except DeadKernelError as error:
            raise NotebookFailed(
                f"{notebook.path.name}: the kernel died ({error}), perhaps out of memory; run again"
            ) from None
        os.replace(temporary, executed)
        _to_html(executed)
        elapsed_s = time.monotonic() - started
        outputs = [p for p in sorted(figures.glob("*")) if p.stem in notebook.items]
        record = {
            "fingerprint": wanted,
            "elapsed_s": round(elapsed_s, 1),
            "outputs": {str(p): file_sha256(p) for p in [*outputs, executed]},
        }
        atomic_write(done, json.dumps(record, indent=1))
        return elapsed_s


def _fingerprint(notebook: Notebook, parameters: dict) -> str:
    """Of the source, the parameters and the package: when one changes, the notebook runs again (on
    cached artifacts)."""
    digest = hashlib.sha256(
        json.dumps(
            [parameters, PROFILES[parameters["profile"]]], sort_keys=True, default=str
        ).encode()
    )
    for cell in notebook.content["cells"]:
        digest.update("".join(cell["source"]).encode())
    for module in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(module.read_bytes())
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
    """Drop the progress bars' text from the executed copy and write a page beside it."""
    import nbformat
    from nbconvert import HTMLExporter

    book = nbformat.read(executed, 4)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    atomic_write(executed, nbformat.writes(book))
    atomic_write(executed.with_suffix(".html"), HTMLExporter().from_notebook_node(book)[0])


def _listing() -> str:
    known = find_notebooks()
    width = max(len(", ".join(n.items)) for n in known)
    lines = [f"{'notebook':22} {'items':{width}} {'minutes: smoke':>15} {'demo':>7}"]
    for n in known:
        demo = n.minutes("demo") if n.runs_by_default("demo") else "--only"
        items = ", ".join(n.items)
        lines.append(f"{n.path.stem:22} {items:{width}} {n.minutes('smoke'):>15} {demo:>7}")
    lines += [
        "",
        "parameters (--set NAME=VALUE; which notebook takes which: its parameters cell):",
        "  " + ", ".join(PARAMETERS),
    ]
    return "\n".join(lines)


def _summary(made, figures: Path, page: Path, total_s: float) -> str:
    lines = ["", f"{'notebook':25} {'seconds':>9}  made"]
    for notebook, elapsed_s in made:
        seconds = "finished" if elapsed_s is None else f"{elapsed_s:.0f}"
        lines.append(f"{notebook.path.stem:25} {seconds:>9}  {', '.join(notebook.items)}")
    lines += [
        f"figures and tables: {figures}",
        f"executed notebooks: {page.parent}",
        f"all on one page: {page}",
        f"total: {total_s:.0f} s",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
