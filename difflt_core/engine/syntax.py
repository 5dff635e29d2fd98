"""What one Python file binds, runs and names, read from its syntax tree, without importing it."""

import ast
import functools
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Import", "Module", "find_file", "meaning", "read_module", "uses"]

_IMPORTS = (ast.Import, ast.ImportFrom)
_DEFS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_PACKAGE = Path(__file__).resolve().parent.parent
# As this process imported it: an edit changes the key of no code that was there before.
_AT_IMPORT = {path: path.read_text(encoding="utf-8") for path in _PACKAGE.rglob("*.py")}


@dataclass(frozen=True)
class Import:
    """`import module`, or `from module import name`, which binds a name in its file. module begins
    with a dot where it is above the package, and with <outside> beside a file of no package."""

    binds: str
    module: str
    name: str | None
    line: int


class Module:
    """What each name of a file's top level is bound to, and its bare statements, which are neither
    definitions nor imports. Docstrings, `__all__` and `if __name__ == "__main__"` are left out.

    Args:
        name: in full. package: what relative imports start from, "" outside of one.
    """

    def __init__(self, name: str, path: Path, package: str):
        self.name, self.path, self.package = name, path, package
        self.bound: dict[str, list[ast.stmt | Import]] = {}
        self.bare: list[ast.stmt] = []
        text = _AT_IMPORT.get(path) or path.read_text(encoding="utf-8")
        for statement in ast.parse(text, str(path)).body:
            names = _names_bound(statement)
            if names == {"__all__"} or _is_text(statement) or _is_main(statement):
                continue
            for bound in names:
                self.bound.setdefault(bound, []).append(statement)
            if not _is_definition(statement):
                for found in uses(statement, package)[0]:
                    self.bound.setdefault(found.binds, []).append(found)
                if not isinstance(statement, _IMPORTS):
                    self.bare.append(statement)
        self.imports = [b for found in self.bound.values() for b in found if isinstance(b, Import)]


@functools.cache
def read_module(name: str, path: Path, package: str) -> Module:
    """A Module, read once per process."""
    return Module(name, path, package)


@functools.cache
def find_file(root: Path, name: str) -> Path | None:
    """The file of a dotted module name of the package whose folder is root."""
    path = root.parent.joinpath(*name.split("."))
    files = (path / "__init__.py", path.with_name(f"{path.name}.py"))
    return next((file for file in files if file.is_file()), None)


@functools.cache
def uses(node: ast.AST, package: str) -> tuple[list[Import], list[tuple[str, tuple, int]]]:
    """The imports in a piece of code, and its dotted names with their lines: a.b.c(d) has
    ("a", ("b", "c"), 1) and ("d", (), 1)."""
    imports, names, todo = [], [], [node]
    while todo:
        node = todo.pop()
        base, attributes = node, ()
        while isinstance(base, ast.Attribute):
            base, attributes = base.value, (base.attr, *attributes)
        if isinstance(base, ast.Name):
            if not isinstance(base.ctx, ast.Store):
                names.append((base.id, attributes, base.lineno))
        elif isinstance(node, ast.Global):
            names += [(name, (), node.lineno) for name in node.names]
        elif isinstance(node, _IMPORTS):
            imports += _imported(node, package)
        else:
            todo += ast.iter_child_nodes(node)
    return imports, names


@functools.cache
def meaning(binding: ast.AST | Import) -> object:
    """As JSON: what an import is of, or a syntax tree without places and docstrings.

    The same in Python 3.11 to 3.14, which ast.dump (it shows empty fields in some) and ast.unparse
    (it writes some code in another way since 3.12) are not.
    """
    if isinstance(binding, Import):
        return f"{binding.module}.{binding.name}" if binding.name else binding.module
    return _tree(binding)


def _tree(node: object) -> object:
    if not isinstance(node, ast.AST):
        return ascii(node)
    fields = {}
    for name, value in ast.iter_fields(node):
        if isinstance(value, list):
            value = [_tree(item) for item in value if not (_is_text(item) or _is_empty(node, item))]
            if value:
                fields[name] = value
        elif value is not None and name not in ("ctx", "kind", "type_comment"):
            fields[name] = _tree(value)
    return {type(node).__name__: fields}


def _names_bound(statement: ast.stmt) -> set[str]:
    if isinstance(statement, _DEFS):
        return {statement.name}
    nodes = list(ast.walk(statement))
    stored = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return stored | {n.name for n in nodes if isinstance(n, _DEFS)}


def _is_definition(statement: ast.stmt) -> bool:
    """A def, a class, or an assignment to nothing but names."""
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = getattr(statement, "targets", None) or [statement.target]
        inside = (node for target in targets for node in ast.walk(target))
        return not any(isinstance(node, ast.Attribute | ast.Subscript) for node in inside)
    return isinstance(statement, _DEFS)


def _is_text(node: object) -> bool:
    is_constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_constant and isinstance(node.value.value, str)


def _is_main(statement: ast.stmt) -> bool:
    """`if __name__ == "__main__":`, which no import runs."""
    test = statement.test if isinstance(statement, ast.If) and not statement.orelse else None
    return test is not None and ast.unparse(test) == "__name__ == '__main__'"


def _is_empty(node: ast.AST, item: object) -> bool:
    """The nothing that Python 3.12 puts at the end of a nested format, as in f"{x:{width}}"."""
    is_constant = isinstance(node, ast.JoinedStr) and isinstance(item, ast.Constant)
    return is_constant and item.value == ""


def _imported(node: ast.Import | ast.ImportFrom, package: str) -> list[Import]:
    found = []
    for alias in node.names:
        if isinstance(node, ast.ImportFrom):
            module = _absolute(node, package)
            found.append(Import(alias.asname or alias.name, module, alias.name, node.lineno))
        elif alias.asname:
            found.append(Import(alias.asname, alias.name, None, node.lineno))
        else:  # `import a.b` binds a, and runs a.b
            first = alias.name.partition(".")[0]
            found.append(Import(first, first, None, node.lineno))
            found.append(Import(alias.name, alias.name, None, node.lineno))
    return found


def _absolute(node: ast.ImportFrom, package: str) -> str:
    """The full name of the module that an import is from."""
    if not node.level:
        return node.module
    if not package:
        return f"<outside>.{node.module}"
    parts = package.split(".")
    base = parts[: len(parts) - node.level + 1] if node.level <= len(parts) else [""]
    return ".".join([*base, node.module or ""]).rstrip(".") or "."
