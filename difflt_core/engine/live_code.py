"""Whether the code in this process is still what was imported. A stage's version is read from the files, so
the result of a function that a notebook has put in the place of another would be kept under its name."""

import inspect
import sys
from collections.abc import Callable

from .code_version import Chosen, used_by

__all__ = ["refuse_replaced", "remember"]

_PACKAGE = __name__.partition(".")[0]
_imported: dict[str, dict[str, tuple]] = {}  # by module and name


def remember() -> None:
    """Note what the names of the package's modules stand for now, at the end of its import."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == _PACKAGE and name not in _imported:
            _imported[name] = {key: _parts(value) for key, value in vars(module).items()}


def refuse_replaced(build_function: Callable, chosen: Chosen | None = None) -> None:
    """Raise where something that a stage uses is another than it was at import.

    Args:
        build_function, chosen: as for code_version.used_by.

    Raises:
        ValueError: names it, and says what to do instead.
    """
    remember()  # modules that came later
    for key in used_by(build_function, chosen):
        module, _, name = key.partition(":")
        known = _imported.get(module, {}).get(name)
        if known and not _same(known, _parts(getattr(sys.modules[module], name, None))):
            raise ValueError(
                f"{module}.{name} was replaced in this process (by an assignment, or by %autoreload after an "
                "edit), and its results would be kept as those of the file. Write it in the file (a new "
                "function under a name of its own trains the least anew: CONTRIBUTING.md) and restart the kernel"
            )


def _parts(value) -> tuple:
    """A value, and what can be replaced inside it: a function's code, the attributes of a class of ours (others
    note something in theirs as they run), a table's entries."""
    if inspect.isclass(value) and value.__module__.partition(".")[0] == _PACKAGE:
        return (value, *(part for v in vars(value).values() for part in (v, _code(v))))
    if isinstance(value, dict):
        return (value, *value, *value.values())
    return value, _code(value)


def _code(value):
    """Of a function, below its decorators."""
    value = getattr(value, "__func__", getattr(value, "fget", value))
    return getattr(inspect.unwrap(value) if callable(value) else value, "__code__", None)


def _same(a: tuple, b: tuple) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
