"""The version of a stage's code: a hash of every definition that its function uses, near or far.

Followed are names, not modules: a stage that loads a classifier does not depend on how one is
trained. What cannot be followed is refused, since a result would be reused after its code changed.
The package's files are read when this one is imported, others once per process. A local variable
that is called like a definition counts as a use of it: too much is followed rather than too little.
"""

import ast
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from .syntax import Import, Module, find_file, meaning, read_module, uses

__all__ = ["NO_RESULT", "Chosen", "closure", "code_version", "used_by"]

# Modules that decide no result: settings are hashed by value, the rest stores, shows, shares work.
NO_RESULT = frozenset(
    {
        "difflt_core.config",
        "difflt_core.engine.code_version",
        "difflt_core.engine.syntax",
        "difflt_core.engine.live_code",
        "difflt_core.engine.parallel",
        "difflt_core.engine.progress",
        "difflt_core.engine.provenance",
        "difflt_core.reporting.items",
        "difflt_core.engine.artifacts",
        "difflt_core.engine.chunks",
        "difflt_core.engine.files",
    }
)
_PACKAGE = Path(__file__).resolve().parent.parent
_DYNAMIC = ("importlib", "builtins", "runpy", "sys.modules")
_HARMLESS = ("importlib.metadata", "importlib.resources", "importlib.util.find_spec")
_BUILTINS = {"__import__", "eval", "exec", "globals"}


Chosen = Mapping[str, str | tuple[str, ...]]


def code_version(build_function: Callable, chosen: Chosen | None = None) -> str:
    """12 hex digits that change when a definition that the function uses changes.

    Docstrings, comments and `__all__` do not count; bare statements of the modules it imports do.
    Arguments and errors: as of used_by.
    """
    found = json.dumps(used_by(build_function, chosen), sort_keys=True)
    return hashlib.sha256(found.encode()).hexdigest()[:12]


def used_by(build_function: Callable, chosen: Chosen | None = None) -> dict[str, list]:
    """All that a function uses, as closure gives it.

    Args:
        build_function: a function of a file, of this package or not. Of a file outside, what is
            there and what leads into the package is followed; of a nested function, all of the
            function around it.
        chosen: dispatch tables of which some entries are used: {"package.module.TABLE": key or keys}.

    Raises:
        ValueError: an import that leads nowhere, code that is found by other means than a name, a
            table without the key; says where and what to do.
    """
    function = inspect.unwrap(build_function)
    path = Path(function.__code__.co_filename) if inspect.isfunction(function) else Path()
    name = getattr(function, "__qualname__", "").partition(".")[0]
    if not path.is_file() or name == "<lambda>":
        raise ValueError(
            f"stage: expected a function of a file, got {build_function!r}; write a def in a module"
        )
    return closure(_PACKAGE, path.resolve(), name, tuple(sorted((chosen or {}).items())))


@functools.cache
def closure(
    root: Path, path: Path, name: str, chosen: tuple = (), excluded: frozenset = NO_RESULT
) -> dict[str, list]:
    """{"module:name": its syntax} of all that a definition uses; "module:" has bare statements.

    Args:
        root: folder of the package. path: the file of the definition. chosen: pairs (table, key).
    """
    gone = sorted(n for n in excluded if not find_file(root, n))
    if gone:
        raise ValueError(
            f"NO_RESULT: expected modules of {root}, got {gone}; take it out or move it"
        )
    walk = _Walk(root, dict(chosen), excluded)
    walk.start(path, name)
    unmet = sorted(walk.chosen.keys() - walk.met)
    if unmet:
        raise ValueError(f"chosen: {unmet} of {path}:{name} were never met; correct the full name")
    return walk.found


class _Walk:
    def __init__(self, root: Path, chosen: Chosen, excluded: frozenset):
        self.root, self.chosen, self.excluded = root, chosen, excluded
        self.found: dict[str, list] = {}
        self.met: set[str] = set()
        self._visited: set[str] = set()
        self._seen: set[tuple] = set()
        self._todo: list[tuple[Module, ast.AST]] = []

    def start(self, path: Path, name: str) -> None:
        if path.is_relative_to(self.root):
            parts = path.relative_to(self.root.parent).with_suffix("").parts
            module = self._enter(".".join(p for p in parts if p != "__init__"), str(path))
        else:
            module = read_module(f"<{path.stem}>", path, "")
            self._visit(module)
        if module is None or name not in module.bound:
            raise ValueError(
                f"{path}: expected a module with a definition {name!r}; write one there"
            )
        self._reach(module, name, ())
        while self._todo:
            self._follow(*self._todo.pop())

    def _visit(self, module: Module) -> None:
        """What an import of the module runs: its bare statements, and those of what it imports."""
        if module.name not in self._visited:
            self._visited.add(module.name)
            if module.bare:
                self.found[f"{module.name}:"] = [meaning(s) for s in module.bare]
            self._todo += [(module, statement) for statement in module.bare]
            for found in module.imports:
                self._import(found, f"{module.path}:{found.line}")

    def _enter(self, name: str, where: str) -> Module | None:
        """The visited module of a dotted name of this package; None for an excluded one."""
        if name in self.excluded:
            return None
        if name.rpartition(".")[0]:
            self._enter(name.rpartition(".")[0], where)
        path = find_file(self.root, name)
        if path is None:
            _refuse(where, f"no file for the module {name}", "correct the import")
        is_package = path.name == "__init__.py"
        module = read_module(name, path, name if is_package else name.rpartition(".")[0])
        self._visit(module)
        return module

    def _inside(self, name: str) -> bool:
        return name.partition(".")[0] == self.root.name

    def _import(self, found: Import, where: str) -> None:
        """What an import statement runs, whether or not its name is used."""
        if found.module.startswith("."):
            _refuse(where, "a relative import from above the package", "correct the import")
        if not self._inside(found.module):
            return
        if found.name == "*":
            _refuse(where, f"import '*' from {found.module}", "name what is imported")
        module = self._enter(found.module, where)
        if module and found.name and not _binds(module, found.name):
            if find_file(self.root, f"{module.name}.{found.name}"):
                self._enter(f"{module.name}.{found.name}", where)

    def _follow(self, module: Module, node: ast.AST) -> None:
        """Reach all that a piece of code names."""
        imports, names = uses(node, module.package)
        for found in imports:
            self._import(found, f"{module.path}:{found.line}")
        for name, attributes, line in names:
            where = f"{module.path}:{line}"
            if name in _BUILTINS and name not in module.bound:
                _refuse(where, f"{name}()", "name what is used")
            for found in imports:
                if found.binds == name:
                    self._use(found, attributes, where)
            if name in module.bound:
                self._reach(module, name, attributes, where)

    def _use(self, found: Import, attributes: tuple, where: str) -> None:
        """Reach what an imported name, or an attribute of an imported module, stands for."""
        attributes = (found.name, *attributes) if found.name else attributes
        if self._inside(found.module):
            module = self._enter(found.module, where)
            if module:
                self._attribute(module, attributes, where)
            return
        dotted = ".".join((found.module, *attributes)) + "."
        if any(dotted.startswith(f"{n}.") for n in _DYNAMIC):
            if not any(dotted.startswith(f"{n}.") for n in _HARMLESS):
                _refuse(where, f"code found by {dotted[:-1]}", "import what is used by name")

    def _attribute(self, module: Module, attributes: tuple, where: str) -> None:
        if not attributes:
            _refuse(where, f"module {module.name} as a value", "write module.name, or import names")
        first, rest = attributes[0], attributes[1:]
        if _binds(module, first):
            self._reach(module, first, rest, where)
        elif find_file(self.root, f"{module.name}.{first}"):
            deeper = self._enter(f"{module.name}.{first}", where)
            if deeper:
                self._attribute(deeper, rest, where)
        elif first not in ("__file__", "__name__"):
            _refuse(where, f"{module.name} defines no {first!r}", "import it where it is defined")

    def _reach(self, module: Module, name: str, attributes: tuple, where: str = "") -> None:
        """Count a name of a module's top level, and follow it."""
        if (module.name, name, attributes) in self._seen:
            return
        self._seen.add((module.name, name, attributes))
        key, full, bindings = f"{module.name}:{name}", f"{module.name}.{name}", module.bound[name]
        if full in self.chosen:
            self.met.add(full)
            keys = self.chosen[full]
            bindings = _entries(module, name, (keys,) if isinstance(keys, str) else keys)
        if key not in self.found:
            self.found[key] = [meaning(b) for b in bindings]
            self._todo += [(module, b) for b in bindings if isinstance(b, ast.AST)]
        for binding in bindings:
            if isinstance(binding, Import):
                self._use(binding, attributes, where)


def _binds(module: Module, name: str) -> bool:
    """Whether an attribute is the module's own: `from . import name` in a package is of a file."""
    own = (b for b in module.bound.get(name, ()) if isinstance(b, ast.AST))
    others = (b for b in module.bound.get(name, ()) if isinstance(b, Import))
    return any(own) or any((b.module, b.name) != (module.name, name) for b in others)


def _entries(module: Module, table: str, chosen: tuple[str, ...]) -> list[ast.AST]:
    """The values of some keys in a module-level dict, in its order."""
    first, *more = module.bound[table]
    value = getattr(first, "value", None)
    keys = value.keys if isinstance(value, ast.Dict) and not more else [None]
    line = getattr(first, "lineno", 1)
    where, names = f"{module.path}:{line}", [getattr(k, "value", None) for k in keys]
    if not all(isinstance(name, str) for name in names):
        _refuse(where, f"{table}: expected a dict literal with strings as keys", "write it as one")
    for key in chosen:
        if key not in names:
            _refuse(where, f"{table}: expected one of {names}, got {key!r}", "choose one of them")
    return [v for name, v in zip(names, value.values, strict=True) if name in chosen]


def _refuse(where: str, what: str, remedy: str):
    raise ValueError(f"{where}: {what}; the version of a stage cannot follow it: {remedy}")
