"""Stored measurements: what is read back, what is refused, and several processes at once.

The folder is a new one in every test. Processes are real ones, and so is their being killed.
"""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from runlora_fx.cost_model import store
from runlora_fx.cost_model.ops import GemmShape
from runlora_fx.cost_model.profile import DEFAULT_PROFILE, MachineProfile
from runlora_fx.cost_model.store import FOLDER_VARIABLE, Key, Record

KEY = Key("a device 9.0", "float32", "2.13.0", "threads=2")
UNITS = {
    "flops.nn": 1e-11,
    "flops.nt": 1.5e-11,
    "flops.tn": 2e-11,
    "read": 5e-11,
    "written": 6e-11,
    "elementwise": 3e-11,
    "launches": 2.0e-6,
}
SHAPE = GemmShape(1, 8, 16, 32, False, True)
FULL = Record(UNITS, {SHAPE: 1.25e-6}, {"a problem": {"as it came": 2e-5, "a plan": 1e-5}})

pytestmark = pytest.mark.usefixtures("no_profile")


def file_of(key: Key) -> Path:
    return store.folder() / key.file_name


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def shapes(start: int, count: int) -> dict[GemmShape, float]:
    return {GemmShape(1, size, 2, 3): size * 1e-6 for size in range(start, start + count)}


# --- round trip and key


def test_what_was_added_is_read_back_and_nothing_else_is(caplog: pytest.LogCaptureFixture) -> None:
    assert store.load(KEY) == Record()
    assert store.add(KEY, FULL) == FULL
    assert store.load(KEY) == FULL
    assert store.load(KEY).profile(DEFAULT_PROFILE) == MachineProfile(UNITS, ((SHAPE, 1.25e-6),))
    assert not warnings(caplog)


@pytest.mark.parametrize(
    "change",
    (
        {"device": "a device 9.1"},
        {"dtype": "bfloat16"},
        {"torch": "2.13.0+cpu"},
        {"settings": "threads=1"},
    ),
    ids=lambda change: next(iter(change)),
)
def test_each_device_dtype_version_and_setting_has_its_own(change: dict[str, Any]) -> None:
    other = KEY._replace(**change)
    store.add(KEY, FULL)
    assert store.load(other) == Record()
    store.add(other, Record(products={SHAPE: 9.0}))
    assert store.load(KEY) == FULL
    assert store.load(other) == Record(products={SHAPE: 9.0})


def test_names_of_devices_become_names_of_files() -> None:
    key = KEY._replace(device="../GPU/:*? " + "é" * 300)
    store.add(key, FULL)
    assert [path.parent for path in store.folder().glob("**/*.json")] == [store.folder()]
    assert len(file_of(key).name) < 128
    assert store.load(key) == FULL


def test_layouts_are_different_products() -> None:
    turned = SHAPE._replace(right_turned=False)
    store.add(KEY, Record(products={SHAPE: 1.0, turned: 2.0}))
    assert store.load(KEY).products == {SHAPE: 1.0, turned: 2.0}


def test_newer_numbers_replace_older_ones_and_the_others_stay() -> None:
    store.add(KEY, FULL)
    other = GemmShape(2, 3, 4, 5)
    store.add(KEY, Record(products={other: 3.0, SHAPE: 4.0}, plans={"a problem": {"x": 1.0}}))
    found = store.load(KEY)
    assert found.seconds_per == UNITS
    assert found.products == {SHAPE: 4.0, other: 3.0}
    assert found.plans == {"a problem": {"x": 1.0}}


def test_the_folder_is_the_platforms_unless_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store.folder() == tmp_path
    monkeypatch.setenv(FOLDER_VARIABLE, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store.folder().name == "runlora-fx"
    if sys.platform == "linux":
        assert store.folder() == tmp_path / "xdg" / "runlora-fx"
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "not" / "there"))
    store.add(KEY, FULL)
    assert (tmp_path / "not" / "there" / KEY.file_name).exists()


def test_a_term_that_was_not_fitted_takes_the_time_of_the_default() -> None:
    some = {"flops.nn": 1e-11, "launches": 2e-6}
    store.add(KEY, Record(some))
    assert store.load(KEY) == Record(some)
    default = MachineProfile({"flops.nn": 1.0, "read": 3.0})
    assert store.load(KEY).profile(default) == MachineProfile({**some, "read": 3.0})


# --- files that are not as they should be


def content(**changes: Any) -> dict[str, Any]:
    whole = {
        "format": 3,
        "key": KEY._asdict(),
        "seconds_per": dict(UNITS),
        "products": [[list(map(int, SHAPE)), 1.25e-6]],
        "plans": {"a problem": {"as it came": 2e-5, "a plan": 1e-5}},
    }
    return {**whole, **changes}


def test_the_content_that_the_bad_ones_are_made_of_is_good() -> None:
    file_of(KEY).write_text(json.dumps(content()), encoding="utf-8")
    assert store.load(KEY) == FULL


SIZES = list(map(int, SHAPE))
WHOLE = json.dumps(content())
BAD: dict[str, bytes] = {
    "empty": b"",
    "half of it": WHOLE[: len(WHOLE) // 2].encode(),
    "not text": b"\xff\xfe\x00\x80" * 9,
    "a pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "another value": b"[1, 2]",
    "null": b"null",
    "without a part": json.dumps({"format": 3, "key": KEY._asdict()}).encode(),
    "deeply nested": b"[" * 200_000,
    "larger than any": WHOLE.encode() + b" " * (4 << 20),
    **{
        name: json.dumps(content(**changes)).encode()
        for name, changes in {
            "another format": {"format": 2},
            "of another version": {"key": {**KEY._asdict(), "torch": "2.12.0"}},
            "of another machine": {"key": {**KEY._asdict(), "device": "another"}},
            "an unknown key": {"key": {**KEY._asdict(), "more": 1}},
            "an unknown term": {"seconds_per": {**UNITS, "more": 1.0}},
            "a term that takes no time": {"seconds_per": {**UNITS, "held": 1.0}},
            "a NaN": {"seconds_per": {**UNITS, "launches": float("nan")}},
            "an infinity": {"seconds_per": {**UNITS, "flops.nn": float("inf")}},
            "a zero": {"seconds_per": {**UNITS, "flops.nn": 0}},
            "a text for a number": {"seconds_per": {**UNITS, "flops.nn": "1e9"}},
            "true for a number": {"seconds_per": {**UNITS, "flops.nn": True}},
            "more than a float holds": {"seconds_per": {**UNITS, "flops.nn": 10**400}},
            "a negative time": {"products": [[SIZES, -1e-6]]},
            "no time": {"products": [[SIZES, None]]},
            "too few sizes": {"products": [[SIZES[:-1], 1e-6]]},
            "a negative size": {"products": [[[-1, *SIZES[1:]], 1e-6]]},
            "a size that is none": {"products": [[[1.5, *SIZES[1:]], 1e-6]]},
            "a size beyond all": {"products": [[[10**400, *SIZES[1:]], 1e-6]]},
            "products that are none": {"products": {"a": 1}},
            "a negative plan": {"plans": {"a problem": {"a plan": -1.0}}},
            "plans that are none": {"plans": [1, 2]},
        }.items()
    },
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_counts_as_absent_with_one_warning_and_is_replaced(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    file_of(KEY).write_bytes(BAD[name])
    for _ in range(3):
        assert store.load(KEY) == Record()
    (warning,) = warnings(caplog)
    assert str(file_of(KEY)) in warning
    assert len(warning) < 1000
    assert store.add(KEY, FULL) == FULL
    assert store.load(KEY) == FULL
    assert len(warnings(caplog)) == 1


def test_a_folder_in_the_place_of_a_file_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    file_of(KEY).mkdir()
    assert store.load(KEY) == Record()
    assert store.add(KEY, FULL) == FULL
    assert not list(store.folder().glob("*.tmp"))
    assert ["ignores" in text or "cannot keep" in text for text in warnings(caplog)] == [True] * 2


def test_where_nothing_can_be_written_a_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "a file" / "below"))
    for _ in range(2):
        assert store.load(KEY) == Record()
        assert store.add(KEY, FULL) == FULL  # known to this process all the same
    (warning,) = warnings(caplog)
    assert "cannot keep its measurements" in warning
    assert "a file" in warning


def test_a_disk_that_is_full_leaves_what_was_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store.add(KEY, FULL)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    store.add(KEY, Record(products={SHAPE: 7.0}))
    assert "No space left" in "".join(warnings(caplog))
    assert store.load(KEY) == FULL
    assert not list(store.folder().glob("*.tmp"))


# --- bounds


def test_the_oldest_numbers_fall_out_and_files_stay_small() -> None:
    limit = store._MAX_ENTRIES
    names = {f"{i:024}": {f"{j:024}": 1.2345678901234567e-05 for j in range(4)} for i in range(9)}
    long = GemmShape(4096, 1 << 30, 1 << 30, 1 << 30)
    store.add(KEY, Record(products=shapes(1, limit), plans=names))
    store.add(KEY, Record(products={**shapes(limit + 1, 10), long: 1.2345678901234567e-05}))
    found = store.load(KEY).products
    assert len(found) == limit
    assert list(found)[-1] == long
    assert next(iter(found)) == GemmShape(1, 12, 2, 3)

    # The widest entries of all: what is written is read again.
    many = {f"{i:024}": names[f"{0:024}"] for i in range(2 * limit)}
    wide = {long._replace(b=b): 1.2345678901234567e-05 for b in range(1, 2 * limit)}
    merged = store.add(KEY, Record(UNITS, wide, many))
    assert len(merged.plans) == len(merged.products) == limit
    assert file_of(KEY).stat().st_size < store._MAX_FILE_BYTES
    assert store.load(KEY) == merged


def test_the_oldest_files_are_removed() -> None:
    limit = store._MAX_FILES
    keys = [KEY._replace(torch=f"2.{i}") for i in range(limit + 5)]
    for age, key in zip(range(len(keys), 0, -1), keys, strict=True):
        store.add(key, FULL)
        os.utime(file_of(key), (time.time() - age,) * 2)
    store.add(KEY, FULL)
    left = {path.name for path in store.folder().glob("*.json")}
    assert left == {key.file_name for key in (*keys[6:], KEY)}
    assert len(list(store.folder().iterdir())) <= 2 * limit


def test_what_killed_writers_left_does_no_harm_and_is_removed_in_the_end() -> None:
    store.add(KEY, FULL)
    new, old = (store.folder() / f"{file_of(KEY).stem}{name}.tmp" for name in ("new", "old"))
    for path in (new, old):
        path.write_text('{"format": 3, "key"', encoding="utf-8")
    os.utime(old, (time.time() - 2 * store._ABANDONED_S,) * 2)
    assert store.load(KEY) == FULL
    store.add(KEY, Record(products={SHAPE: 2.0}))
    assert store.load(KEY).products == {SHAPE: 2.0}
    assert new.exists()  # its writer may be alive
    assert not old.exists()


# --- processes

PREAMBLE = """
import sys
from runlora_fx.cost_model import store
from runlora_fx.cost_model.ops import GemmShape
from runlora_fx.cost_model.store import Key, Record
KEY = Key(*{key!r})
"""

ADDS = """
start, count = int(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for size in range(start, start + count):
    store.add(KEY, Record(products={GemmShape(1, size, 2, 3): size * 1e-6}))
"""

DIES_WRITING = """
import os, signal, tempfile

made = tempfile.NamedTemporaryFile

def dying(*args, **kwargs):
    file = made(*args, **kwargs)

    def half(text):
        file.file.write(text[:40])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    file.write = half
    return file

tempfile.NamedTemporaryFile = dying
store.add(KEY, Record(products={GemmShape(9, 9, 9, 9): 9.0}))
"""

DIES_RENAMING = """
import os, pathlib, signal
pathlib.Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
store.add(KEY, Record(products={GemmShape(9, 9, 9, 9): 9.0}))
"""


def started(script: str, *arguments: object) -> "subprocess.Popen[str]":
    """A process that runs a script on the store, in this test's folder."""
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE.format(key=tuple(KEY)) + script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_processes_that_add_at_once_lose_nothing(caplog: pytest.LogCaptureFixture) -> None:
    count, writers = 40, 3
    store.add(KEY, Record(UNITS))
    processes = [started(ADDS, 1 + count * i, count) for i in range(writers)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    # Whoever reads meanwhile never sees half a file: that would be a warning.
    seen = [0]
    while any(process.poll() is None for process in processes):
        record = store.load(KEY)
        assert record.seconds_per == UNITS
        seen.append(len(record.products))
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert not errors
    assert seen == sorted(seen)
    assert store.load(KEY).products == shapes(1, count * writers)
    assert not list(store.folder().glob("*.tmp"))
    assert not warnings(caplog)


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
@pytest.mark.parametrize("script", (DIES_WRITING, DIES_RENAMING), ids=("writing", "renaming"))
def test_a_writer_that_is_killed_leaves_the_old_numbers_and_no_lock(
    script: str, caplog: pytest.LogCaptureFixture
) -> None:
    store.add(KEY, FULL)
    process = started(script)
    _, errors = process.communicate()
    assert process.returncode == -9, errors
    assert len(list(store.folder().glob("*.tmp"))) == 1  # it was in the middle of it
    assert store.load(KEY) == FULL
    store.add(KEY, Record(products={SHAPE: 3.0}))
    assert store.load(KEY).products == {SHAPE: 3.0}
    assert not warnings(caplog)
