"""Small folders of digits, for smoke and demo runs of the notebooks that read image files."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from ..config import DataConfig, RunConfig
from ..engine.code_version import code_version
from ..engine.files import new_folder
from ..engine.provenance import ROOT

__all__ = ["sample_folder"]


def sample_folder(
    kind: str, config: RunConfig, out: Path | str, write: Callable[[Path, DataConfig, int], None]
) -> Path:
    """out/runs/<kind>-<hash of the data's settings and of the code that writes them>: found, or written
    whole. Of several that ask at once, one writes it.

    Args:
        out: as for Pipeline. write: of (folder, data, data_seed).
    """
    written = [config.data.model_dump(mode="json"), config.data_seed, code_version(write)]
    facts = json.dumps(written, sort_keys=True)
    name = hashlib.sha256(facts.encode()).hexdigest()[:8]
    folder = Path(out or ROOT) / "runs" / f"{kind}-{name}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            with new_folder(folder) as work:
                write(work, config.data, config.data_seed)
    return folder
