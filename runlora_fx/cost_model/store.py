"""Store: measured times on disk, as JSON files in the platform's cache folder.

Example: ``nvidia-a100-sxm4-40gb-8-0-bfloat16-1f0c...json`` has the calibrated and measured times
for one device, dtype, version of torch and combination of settings.

Invariant: :func:`load` never raises. A file that is damaged, from another version or not ours
counts as absent. Files are written atomically and merged under a lock between processes. Their size
and number are limited.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from runlora_fx.cost_model.cost import TERMS
from runlora_fx.cost_model.ops import GemmShape, MergeShape, Shape
from runlora_fx.cost_model.profile import MachineProfile

_log = logging.getLogger("runlora_fx")

#: The environment variable that names another folder for the files.
FOLDER_VARIABLE = "RUNLORA_CACHE_DIR"

_FORMAT = 3
_MAX_ENTRIES = 4096
_MAX_FILES = 64
_MAX_FILE_BYTES = 4 << 20
_MAX_SIZE = (1 << 63) - 1
_LOCK_TIMEOUT_S = 10.0

#: The errors that reading a damaged or foreign file raises.
_UNREADABLE = (
    *(OSError, ValueError, TypeError, LookupError),
    *(AttributeError, RecursionError),
)

#: The age at which a temporary file counts as abandoned by a process that was killed [s].
_ABANDONED_S = 3600.0


class Key(NamedTuple):
    """What stored times are valid for.

    Attributes:
        device: The model of the device.
        dtype: The dtype of the elements, as torch names it.
        torch: The version of torch.
        settings: The settings of the process that change times: ``name=value``, sorted.
    """

    device: str
    dtype: str
    torch: str
    settings: str

    @property
    def file_name(self) -> str:
        """A readable name with a digest, different for every key."""
        digest = hashlib.sha256(json.dumps(self).encode()).hexdigest()[:12]
        readable = re.sub(r"[^A-Za-z0-9]+", "-", f"{self.device}-{self.dtype}").strip("-").lower()
        return f"{readable[:80]}-{digest}.json"


@dataclass(frozen=True)
class Record:
    """The stored times for a key.

    Attributes:
        seconds_per: By term, the calibrated time of one unit [s]; empty if never calibrated.
        products: Measured times of single products and merges [s], the latest last.
        plans: By problem and plan, measured times of whole plans [s]
            (:mod:`runlora_fx.passes.tune.trials`).
    """

    seconds_per: Mapping[str, float] = field(default_factory=dict)
    products: Mapping[Shape, float] = field(default_factory=dict)
    plans: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def profile(self, default: MachineProfile) -> MachineProfile:
        """The profile: calibrated times, the default's where there are none, measured products."""
        known = {**default.known, **self.seconds_per}
        return MachineProfile(known, tuple(sorted(self.products.items())))

    def updated(self, newer: Record) -> Record:
        """Both records merged: newer numbers win, and beyond a limit the oldest are dropped."""
        products = {k: v for k, v in self.products.items() if k not in newer.products}
        plans = {k: v for k, v in self.plans.items() if k not in newer.plans}
        return Record(
            seconds_per=newer.seconds_per or self.seconds_per,
            products=_latest({**products, **newer.products}),
            plans=_latest({**plans, **newer.plans}),
        )

    @property
    def digest(self) -> str:
        """A digest of all numbers, whatever the order in which they were added."""
        content = _to_json(self)
        content["products"].sort()
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def folder() -> Path:
    """The folder of the files: ``$RUNLORA_CACHE_DIR``, or else the platform's cache folder."""
    given = os.environ.get(FOLDER_VARIABLE)
    return Path(given) if given else user_cache_path("runlora-fx")


def load(key: Key) -> Record:
    """The record of a key; an empty one if there is no file, or no readable one."""
    path = folder() / key.file_name
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ValueError("larger than any file of ours")
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT or Key(**content["key"]) != key:
            raise ValueError("made by another version, or for another machine")
        return _from_json(content)
    except (FileNotFoundError, NotADirectoryError):
        return Record()
    except _UNREADABLE as error:
        _warn(f"runlora ignores its cache file {path}: {type(error).__name__}: {error}")
        return Record()


def fault_of(path: Path) -> str:
    """Why :func:`load` would not read a file of the folder; empty if it would."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            return "made by another version"
        Key(**content["key"])
        _from_json(content)
    except _UNREADABLE as error:
        return f"{type(error).__name__}: {error}"
    return ""


def add(key: Key, newer: Record) -> Record:
    """Merge a record into the stored one of a key, and return the merged record.

    If the folder cannot be written to, a warning is logged and nothing is stored.
    """
    path = folder() / key.file_name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock"), timeout=_LOCK_TIMEOUT_S):
            updated = load(key).updated(newer)
            write_json(path, {"format": _FORMAT, "key": key._asdict(), **_to_json(updated)})
            _tidy(path.parent)
        return updated
    except (OSError, Timeout) as error:
        _warn(f"runlora cannot keep its measurements in {path.parent}: {error}")
        return load(key).updated(newer)


def as_text(record: Record) -> str:
    """A record as text, for another process."""
    return json.dumps(_to_json(record))


def from_text(text: str) -> Record:
    """The record that :func:`as_text` wrote.

    Raises:
        ValueError, TypeError, LookupError, AttributeError: If it did not.
    """
    return _from_json(json.loads(text))


def write(path: Path, records: Mapping[str, Record]) -> None:
    """Write records by dtype into a separate file, for another machine to read.

    Raises:
        OSError: If the file cannot be written.
    """
    dtypes = {dtype: _to_json(record) for dtype, record in records.items()}
    write_json(path, {"format": _FORMAT, "dtypes": dtypes})


def read(path: str | Path) -> dict[str, Record]:
    """The records by dtype of a file that :func:`write` wrote; at least one.

    Raises:
        ValueError: If the file is not such a file, or has no record.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError("made by another version")
        records = {str(dtype): _from_json(part) for dtype, part in content["dtypes"].items()}
    except _UNREADABLE as error:
        raise ValueError(
            f"must be a file that `calibrate --export` wrote, not {path}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not records:
        raise ValueError(f"must be a file that `calibrate --export` wrote; {path} has no dtype")
    return records


@lru_cache(maxsize=1024)
def _warn(message: str) -> None:
    """Log a warning once, although every compilation reads the files again."""
    _log.warning("%s", message)


def _to_json(record: Record) -> dict[str, Any]:
    return {
        "seconds_per": dict(record.seconds_per),
        "products": [[list(map(int, shape)), time] for shape, time in record.products.items()],
        "plans": {problem: dict(times) for problem, times in record.plans.items()},
    }


def _from_json(content: Mapping[str, Any]) -> Record:
    """A record from the content of a file.

    Raises:
        ValueError: If a number is not valid.
        TypeError, LookupError, AttributeError: If the content is not structured as expected.
    """
    seconds_per = {term: _positive(time) for term, time in content["seconds_per"].items()}
    unknown = [term for term in seconds_per if term not in TERMS or not TERMS[term].is_timed]
    if unknown:
        raise ValueError(f"has the unknown terms {unknown!r:.80}")
    products = {_shape(shape): _positive(seconds) for shape, seconds in content["products"]}
    plans = {
        str(problem): {str(plan): _positive(seconds) for plan, seconds in times.items()}
        for problem, times in content["plans"].items()
    }
    return Record(seconds_per, _latest(products), _latest(plans))


def _shape(numbers: list[Any]) -> Shape:
    is_merge = len(numbers) == len(MergeShape._fields)
    *sizes, last = numbers if is_merge else numbers[:-1]
    if not all(type(size) is int and 0 < size <= _MAX_SIZE for size in sizes):
        raise ValueError(f"has a product of the sizes {numbers}")
    if is_merge:
        rows, cols, rank = sizes
        return MergeShape(rows, cols, rank, bool(last))
    b, m, k, n = sizes
    return GemmShape(b, m, k, n, bool(last), bool(numbers[-1]))


def _positive(x: Any) -> float:
    # Compared before the conversion: an integer may be too large for a float.
    if isinstance(x, bool) or not isinstance(x, int | float) or not 0 < x <= sys.float_info.max:
        raise ValueError(f"{x!r:.40} is not a positive number")
    return float(x)


def _latest(entries: dict[Any, Any]) -> dict[Any, Any]:
    return dict(list(entries.items())[-_MAX_ENTRIES:])


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON as :func:`write_text` does."""
    write_text(path, json.dumps(content))


def write_text(path: Path, text: str) -> None:
    """Write a file so that readers see the old content or the new one, never a part of it.

    Raises:
        OSError: If it cannot be written.
    """
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=path.stem, suffix=".tmp", delete=False, encoding="utf-8"
    ) as file:
        temporary = Path(file.name)
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            file.close()  # some systems rename no open file
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def drop_oldest(of: Path, pattern: str, most: int) -> list[Path]:
    """Delete the oldest files of a folder.

    Args:
        of: The folder.
        pattern: What the names of the files match.
        most: How many files are left.

    Returns:
        The files that were deleted.
    """
    oldest = sorted(of.glob(pattern), key=_modified)[:-most]
    for path in oldest:
        path.unlink(missing_ok=True)
    return oldest


def _tidy(of: Path) -> None:
    """Delete the oldest files beyond the limit, and abandoned temporary files."""
    for path in drop_oldest(of, "*.json", _MAX_FILES):
        path.with_suffix(".lock").unlink(missing_ok=True)
    for path in of.glob("*.tmp"):
        if _modified(path) < time.time() - _ABANDONED_S:
            path.unlink(missing_ok=True)


def _modified(path: Path) -> float:
    """When a file was last written; long ago if another process has just removed it."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
