"""Finds or makes the environment and hands over to the runner. Standard library only.

An active environment that already has the packages is used as it is. Otherwise .venv is made beside
this checkout from requirements.lock, or for --test from requirements-test.lock, which has more (every
file checked by its hash; by uv, where it is there). A marker with the lock's hash is written last, so an
installation that was killed is finished by the next call, and a changed lock is installed again.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .engine.provenance import ROOT
from .notebooks import UsageError, listing, plan_run, show_plan
from .options import build_parser, set_environment

VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
MARKER = VENV / "difflt-lock.sha256"
NEEDED_GB = 8  # the packages take 5.6 GB, and pip needs room beside them

_LOCKS = {False: ROOT / "requirements.lock", True: ROOT / "requirements-test.lock"}  # by --test
_PROBE = "import importlib.metadata as m; [m.version(p) for p in {}]"
_RUN = ("difflt", "torch", "diffusers", "papermill", "distributed")


def main(argv: list[str]) -> int:
    options = build_parser().parse_args(argv)  # --help and wrong usage end here
    if options.list:
        print(listing())
        return 0
    test = bool(options.test)
    ready = sys.executable if _active_environment_is_ready(test) else _finished_venv(test)
    if options.dry_run and not ready:
        return _dry_run(options)
    python = ready or _venv_python(test)
    if python is None:
        return 1
    os.environ["PYTHONPATH"] = str(ROOT)
    if options.test:
        os.environ.pop("DIFFLT_FROM", None)
        # A process a core, as far as memory goes; a file to each, whose fixtures are made once.
        several = ["--numprocesses=logical", "--maxprocesses=4", "--dist=loadfile"]
        command = [python, "-m", "pytest", *several]
        command += [] if sys.stdout.isatty() else ["--color=no"]
        command += ["-m", "quick"] if options.test == "quick" else []
        return subprocess.call(command, cwd=ROOT)
    os.execv(python, [python, "-m", "difflt_core.reporting.runner", *argv])


def _active_environment_is_ready(test: bool) -> bool:
    probe = _PROBE.format((*_RUN, *(("pytest-xdist", "hypothesis") if test else ())))
    active = sys.prefix != sys.base_prefix or bool(os.environ.get("CONDA_PREFIX"))
    return (
        active
        and subprocess.run([sys.executable, "-c", probe], capture_output=True, cwd="/").returncode
        == 0
    )


def _dry_run(options) -> int:
    """What would run, where no environment is there to check the values with; none is made."""
    set_environment(options)
    try:
        print(show_plan(plan_run(options)))
    except (UsageError, OSError) as error:
        print(f"run_all.sh: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    print("(values and data are checked by the run itself: no environment yet)", file=sys.stderr)
    return 0


def _wanted(*tests: bool) -> list[str]:
    """What the marker of a finished .venv says, for each lock: the lock, and the Python that its packages
    are for, which is not the one that reads this if another is first on the PATH now."""
    ask = "import sys; print('python{}.{}'.format(*sys.version_info))"
    version = subprocess.run(
        [str(PYTHON), "-c", ask], capture_output=True, text=True
    ).stdout.strip()
    return [f"{hashlib.sha256(_LOCKS[test].read_bytes()).hexdigest()} {version}" for test in tests]


def _finished_venv(test: bool) -> str | None:
    """The interpreter of .venv, where it is whole and of this lock, or of the larger one."""
    if not (MARKER.exists() and PYTHON.exists()):
        return None
    return str(PYTHON) if MARKER.read_text() in _wanted(test, True) else None


def _venv_python(test: bool) -> str | None:
    """The interpreter of .venv, made or finished; None (and a message) when that fails."""
    try:
        with _only_one():
            return _made(test)
    except OSError as error:  # of the lock: the rest is said where it is done
        print(
            f"run_all.sh: cannot write to {ROOT} ({error.strerror}). Activate an environment that has "
            f"{_LOCKS[test].name} and this checkout (pip install --no-deps -e .), or use a copy of your own.",
            file=sys.stderr,
        )
        return None


def _made(test: bool) -> str | None:
    if _finished_venv(test):  # by another call, meanwhile
        return str(PYTHON)
    more = _finished_venv(False) is not None  # only the packages of the tests are missing
    what = "Adding the packages of the tests to" if more else "Setting up"
    size = "0.5 GB" if more else "5.6 GB; a few minutes, once"
    print(f"{what} .venv from {_LOCKS[test].name} (about {size}) ...", file=sys.stderr)
    try:
        free_gb = shutil.disk_usage(ROOT).free / 1e9
        if free_gb < NEEDED_GB and not PYTHON.exists():
            print(
                f"run_all.sh: {free_gb:.1f} GB free in {ROOT}, but the packages need {NEEDED_GB} GB. Free some space.",
                file=sys.stderr,
            )
            return None
        if not more:  # else it stays whole for a run if this one ends here
            if busy := _at_work():
                print(
                    f"run_all.sh: .venv has to be made anew, for {_LOCKS[test].name} has changed, and it is in use by "
                    f"process {', '.join(busy)}. End that or let it finish, then run the same command again.",
                    file=sys.stderr,
                )
                return None
            MARKER.unlink(missing_ok=True)
            _call([sys.executable, "-m", "venv", "--clear", str(VENV)])
        _install(_LOCKS[test])
    except (OSError, subprocess.CalledProcessError) as error:
        print(
            f"run_all.sh: setting up .venv failed: {error}\n"
            "The lines above say why. With no network: connect, or point pip at a mirror or a folder of wheels\n"
            "(PIP_INDEX_URL, PIP_FIND_LINKS). With no space left: free 8 GB. Then run the same command again.",
            file=sys.stderr,
        )
        return None
    temporary = MARKER.with_suffix(".tmp")
    temporary.write_text(*_wanted(test))
    os.replace(temporary, MARKER)
    return str(PYTHON)


def _at_work() -> list[str]:
    """The numbers of other processes that were started from .venv, where the system tells (Linux)."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            program = (process / "cmdline").read_bytes().split(b"\0")[0]
        except OSError:  # it has ended
            continue
        if program.startswith(os.fsencode(VENV) + b"/") and int(process.name) != os.getpid():
            found.append(process.name)
    return found


def _install(lock) -> None:
    """All of a lock, and this checkout, into .venv."""
    quiet = [] if sys.stderr.isatty() else ["--quiet"]  # a log wants no progress bars
    exact = ["--require-hashes", "--no-deps", "-r", str(lock)]
    uv = shutil.which("uv")
    fast = [uv, "pip", "install", "--python", str(PYTHON), *quiet, *exact]
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install", *quiet]
    if not uv or subprocess.run(fast, stdin=subprocess.DEVNULL).returncode:
        _call([*pip, *exact])  # pip's own settings may know an index that uv does not
    _call([*pip, "--no-deps", "--no-build-isolation", "--no-index", "-e", str(ROOT)])


@contextlib.contextmanager
def _only_one():
    """Two calls at once must not install into one folder; the kernel releases the lock of a killed
    process."""
    import fcntl

    with open(ROOT / ".venv.lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("Another run is setting up .venv; waiting for it ...", file=sys.stderr)
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _call(command: list[str]) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
