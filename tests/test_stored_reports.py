"""Reports that are stored beside compiled code: read back as they were, or not at all."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from test_causes import Layer, data
from test_report import Adapted
from torch import fx

import runlora_fx
from runlora_fx import plug_in, stored_reports
from runlora_fx._torch_caches import Compiling
from runlora_fx.report.data import Report, combined
from runlora_fx.report.stored.read_back import UNREADABLE, report_from

KEY = stored_reports.Key("0123abcd")
TOKENS, BATCH = sympy.symbols("s77 s27", positive=True, integer=True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(stored_reports, "cache_folder", lambda: tmp_path)
    return tmp_path / "runlora"


@pytest.fixture(scope="module")
def report() -> Report:
    parts = [
        runlora_fx.explain(Layer(), data(256), device="h100", strict=True),
        runlora_fx.explain(Adapted(0.5, torch.float32), data(256), objective="flops", strict=True),
        Report("torch", refusals=(runlora_fx.report.sites.Refusal("why", ("where",)),)),
    ]
    return combined(parts)


def test_a_report_is_read_back_as_it_was(report: Report) -> None:
    again = report_from(json.loads(report.to_json()))
    assert again == report
    assert again.to_json() == report.to_json()
    assert str(again) == str(report)
    (site, *_), (other, *_) = again.sites, report.sites
    assert site.flops_before_expr.free_symbols == other.flops_before_expr.free_symbols


def test_a_report_is_stored_and_marked_when_it_is_read(folder: Path, report: Report) -> None:
    stored_reports.stored(KEY, report)
    assert [path.name for path in folder.iterdir()] == ["0123abcd.json"]
    again = stored_reports.read(KEY)
    assert again.from_cache
    assert again.sites == report.sites
    assert again.verdict == report.verdict
    assert "The compiled code came from a cache; this is the report stored with it." in str(again)


@pytest.mark.parametrize(
    "change",
    (
        lambda content: content.update(format=0),
        lambda content: content.update(key="another"),
        lambda content: content["report"].update(schema=0),
        lambda content: content["report"].update(sites=[{}]),
        lambda content: content["report"].update(sites=None),
        lambda content: content["report"].update(graph="\x1b[31mred"),
        lambda content: content["report"].update(flops_before=True),
        lambda content: content["report"].update(flops_before="1"),
        lambda content: content["report"].update(seconds={"before": float("inf"), "after": 1}),
        lambda content: content["report"]["sites"][0].update(before=3),
        lambda content: content["report"].clear(),
    ),
)
def test_what_is_no_report_of_ours_counts_as_absent(
    change: Any, folder: Path, report: Report
) -> None:
    stored_reports.stored(KEY, report)
    path = folder / KEY.file
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    again = stored_reports.read(KEY)
    assert again.from_cache and not again.sites
    assert str(again) == (
        "runlora: the compiled code came from a cache, and the report that is stored with it "
        "cannot be read.\n"
    )


@pytest.mark.parametrize("text", ("", "{", "[]", "null", "\xff", "[" * 10_000))
def test_damaged_files_count_as_absent(text: str, folder: Path) -> None:
    folder.mkdir()
    (folder / KEY.file).write_bytes(text.encode("latin-1"))
    assert "cannot be read" in stored_reports.read(KEY).headline


def test_what_storing_computes_counts_as_planning(
    folder: Path, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_reports, "perf_counter", iter((3.0, 5.0)).__next__)
    made = stored_reports.stored(KEY, replace(report, planning_seconds=1.0))
    assert made.planning_seconds == 3.0
    assert made == report
    assert stored_reports.read(KEY).planning_seconds == 3.0
    assert stored_reports.stored(None, report) is report


def test_a_missing_report_says_why(folder: Path) -> None:
    assert "no report is stored for this graph" in str(stored_reports.read(KEY))
    assert "cannot be identified" in str(stored_reports.read(None))
    stored_reports.stored(None, Report("joint"))
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_to_takes_nothing_down(
    folder: Path, report: Report, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("no folder")
    with caplog.at_level(logging.INFO, "runlora_fx"):
        stored_reports.stored(KEY, report)
    assert "cannot store its report" in caplog.text
    assert "no report is stored" in str(stored_reports.read(KEY))


def test_the_oldest_files_go(folder: Path, report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_reports, "_MAX_FILES", 2)
    for digest in ("a", "b", "c"):
        stored_reports.stored(stored_reports.Key(digest), Report("joint"))
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    "text",
    (
        "__import__('os').system('touch hacked')",
        "N.__class__",
        "exec(1)",
        "9**9**9**9",
        "N**99999",
        "2*",
        "(N + 1)*2",
        "",
    ),
)
def test_no_expression_is_evaluated(text: str, report: Report) -> None:
    content = json.loads(report.to_json())
    content["sites"][0]["flops_before_expr"] = text
    try:
        read = report_from(content).sites[0].flops_before_expr
    except UNREADABLE:
        return
    assert str(read) == (text or "0")
    assert text in ("", "N.__class__") or isinstance(read, sympy.Symbol)
    assert not Path("hacked").exists()


def _key(
    tokens: int = 4, name: str = "a", identity: object = "us", **settings: object
) -> stored_reports.Key:
    graph = fx.Graph()
    graph.output(graph.call_method("sin", (graph.placeholder(name),)))
    gm = fx.GraphModule({}, graph)
    key = stored_reports.key_of(gm, [torch.randn(tokens, 2)], identity, settings)
    assert key is not None
    return key


def test_the_key_tells_graphs_sizes_options_and_settings_apart() -> None:
    keys = [_key(), _key(8), _key(name="b"), _key(identity="others"), _key(max_autotune=True)]
    with torch.no_grad():
        keys.append(_key())
    with torch.autocast("cpu"):
        keys.append(_key())
    assert len({key.digest for key in keys}) == len(keys)
    assert _key() == keys[0]


def _sized(tokens: int, batch: int = 2) -> stored_reports.Key:
    return stored_reports.Key("0123abcd", ((TOKENS, tokens), (BATCH, batch)))


@pytest.fixture
def two_plans(folder: Path, report: Report, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Reports of code for few tokens and of code for many."""
    guards = {4: ("s27*s77 - 154", "<"), 100: ("s27*s77 - 154", ">=")}
    for tokens, guard in guards.items():
        monkeypatch.setattr(stored_reports.Key, "guards", lambda _, guard=guard: [guard])
        stored_reports.stored(_sized(tokens), replace(report, graph=f"compiled for {tokens}"))
    return folder


def test_a_report_is_found_for_all_sizes_that_its_guards_allow(two_plans: Path) -> None:
    assert len(list(two_plans.iterdir())) == 2
    for key, graph in (
        *((_sized(4), "compiled for 4"), (_sized(100), "compiled for 100")),
        *((_sized(76), "compiled for 4"), (_sized(77), "compiled for 100")),
        *((_sized(10, 16), "compiled for 100"), (_sized(10, 15), "compiled for 4")),
    ):
        read = stored_reports.read(key)
        assert read.graph == graph and read.from_cache
        assert read.of_other_sizes == (key not in (_sized(4), _sized(100)))
        said = "It was compiled for other sizes, and the numbers hold for those." in str(read)
        assert said == read.of_other_sizes


def test_sizes_that_no_report_or_several_fit_say_so_and_deny_nothing(two_plans: Path) -> None:
    unknown = stored_reports.Key("0123abcd", ((TOKENS, -1), (BATCH, 2)))
    for key, why in (
        (unknown, "it was compiled for other sizes, and 2 stored reports hold for these"),
        (stored_reports.Key("other", unknown.sizes), "no report is stored for this graph"),
    ):
        read = stored_reports.read(key)
        assert not read.sites and not read.of_other_sizes
        assert "what was done is not known" in read.verdict and why in read.verdict
        assert read.headline == f"runlora: {read.verdict}."


@pytest.mark.parametrize("guards", (None, [1], [["s77"]], [["s77", "~"]], [[1, "<"]]))
def test_reports_with_damaged_guards_count_as_absent(guards: Any, two_plans: Path) -> None:
    for path in two_plans.iterdir():
        path.write_text(json.dumps({**json.loads(path.read_text()), "guards": guards}))
    assert "no report is stored" in stored_reports.read(_sized(5)).verdict


def test_nothing_is_stored_that_no_cache_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = fx.symbolic_trace(torch.nn.Identity())
    assert stored_reports.key_of(gm, [], None, {}) is None
    monkeypatch.setattr(stored_reports, "keeps_compiled_graphs", lambda: False)
    assert stored_reports.key_of(gm, [], "us", {}) is None


@pytest.mark.parametrize("runs", (True, False))
def test_a_plug_in_expects_a_report_where_inductor_runs_it(
    runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor asks for its identity also where its joint passes are switched off."""
    notes: dict[str, Any] = {}
    gm = fx.symbolic_trace(torch.nn.Identity())
    now = Compiling(gm, [torch.ones(2)], notes)
    monkeypatch.setattr(plug_in, "compiling", lambda: now)
    monkeypatch.setattr(plug_in, "runs_joint_passes", lambda: runs)
    for identity in (None, "us", "others"):
        plug_in.looked_for(identity)
    assert list(notes.values()) == ([stored_reports.key_of(*now[:2], "us", {})] if runs else [])


def test_a_plug_in_never_raises(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plug_in, "compiling", lambda: 1 / 0)
    with caplog.at_level(logging.INFO, "runlora_fx"):
        plug_in.looked_for("us")
        plug_in.ran()
    assert "could not look for its report" in caplog.text
    assert "could not store its report" in caplog.text
    assert not folder.exists()
