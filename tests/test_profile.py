"""Machine profiles: what a product is said to cost, fitted rates, and what devices can do."""

import itertools
import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import runlora_fx
from runlora_fx import Options, RunloraPass
from runlora_fx.cost_model import store
from runlora_fx.cost_model.devices import cpu as cpu_kind
from runlora_fx.cost_model.devices import measure, registry
from runlora_fx.cost_model.devices.fit import fit
from runlora_fx.cost_model.devices.machine import DTYPES, Machine, default_profile, key_of
from runlora_fx.cost_model.ops import Add, GemmShape, Hold, MatMul
from runlora_fx.cost_model.profile import DEFAULT_PROFILE, MachineProfile
from runlora_fx.cost_model.store import Record

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
#: Seconds for one unit of each term.
PRODUCT_UNITS = {
    "flops.nn": 5e-12,
    "flops.nt": 6.25e-12,
    "flops.tn": 1e-11,
    "read": 2e-11,
    "written": 1e-10,
    "launches": 4e-6,
}
UNITS = {**PRODUCT_UNITS, "elementwise": 5e-11}
KNOWN = MachineProfile(UNITS)


def flops_per_s(profile: MachineProfile) -> float:
    return 1 / profile.seconds_per_flop


def read_bytes_per_s(profile: MachineProfile) -> float:
    return 1 / profile.seconds_per["read"]


def written_bytes_per_s(profile: MachineProfile) -> float:
    return 1 / profile.seconds_per["written"]


# --- the formula


def rate(profile: MachineProfile, m: int, k: int, n: int) -> float:
    """FLOP per second of a product, by a profile."""
    return 2 * m * k * n / profile.seconds(MatMul(1, m, k, n, 4))


@pytest.mark.parametrize("profile", (DEFAULT_PROFILE, KNOWN), ids=("default", "other"))
@pytest.mark.parametrize("small", range(3), ids=("m", "k", "n"))
def test_the_rate_falls_off_where_a_dimension_is_small(profile: MachineProfile, small: int) -> None:
    rates = []
    for size in (1, 2, 4, 16, 64, 256, 1024, 4096):
        shape = [4096, 4096, 4096]
        shape[small] = size
        rates.append(rate(profile, *shape))
    assert rates == sorted(set(rates))
    assert rates[0] < 0.25 * flops_per_s(profile)  # bound by bytes
    assert 0.9 * flops_per_s(profile) < rates[-1] < flops_per_s(profile)


def test_a_tiny_product_costs_a_launch() -> None:
    assert KNOWN.seconds(MatMul(1, 1, 1, 1, 4)) == pytest.approx(UNITS["launches"], rel=1e-3)


def test_operations_of_known_size_cost_what_the_units_say() -> None:
    m, k, n = 3, 5, 7
    assert KNOWN.seconds(MatMul(2, m, k, n, 4)) == pytest.approx(
        2 * 2 * m * k * n / 2e11 + 2 * 4 * (m * k + k * n) / 5e10 + 2 * 4 * m * n / 1e10 + 4e-6
    )
    assert KNOWN.seconds(Add(2, m, n, 3, 4)) == pytest.approx(2 * 4 * 2 * 3 * m * n / 2e10)
    assert KNOWN.seconds(Hold(2, m, n, 4)) == 0


def test_times_are_expressions_in_symbolic_sizes() -> None:
    tokens, rank = sympy.symbols("s0 r", positive=True, integer=True)
    for operation in (MatMul(1, tokens, 64, rank, 2), Add(1, tokens, rank, 2, 2)):
        time = KNOWN.formula(operation)
        assert isinstance(time, sympy.Expr)
        assert time.free_symbols == {tokens, rank}
        known = replace(operation, m=96, n=8)
        assert float(time.subs({tokens: 96, rank: 8})) == pytest.approx(KNOWN.seconds(known))
    # The break-even of merging is an inequality that sympy can solve.
    apart = sum(KNOWN.formula(MatMul(1, *shape, 4)) for shape in ((tokens, 64, 8), (tokens, 8, 64)))
    merged = KNOWN.formula(MatMul(1, 64, 8, 64, 4))
    (border,) = sympy.solve(sympy.Eq(apart, merged), tokens) or [sympy.Integer(0)]
    below, above = (math.floor(border), math.floor(border) + 1)
    if below > 0:
        assert (apart - merged).subs(tokens, below) <= 0
    assert (apart - merged).subs(tokens, above) > 0


def test_a_measured_product_takes_the_time_it_took_and_no_other_does() -> None:
    operation = MatMul(1, 8, 16, 32, 4, (False, True))
    profile = replace(KNOWN, measured=((operation.shape, 123.0),))
    assert profile.seconds(operation) == 123.0
    assert profile.formula(operation) == KNOWN.formula(operation)
    for other in (
        replace(operation, m=9),
        replace(operation, b=2),
        replace(operation, turned=(False, False)),
        Add(1, 8, 32, 2, 4),
    ):
        assert profile.seconds(other) == KNOWN.seconds(other)
    assert hash(profile) != hash(KNOWN)


def test_a_product_and_its_transpose_are_the_same_call() -> None:
    for turned in itertools.product((False, True), repeat=2):
        shape = GemmShape(1, 8, 16, 32, *turned)
        # (L R)' = R' L'
        other = GemmShape(1, 32, 16, 8, not turned[1], not turned[0])
        assert shape.canonical == other.canonical in (shape, other)


# --- fitted rates

LAYOUTS = ((False, False), (False, True), (True, False))
SHAPES = [
    GemmShape(1, *sizes, *layout)
    for sizes in itertools.product((8, 64, 512, 2048), repeat=3)
    for layout in LAYOUTS
]


OPERATIONS = [shape.product(4) for shape in SHAPES]


def times_of(units: dict[str, float], operations: list[Any] = OPERATIONS) -> dict[Any, float]:
    profile = MachineProfile(units)
    return {operation: profile.seconds(operation) for operation in operations}


def squared_error(units: dict[str, float], times: dict[Any, float]) -> float:
    """The sum of the squared relative errors of predicted times."""
    predicted = times_of(units)
    return sum((predicted[operation] / times[operation] - 1) ** 2 for operation in times)


@pytest.mark.parametrize(
    "change",
    ({}, {"flops.nn": 1e-15, "flops.nt": 2e-15, "flops.tn": 3e-15, "read": 5e-13}),
    ids=("cpu", "gpu"),
)
def test_fit_recovers_the_units_that_times_were_made_from(change: dict[str, float]) -> None:
    units = {**PRODUCT_UNITS, **change}
    assert fit(times_of(units)) == pytest.approx(units, rel=1e-6)


def test_fit_finds_exactly_the_terms_that_were_measured() -> None:
    sums = [Add(1, 2**i, 64, 2, 4) for i in range(3)]
    assert fit(times_of(UNITS, sums)) == pytest.approx({"elementwise": UNITS["elementwise"]})
    both = fit(times_of(UNITS, [*OPERATIONS, *sums]))
    assert both == pytest.approx(UNITS, rel=1e-6)
    one_layout = [op for op in OPERATIONS if op.layout == "nt"]
    wanted = {name: PRODUCT_UNITS[name] for name in ("flops.nt", "read", "written", "launches")}
    assert fit(times_of(UNITS, one_layout)) == pytest.approx(wanted, rel=1e-6)
    # Held memory takes no time, whoever measures it.
    assert "held" not in fit({Hold(1, 2, 3, 4): 1.0, **times_of(UNITS, sums)})


@pytest.mark.parametrize("free", ("read", "written", "launches"))
def test_fit_finds_what_costs_nothing(free: str) -> None:
    units = {**PRODUCT_UNITS, free: 1e-30}
    found = fit(times_of(units))
    assert 0 < found.pop(free) < 1e-12 * UNITS[free] + 1e-17
    assert found == pytest.approx({n: PRODUCT_UNITS[n] for n in found}, rel=1e-6)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.floats(0.5, 2.0), min_size=len(SHAPES), max_size=len(SHAPES)))
def test_of_noisy_times_no_other_units_fit_better(noise: list[float]) -> None:
    times = {
        operation: time * factor
        for (operation, time), factor in zip(times_of(UNITS).items(), noise, strict=True)
    }
    found = fit(times)
    assert found.keys() == PRODUCT_UNITS.keys()
    assert all(0 < value < math.inf for value in found.values())
    least = squared_error(found, times)
    assert least <= squared_error(UNITS, times) * (1 + 1e-9)
    for name, factor in itertools.product(found, (0.8, 0.97, 1.03, 1.25)):
        assert least <= squared_error({**found, name: found[name] * factor}, times) * (1 + 1e-9)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.floats(1e-9, 1e3), min_size=6, max_size=9))
def test_whatever_was_measured_no_unit_is_negative(times: list[float]) -> None:
    found = fit(dict(zip(OPERATIONS, times, strict=False)))
    assert all(0 < value < math.inf for value in found.values())


def test_fit_needs_as_many_measurements_as_terms() -> None:
    few = dict(itertools.islice(times_of(UNITS).items(), 3))
    with pytest.raises(ValueError, match="needs 6 measurements or more, got 3"):
        fit(few)


# --- what a CPU can be expected to do


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., MachineProfile]:
    """The default profile of a made-up CPU."""

    def profile(
        dtype: str, capability: str = "AVX2", threads: int = 4, flags: tuple[str, ...] = ()
    ) -> MachineProfile:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr(cpu_kind, "_half_flags", lambda: flags)
        return default_profile(CPU, dtype)

    return profile


def test_instruction_sets_and_cores_make_a_cpu_faster(cpu: Callable[..., MachineProfile]) -> None:
    rates = [flops_per_s(cpu("float32", capability=c)) for c in ("DEFAULT", "AVX2", "AVX512")]
    assert rates == sorted(set(rates))
    one, two = cpu("float32", threads=1), cpu("float32", threads=2)
    assert flops_per_s(two) == pytest.approx(2 * flops_per_s(one))
    # Cores share the memory.
    assert 1 < read_bytes_per_s(two) / read_bytes_per_s(one) < 2
    # From small laptops to large servers.
    for threads, capability in itertools.product((1, 8, 96), ("DEFAULT", "AVX2", "AVX512")):
        profile = cpu("float32", capability, threads)
        assert 1e10 < flops_per_s(profile) < 2e13
        assert 1e9 < written_bytes_per_s(profile) <= read_bytes_per_s(profile) < 1e12


def test_wide_floats_are_slower_and_narrow_ones_no_slower(
    cpu: Callable[..., MachineProfile],
) -> None:
    for dtype in ("bfloat16", "float16"):
        for shape in ((2048, 2048, 2048), (16, 2048, 2048), (2048, 8, 2048)):
            times = [cpu(d).seconds(MatMul(1, *shape, s)) for d, s in ((dtype, 2), ("float32", 4))]
            assert times[0] <= times[1]
    assert flops_per_s(cpu("float64")) == flops_per_s(cpu("float32")) / 2
    plain, amx = cpu("bfloat16", "AVX512"), cpu("bfloat16", "AVX512", flags=("amx_bf16",))
    assert flops_per_s(amx) > 4 * flops_per_s(plain)
    assert read_bytes_per_s(amx) == read_bytes_per_s(plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_this_cpu_has_a_profile_and_a_name(dtype: str) -> None:
    profile = default_profile(CPU, dtype)
    assert 0 < profile.seconds_per["launches"] < 1e-3
    assert 1e9 < flops_per_s(profile) < 1e15
    key = key_of(CPU, dtype)
    assert key.dtype == dtype
    assert key.torch == torch.__version__
    assert f"threads={torch.get_num_threads()}" in key.settings
    assert torch.backends.cpu.get_cpu_capability() in key.device


# --- what NVIDIA's GPUs can be expected to do


def properties(name: str, major: int, minor: int, sms: int, **more: int) -> SimpleNamespace:
    return SimpleNamespace(name=name, major=major, minor=minor, multi_processor_count=sms, **more)


def clocks(kilohertz: int, memory_kilohertz: int, bits: int) -> dict[str, int]:
    return {
        "clock_rate": kilohertz,
        "memory_clock_rate": memory_kilohertz,
        "memory_bus_width": bits,
    }


# What torch.cuda.get_device_properties says, and by the data sheets the peak rates of dense
# products in 16 bits and of single precision [TFLOP/s] and of memory [GB/s].
GPUS = {
    "V100": (properties("V100", 7, 0, 80, **clocks(1530000, 877000, 4096)), 125, 15.7, 900),
    "T4": (properties("T4", 7, 5, 40, **clocks(1590000, 5001000, 256)), 65, 8.1, 320),
    "A100": (properties("A100", 8, 0, 108, **clocks(1410000, 1215000, 5120)), 312, 19.5, 1555),
    "A10": (properties("A10", 8, 6, 72, **clocks(1695000, 6251000, 384)), 125, 31.2, 600),
    "L40S": (properties("L40S", 8, 9, 142, **clocks(2520000, 9001000, 384)), 362, 91.6, 864),
    "H100": (properties("H100", 9, 0, 132, **clocks(1980000, 2619000, 5120)), 989, 67, 3350),
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], SimpleNamespace]:
    """Have torch find one GPU, by its name in the table."""

    def plug_in(name: str) -> SimpleNamespace:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: GPUS[name][0])
        return GPUS[name][0]

    return plug_in


@pytest.fixture
def tf32() -> Iterator[Callable[[bool], None]]:
    """Allow single precision to be rounded to TF32, or forbid it."""
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision

    def allow(yes: bool) -> None:
        matmul.fp32_precision = "tf32" if yes else "ieee"

    yield allow
    matmul.fp32_precision = before


@pytest.mark.parametrize("name", GPUS)
def test_gpus_are_expected_to_reach_a_good_part_of_their_data_sheet(
    name: str, gpu: Callable[[str], object], tf32: Callable[[bool], None]
) -> None:
    gpu(name)
    tf32(False)
    half, single, memory = GPUS[name][1:]
    for dtype, peak in (("bfloat16", half), ("float16", half), ("float32", single)):
        profile = default_profile(GPU, dtype)
        assert 0.4 < flops_per_s(profile) / (peak * 1e12) < 0.85, dtype
        assert 0.5 < read_bytes_per_s(profile) / (memory * 1e9) < 1, dtype
    exact = flops_per_s(profile)
    assert flops_per_s(default_profile(GPU, "float64")) <= exact
    tf32(True)
    rounded = flops_per_s(default_profile(GPU, "float32"))
    assert exact < rounded < flops_per_s(default_profile(GPU, "bfloat16"))


def test_gpus_of_the_future_count_as_the_newest_known(
    gpu: Callable[[str], SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = gpu("H100")
    newest = default_profile(GPU, "bfloat16")
    # Some builds of torch tell no clocks.
    future = properties("X1", 99, 0, known.multi_processor_count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: future)
    assert flops_per_s(default_profile(GPU, "bfloat16")) > 0.2 * flops_per_s(newest)
    assert read_bytes_per_s(default_profile(GPU, "bfloat16")) > 1e11


def test_a_gpu_is_known_by_name_and_capability_whatever_the_threads(
    gpu: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu("A100")
    key = key_of(GPU, "bfloat16")
    assert "A100" in key.device
    assert "threads" not in key.settings
    monkeypatch.setattr(torch, "get_num_threads", lambda: 17)
    assert key_of(GPU, "bfloat16") == key
    gpu("H100")
    assert key_of(GPU, "bfloat16") != key


# --- what is known of a machine

MEASURED = Record(products={GemmShape(1, 8, 16, 32): 5.0})


@pytest.mark.usefixtures("no_profile")
def test_a_machine_knows_what_was_stored_when_it_was_first_asked() -> None:
    default = default_profile(CPU, "float32")
    before = Machine(use_stored=True)
    assert before.profile(CPU, "float32") == default
    store.add(key_of(CPU, "float32"), Record(UNITS))
    assert before.profile(CPU, "float32") == default
    stored = Machine(use_stored=True).profile(CPU, "float32")
    pointwise = {name: default.known[name] for name in ("special", "random", "picked")}
    assert stored == replace(KNOWN, known={**KNOWN.known, **pointwise})
    assert Machine(use_stored=True).profile(CPU, "bfloat16") == default_profile(CPU, "bfloat16")
    assert Machine(use_stored=False).profile(CPU, "float32") == default


@pytest.mark.usefixtures("no_profile")
def test_what_a_machine_learns_it_knows_and_stores() -> None:
    learning = Machine(use_stored=True)
    learning.add(CPU, "float32", MEASURED)
    learned = learning.profile(CPU, "float32")
    assert learned.seconds(MatMul(1, 8, 16, 32, 4)) == 5.0
    assert Machine(use_stored=True).profile(CPU, "float32") == learned


@pytest.mark.usefixtures("no_profile")
@pytest.mark.parametrize(
    "newer",
    (
        Record(UNITS),
        MEASURED,
        Record(plans={"a problem": {"a plan": 1.0}}),
    ),
    ids=("units", "products", "plans"),
)
def test_identity_changes_with_every_number(newer: Record, gpu: Callable[[str], object]) -> None:
    gpu("A100")
    seen = [Machine(use_stored=True).identity()]
    for device, dtype in itertools.product((CPU, GPU), DTYPES):
        store.add(key_of(device, dtype), newer)
        seen.append(Machine(use_stored=True).identity())
    assert len(set(seen)) == len(seen)
    assert Machine(use_stored=True).identity() == seen[-1]
    assert Machine(use_stored=False).identity() == seen[0]


@pytest.mark.usefixtures("no_profile")
def test_a_damaged_file_is_as_good_as_none(caplog: pytest.LogCaptureFixture) -> None:
    (store.folder() / key_of(CPU, "float32").file_name).write_text("{", encoding="utf-8")
    for _ in range(2):
        assert Machine(use_stored=True).profile(CPU, "float32") == default_profile(CPU, "float32")
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1


# --- what identifies what is known

#: How to change each setting that changes the time of a product, and the dtypes that it concerns.
HALF, ALL = ("bfloat16", "float16"), tuple(DTYPES)
SETTINGS: dict[
    str, tuple[torch.device, Callable[[pytest.MonkeyPatch], object], tuple[str, ...]]
] = {
    "threads": (CPU, lambda p: p.setattr(torch, "get_num_threads", lambda: 17), ALL),
    "deterministic": (
        CPU,
        lambda p: p.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True),
        ALL,
    ),
    "fp32 precision": (CPU, lambda p: torch.set_float32_matmul_precision("medium"), ("float32",)),
    "fp32 precision of every backend": (
        CPU,
        lambda p: setattr(torch.backends, "fp32_precision", "tf32"),
        ("float32",),
    ),
    "fp32 precision of oneDNN": (
        CPU,
        lambda p: setattr(torch.backends.mkldnn, "fp32_precision", "bf16"),
        ("float32",),
    ),
    "oneDNN": (CPU, lambda p: torch.backends.mkldnn.set_flags(_enabled=False), ALL),
    "environment": (CPU, lambda p: p.setenv("ONEDNN_MAX_CPU_ISA", "SSE41"), ALL),
    "fp32 precision of a GPU": (
        GPU,
        lambda p: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        ("float32",),
    ),
    "reduction in bf16": (
        GPU,
        lambda p: setattr(
            torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False
        ),
        ("bfloat16",),
    ),
    "reduction in fp16": (
        GPU,
        lambda p: setattr(
            torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False
        ),
        ("float16",),
    ),
    "accumulation in fp16": (
        GPU,
        lambda p: setattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", True),
        ("float16",),
    ),
    "library": (
        GPU,
        lambda p: p.setattr(torch.backends.cuda, "preferred_blas_library", lambda: "cublaslt"),
        ALL,
    ),
}


@pytest.fixture
def restored_settings() -> Iterator[None]:
    """Put the settings of torch that a test changes back."""
    cuda, mkldnn = torch.backends.cuda.matmul, torch.backends.mkldnn
    cuda_names = [
        "allow_bf16_reduced_precision_reduction",
        "allow_fp16_reduced_precision_reduction",
        "allow_fp16_accumulation",
    ]
    before = {name: getattr(cuda, name) for name in cuda_names}
    parts: tuple[Any, ...] = (torch.backends, mkldnn, mkldnn.matmul, cuda)

    def unset_precision() -> None:
        for part in parts:
            part.fp32_precision = "none"

    unset_precision()
    yield
    mkldnn.set_flags(_enabled=True)
    for name, value in before.items():
        setattr(cuda, name, value)
    unset_precision()
    # Else torch raises when it is asked for the one precision.
    torch.set_float32_matmul_precision("highest")
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.usefixtures("restored_settings", "no_profile")
@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_that_changes_times_is_part_of_the_key_and_of_the_identity(
    name: str, gpu: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu("A100")
    device, change, dtypes = SETTINGS[name]
    keys = {dtype: key_of(device, dtype) for dtype in DTYPES}
    machine, identity = Machine(use_stored=True), Machine(use_stored=True).identity()
    known, unused = RunloraPass(Options()), RunloraPass(Options(objective="flops"))
    before = known.uuid(), unused.uuid()
    change(monkeypatch)
    assert {dtype for dtype in DTYPES if key_of(device, dtype) != keys[dtype]} == set(dtypes)
    assert machine.identity() != identity
    assert known.uuid() != before[0]
    assert RunloraPass(Options()).uuid() == known.uuid()
    # Counting FLOPs depends on none of them.
    assert unused.uuid() == before[1]
    # Neither is what was measured under one setting taken for what holds under another.
    store.add(key_of(device, dtypes[0]), MEASURED)
    assert store.load(keys[dtypes[0]]) == Record()


# --- kinds of devices


XPU, MPS, NPU = torch.device("xpu", 0), torch.device("mps", 0), torch.device("privateuseone", 0)


@pytest.fixture
def every_device(gpu: Callable[[str], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torch find one of each kind."""
    gpu("A100")
    intel = SimpleNamespace(name="Intel Max", gpu_eu_count=1024)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda _: intel)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M1", raising=False)
    monkeypatch.setattr(torch.backends.mps, "get_core_count", lambda: 8, raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: NPU)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)


def test_kinds_of_devices_are_found_by_their_files() -> None:
    assert set(registry.entries()) == {"cpu", "cuda", "xpu", "mps"}
    assert registry.entry_of(NPU).type == "unknown"
    assert registry.entry_of(torch.device("meta")).type == "unknown"


@pytest.mark.usefixtures("every_device", "no_profile")
@pytest.mark.parametrize("device", (CPU, GPU, XPU, MPS, NPU), ids=lambda device: device.type)
def test_every_kind_has_a_name_a_profile_and_a_part_in_the_identity(device: torch.device) -> None:
    assert registry.present() == [CPU, GPU, MPS, XPU, NPU]
    for dtype in DTYPES:
        profile = default_profile(device, dtype)
        assert profile.seconds(MatMul(1, 512, 512, 512, 4)) > 0
        before = key_of(device, dtype), Machine(use_stored=True).identity()
        store.add(key_of(device, dtype), MEASURED)
        assert key_of(device, dtype) == before[0]
        assert Machine(use_stored=True).identity() != before[1]
    assert len({key_of(d, "float32").device for d in registry.present()}) == 5


def test_a_graph_computes_on_the_accelerator_that_its_tensors_are_on() -> None:
    meta = torch.device("meta")
    for device in (GPU, XPU, MPS, NPU):
        assert registry.computing([CPU, meta, device]) == device
    assert registry.computing([meta, CPU]) == registry.computing([]) == CPU


def test_a_device_without_random_numbers_gets_those_of_the_host() -> None:
    meta = torch.device("meta")
    assert registry.entry_of(meta).generator(meta) is None
    drawn = measure.random_tensor(3, 4, dtype=torch.bfloat16, device=meta)
    assert (drawn.shape, drawn.dtype, drawn.device) == ((3, 4), torch.bfloat16, meta)
    assert measure.matmul_seconds(GemmShape(1, 2, 3, 4), torch.float32, meta) > 0


def test_no_other_module_compares_types_of_devices() -> None:
    package = Path(runlora_fx.__file__).parent
    pattern = re.compile(r"\.type\s*(==|!=|in\b|not in\b)")
    files = [path for path in package.rglob("*.py") if path.parent.name != "devices"]
    assert [str(path) for path in files if pattern.search(path.read_text("utf-8"))] == []
