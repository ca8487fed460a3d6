"""The user's cache on the disk: where it is, and how its entries are kept from growing without end.

Tokenized data and quantized models lie in it, each kind in a folder of its own, each entry in one below that.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """The folder `kind` in $LORAFIT_CACHE, or in lorafit/ in the user's cache folder."""
    root = os.environ.get("LORAFIT_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lorafit")
    return Path(os.path.expanduser(root)) / kind


def forget_oldest(folder: Path, keep: Path, limit: int) -> None:
    """Remove the entries that were not used for longest until `limit` bytes are left; never `keep`."""
    entries = [path for path in folder.iterdir() if path.is_dir()]  # drafts of a process that was killed are among them
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in entries}
    total = sum(sizes.values())
    for path in sorted(entries, key=lambda entry: entry.stat().st_mtime):
        if total <= limit:
            return
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)
            total -= sizes[path]
