"""Folders of caches: where they are, how large, and whether they can be used.

Before -> after: a folder with a damaged profile -> a warning that names the file.

Invariant: a folder is only looked at. One that does not exist yet is fine if it can be made.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from runlora_fx.cli.doctor.finding import Finding
from runlora_fx.cost_model import store

#: The most files that are counted; more are called so.
_MOST_FILES = 100_000


def folder_finding(name: str, folder: Path, variable: str) -> Finding:
    """A folder of a cache.

    Args:
        name: Whose it is.
        folder: The folder.
        variable: The environment variable that names another one.
    """
    if not _is_writable(folder):
        remedy = f"make it writable, or name another folder in {variable}"
        return Finding("caches", name, "problem", f"{folder} cannot be written to", remedy)
    if not folder.exists():
        return Finding("caches", name, "ok", f"{folder} (not there yet)")
    sizes = [_size(path) for path in islice(_files(folder), _MOST_FILES)]
    more = "more than " if len(sizes) == _MOST_FILES else ""
    size = sum(sizes) / 1e6
    text = f"{folder}, writable, {more}{len(sizes)} files, {more}{size:.1f} MB"
    return Finding("caches", name, "ok", text)


def profiles_folder() -> Iterator[Finding]:
    """The folder of the measured profiles, and the files in it that cannot be used."""
    folder = store.folder()
    yield folder_finding("runlora", folder, store.FOLDER_VARIABLE)
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        fault = store.fault_of(path)
        if fault:
            remedy = f"delete it, and run `runlora calibrate`: rm '{path}'"
            yield Finding("caches", path.name, "warning", f"is not used: {fault}", remedy)


def _is_writable(folder: Path) -> bool:
    """True if files can be made in a folder, or in the first of its parents that exists."""
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _files(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (Path(root, name) for name in names)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # removed meanwhile
        return 0
