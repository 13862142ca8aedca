"""The fused kernels: against plain products in Triton's interpreter, and without Triton."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from runlora_fx import kernels
from runlora_fx.kernels import blocks
from tests.kernel_cases import CASES

RESOURCES = Path(__file__).parents[1] / "benchmarks" / "results" / "kernels.json"

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What came of all cases in a process that interprets Triton's programs."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.kernel_cases"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    if "wrap_triton only works on" in done.stderr:
        pytest.skip("this torch does not let Triton interpret the programs of its operators")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# --- in the interpreter


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_equals_plain_products(interpreted: dict[str, Any], name: str) -> None:
    assert interpreted["interpreted"] is True
    assert max(interpreted[name]["errors"]) <= 1.0


@needs_triton
@pytest.mark.parametrize("name", [name for name in CASES if "atomic" not in name])
def test_gives_equal_bits_again(interpreted: dict[str, Any], name: str) -> None:
    assert interpreted[name]["is_same"] is True


# --- everywhere else


def _operands() -> dict[str, torch.Tensor]:
    sizes = {"w": (6, 5), "b": (6, 2), "a": (2, 5), "x": (4, 5), "s": (4, 2), "dy": (4, 6)}
    return {name: torch.randn(*size) for name, size in sizes.items()}


def _arguments(kernel: str, of: dict[str, torch.Tensor]) -> tuple[Any, ...]:
    names = {"merge": "w b a", "gradient_products": "dy b s", "two_products": "x w s b"}[kernel]
    return tuple(of[name] for name in names.split())


def _plain(kernel: str, of: dict[str, torch.Tensor]) -> Any:
    if kernel == "merge":
        return of["w"] + of["b"] @ of["a"]
    if kernel == "gradient_products":
        return of["dy"] @ of["b"], of["dy"].T @ of["s"]
    return of["x"] @ of["w"].T + of["s"] @ of["b"].T


def _several(found: Any) -> tuple[torch.Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


every_kernel = pytest.mark.parametrize("kernel", ["merge", "gradient_products", "two_products"])


@needs_triton
@every_kernel
def test_runs_without_a_gpu(kernel: str) -> None:
    of = _operands()
    torch.testing.assert_close(
        getattr(kernels, kernel)(*_arguments(kernel, of)), _plain(kernel, of)
    )


@needs_triton
@every_kernel
def test_is_a_proper_operator(kernel: str) -> None:
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = _arguments(kernel, _operands())
    torch.library.opcheck(getattr(kernels, kernel), arguments, test_utils=checks)


@needs_triton
def test_takes_adapters_of_another_dtype() -> None:
    of = _operands()
    w = of["w"].bfloat16()
    merged = kernels.merge(w, of["b"], of["a"], 0.5)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, (w.float() + 0.5 * of["b"] @ of["a"]).bfloat16())


@needs_triton
@every_kernel
def test_compiles_to_plain_operators_on_a_cpu(kernel: str) -> None:
    of = _operands()
    compiled = torch.compile(getattr(kernels, kernel), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*_arguments(kernel, of)), _plain(kernel, of))


@needs_triton
@every_kernel
def test_knows_its_results_on_a_gpu_that_is_not_there(kernel: str) -> None:
    of = _operands()
    wanted = _plain(kernel, of)
    with FakeTensorMode():
        fake = {n: torch.empty(x.shape, dtype=x.dtype, device="cuda") for n, x in of.items()}
        found = getattr(kernels, kernel)(*_arguments(kernel, fake))
    for one, other in zip(_several(found), _several(wanted), strict=True):
        assert (one.shape, one.dtype, one.device.type) == (other.shape, other.dtype, "cuda")


WRONG: dict[str, tuple[str, str, torch.Tensor, type[Exception], str]] = {
    "vector": ("merge", "a", torch.ones(5), ValueError, "a must be a matrix, not of 1 dim"),
    "rows": ("merge", "b", torch.ones(7, 2), ValueError, "b must have 6 rows, as w has, not 7"),
    "rank": ("merge", "a", torch.ones(3, 5), ValueError, "a must have 2 rows, as b has columns"),
    "columns": ("merge", "a", torch.ones(2, 4), ValueError, "a must have 5 columns, as w has"),
    "int": ("merge", "w", torch.ones(6, 5).int(), TypeError, "w must be in float32, bfloat16"),
    "double": ("two_products", "x", torch.ones(4, 5).double(), TypeError, "x must be in float32"),
    "adapters": ("merge", "a", torch.ones(2, 5).half(), TypeError, "a must be in torch.float32"),
    "place": (
        *("two_products", "s", torch.ones(4, 2, device="meta")),
        *(ValueError, "s must be on cpu, as x is, not meta"),
    ),
    "dy": ("gradient_products", "b", torch.ones(5, 2), ValueError, "as dy has columns, not 5"),
    "s": ("gradient_products", "s", torch.ones(3, 2), ValueError, "s must have 4 rows, as dy has"),
    "half": ("gradient_products", "s", torch.ones(4, 2).half(), TypeError, "as dy is"),
    "inputs": ("two_products", "w", torch.ones(6, 4), ValueError, "w must have 5 columns, as x"),
    "outputs": ("two_products", "b", torch.ones(5, 2), ValueError, "b must have 6 rows, as w has"),
}


@needs_triton
@pytest.mark.parametrize("name", WRONG)
def test_errors_name_what_is_wrong(name: str) -> None:
    kernel, operand, wrong, error, message = WRONG[name]
    arguments = _arguments(kernel, {**_operands(), operand: wrong})
    with pytest.raises(error, match=message):
        getattr(kernels, kernel)(*arguments)


@needs_triton
def test_errors_name_a_wrong_bias() -> None:
    arguments = _arguments("two_products", _operands())
    with pytest.raises(ValueError, match="bias must have 6 elements, as w has rows, not 5"):
        kernels.two_products(*arguments, torch.ones(5))
    with pytest.raises(ValueError, match="bias must be a vector, not of 2 dimensions"):
        kernels.two_products(*arguments, torch.ones(1, 6))


def test_offers_nothing_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import runlora_fx.kernels
print(runlora_fx.kernels.__all__, hasattr(runlora_fx.kernels, "merge"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[] False"


def test_the_package_does_not_import_the_kernels() -> None:
    code = "import runlora_fx, sys; print('runlora_fx.kernels' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "False"


# --- what they take of a GPU


def test_no_kernel_spills() -> None:
    rows = json.loads(RESOURCES.read_text(encoding="utf-8"))["rows"]
    assert {row["capability"] for row in rows} == {80, 90, 100}
    assert [row for row in rows if row["spilled_B"] or row["shared_B"] > blocks.SHARED_LIMIT] == []


def test_the_table_of_resources_is_that_of_the_blocks() -> None:
    """After a change of blocks, ``python -m benchmarks.kernel_resources`` is due."""
    make = {
        "merge": blocks.merge_blocks,
        "gradient_products": blocks.one_pass_blocks,
        "two_products": blocks.two_products_blocks,
    }
    rows = json.loads(RESOURCES.read_text(encoding="utf-8"))["rows"]
    assert {row["kernel"] for row in rows} == set(make)
    for row in rows:
        division = make[row["kernel"]](row["rank"], row["dtype"])
        assert row["blocks"] == division.sizes
        assert (row["warps"], row["stages"]) == (division.warps, division.stages)


@pytest.mark.parametrize("tokens", [1, 100, 8192, 100_000])
@pytest.mark.parametrize("outputs", [1, 1024, 14336])
def test_spans_cover_the_columns_of_a_gradient(tokens: int, outputs: int) -> None:
    division = blocks.one_pass_blocks(16, "bfloat16")
    span = blocks.span_of(tokens, outputs, division)
    assert span % division["OUTPUTS"] == 0
    assert 0 < span < outputs + division["OUTPUTS"]
