"""One page of everything a profile has made, runs/<profile>/index.html: nothing from outside, and
every link relative, so that the folder can be moved and opened from disk. Its one script sorts tables."""

import html
import json
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, Template

from ..engine.files import atomic_write

__all__ = ["write_page"]

_KINDS = ("png", "pdf", "csv", "md", "tex", "json")  # of an item's files, as they are linked


def write_page(notebooks: list, out: Path, profile: str) -> Path:
    """Write the page of a profile from the files that are there, and return its path.

    Args:
        notebooks: all of them, in the order of the page, each a `notebooks.Notebook`.
        out: folder that holds runs/ and figures/. The same files give the same bytes.
    """
    runs, figures = Path(out) / "runs" / profile, Path(out) / "figures" / profile
    shown = [
        {**_state(runs, n), "number": n.number, "items": [_item(figures, i) for i in n.items]}
        for n in notebooks
    ]
    items = [item for notebook in shown for item in notebook["items"]]
    records = [item["record"] for item in items if item["record"]]
    page = _template().render(
        profile=profile,
        claims=_item(figures, "claims"),
        notebooks=shown,
        items=items,
        records=records,
        stages={name: s for r in records for name, s in r["artifacts"].items()},
    )
    atomic_write(runs / "index.html", page)
    return runs / "index.html"


def _template() -> Template:
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # captions, class and file names are data
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    pages.filters |= {"duration": _duration, "short": _short}
    return pages.get_template("page.html")


def _state(runs: Path, notebook) -> dict:
    """Of a notebook's last run here: its seconds, or its error, or neither when it has not run."""
    name = notebook.path.stem
    executed, done = _json(runs / notebook.path.name), _json(runs / f"{name}.done.json")
    outputs = [o for c in (executed or {}).get("cells", ()) for o in c.get("outputs", ())]
    errors = [o for o in outputs if o["output_type"] == "error"]
    return {
        "name": name,
        "error": "{ename}: {evalue}".format(**errors[0]).splitlines()[0] if errors else "",
        "elapsed_s": done["elapsed_s"] if done and not errors else None,
        "html": f"{name}.html" if (runs / f"{name}.html").exists() else "",
    }


def _item(figures: Path, name: str) -> dict:
    """An item's provenance (None when it is not made), the kinds of its files, its table's rows."""
    kinds = [kind for kind in _KINDS if (figures / f"{name}.{kind}").exists()]
    text = (figures / f"{name}.md").read_text(encoding="utf-8") if "md" in kinds else ""
    lines = [re.split(r"(?<!\\)\|", row[1:-1]) for row in text.splitlines() if row.startswith("|")]
    lines = lines[:1] + lines[2:]  # without the rule below the head
    rows = [[html.unescape(cell.replace("\\|", "|")) for cell in line] for line in lines]
    return {"name": name, "record": _json(figures / f"{name}.json"), "kinds": kinds, "rows": rows}


def _json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _short(commit: str) -> str:
    head, sign, changed = commit.partition("-")
    return head[:12] + sign + changed or "unknown"
