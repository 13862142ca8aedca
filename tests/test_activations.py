"""What the backward makes again: by price, with the same masks, and as checkpoints allow."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
from checks import (
    INDUCTOR,
    RUNLORA,
    activation,
    assert_gradient_is_the_slope,
    assert_same_values,
    compiled,
    outputs_and_grads,
    saved_bytes,
)
from conftest import FLOPS_BOUND
from market import randomise_lora_b
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.utils.checkpoint import checkpoint

from runlora_fx._torch_compat import draws_again
from runlora_fx.cost_model import store
from runlora_fx.cost_model.cost import FREE, Cost
from runlora_fx.cost_model.devices.machine import DTYPES, key_of
from runlora_fx.cost_model.devices.registry import kind_of
from runlora_fx.cost_model.published import PUBLISHED
from runlora_fx.cost_model.store import Record
from runlora_fx.passes.context import Context
from runlora_fx.passes.recompute.chains import Chain
from runlora_fx.passes.recompute.choose import choose

RTOL = 1e-5
LAYERS, WIDTH, INNER, RANK, TOKENS = 3, 64, 96, 8, 160
ACTIVATION = TOKENS * 4


class Block(nn.Module):
    """``h + down(silu(gate(n)) * up(n))`` with ``n = norm(h)``."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.norm = nn.RMSNorm(WIDTH)
        self.gate = nn.Linear(WIDTH, INNER, bias=False)
        self.up = nn.Linear(WIDTH, INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def inner(self, h: Tensor) -> Tensor:
        n = self.norm(h)
        made: Tensor = self.down(nn.functional.silu(self.gate(n)) * self.up(n))
        return h + made

    def forward(self, h: Tensor) -> Tensor:
        if self.checkpointed:
            made: Tensor = checkpoint(self.inner, h, use_reentrant=False)
            return made
        return self.inner(h)


class Logarithm(nn.Module):
    """``log(1 + x^2)``."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * x).log1p()


def frozen(checkpointed: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(checkpointed) for _ in range(LAYERS))).requires_grad_(False)


def adapted(dropout: float = 0.0, checkpointed: bool = False) -> nn.Module:
    config = LoraConfig(
        r=RANK, lora_alpha=RANK, lora_dropout=dropout, target_modules=["gate", "up", "down"]
    )
    model = get_peft_model(frozen(checkpointed), config)
    randomise_lora_b(model)
    return model


def kept(model: nn.Module, backend: str, **policy: object) -> int:
    """What a forward holds for the backward, its parameters and its input apart [B]."""
    run, x = compiled(model, backend, **policy), activation(TOKENS, WIDTH)
    return saved_bytes(lambda: run(x), [*model.parameters(), x])


def kept_at(rates: dict[str, float], model: nn.Module) -> int:
    """What a forward that is planned at some rates holds for the backward [B]."""
    for dtype in DTYPES:
        store.add(key_of(torch.device("cpu"), dtype), Record(rates))
    return kept(model, RUNLORA)


#: X A' of all adapters: the forward computes it in one product with X M', and saves it.
PRODUCTS = LAYERS * ACTIVATION * 3 * RANK


def test_balanced_keeps_what_a_frozen_model_keeps_and_small_products() -> None:
    floor, inductor = kept(frozen(), INDUCTOR), kept(adapted(), INDUCTOR)
    # PEFT keeps the adapters' inputs, two of them one tensor, and X A' of each.
    assert inductor == floor + LAYERS * ACTIVATION * (WIDTH + INNER) + PRODUCTS
    assert kept(adapted(), RUNLORA) == floor + PRODUCTS


def test_fast_makes_no_activations_again() -> None:
    fast = kept(adapted(), RUNLORA, memory="fast", memory_budget=1)
    assert fast == kept(adapted(), INDUCTOR)


def test_balanced_pays_no_more_than_the_plans_save(no_profile: Path) -> None:
    """The gradient of a logarithm needs no logarithm: where one takes long, it is kept."""
    config = LoraConfig(r=RANK, target_modules=["1"])
    model = get_peft_model(nn.Sequential(Logarithm(), nn.Linear(WIDTH, WIDTH)), config)
    quick = kept_at(FLOPS_BOUND, model)
    assert kept_at({**FLOPS_BOUND, "special": 1e-6}, model) == quick + ACTIVATION * WIDTH


def test_what_the_backward_computes_anyway_is_free(no_profile: Path) -> None:
    """The gradient of ``silu(g) * u`` needs the same exp."""
    found = kept_at({**FLOPS_BOUND, "special": 1e-6}, adapted())
    assert found == kept(frozen(), INDUCTOR) + PRODUCTS


@pytest.mark.parametrize("policy", ("low", "balanced"))
def test_masks_are_kept_where_another_kernel_draws_others(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One-dimensional kernels of CUDA devices draw other numbers there than other kernels do."""
    monkeypatch.setattr(Context, "draws_again", False)
    floor, bits = kept(frozen(), INDUCTOR), LAYERS * TOKENS * (2 * WIDTH + INNER) // 8
    found = kept(adapted(0.1), RUNLORA, memory=policy, objective="flops")
    if policy == "low":
        assert found == floor + bits
    else:
        assert found <= kept(adapted(0.1), INDUCTOR)


def test_only_devices_that_draw_in_fours_draw_others() -> None:
    from torch._inductor.codegen.triton import TritonOverrides

    cpu, cuda = (kind_of(torch.device(name)).draws_in_fours for name in ("cpu", "cuda"))
    assert draws_again(in_fours=cpu)
    in_fours = hasattr(TritonOverrides, "_can_use_4x_random")
    assert draws_again(in_fours=cuda) != in_fours
    with inductor_config.patch(fallback_random=True):
        assert not draws_again(in_fours=cpu)
    if in_fours:
        with inductor_config.patch(align_random_eager=True):
            assert draws_again(in_fours=cuda)


def test_low_draws_no_masks_where_that_takes_long(no_profile: Path) -> None:
    """It keeps the masks, a bit for an element, and makes what they mask of them."""
    for dtype in DTYPES:
        store.add(key_of(torch.device("cpu"), dtype), Record({**FLOPS_BOUND, "random": 1.0}))
    floor, bits = kept(frozen(), INDUCTOR), LAYERS * TOKENS * (2 * WIDTH + INNER) // 8
    packed = kept(adapted(0.1), RUNLORA, memory="low")
    # Besides, it keeps the X A' that would take more than its share of the time.
    products, rest = divmod(packed - floor - bits, TOKENS * RANK * 4)
    assert rest == 0 and 0 <= products < 3 * LAYERS
    # What a seed takes: a number of 64 bits.
    for dtype in DTYPES:
        store.add(key_of(torch.device("cpu"), dtype), Record(FLOPS_BOUND))
    drawn = kept(adapted(0.1), RUNLORA, memory="low")
    assert floor <= drawn <= packed - bits + 5056 + 8 * 3 * LAYERS


@pytest.mark.parametrize("budget", (1.0, 0.5, 0.1))
@pytest.mark.parametrize("memory", ("balanced", "low"))
@pytest.mark.parametrize("checkpointed", (False, True), ids=("plain", "checkpointed"))
def test_the_backward_sees_the_masks_of_the_forward(
    budget: float, memory: str, checkpointed: bool
) -> None:
    model, x = adapted(0.5, checkpointed), activation(TOKENS, WIDTH)
    with functorch_config.patch(activation_memory_budget=budget):
        assert_gradient_is_the_slope(compiled(model, RUNLORA, memory=memory), x)


def test_a_budget_of_nothing_is_refused_where_numbers_are_random() -> None:
    """There torch draws other masks in the backward, whatever nodes are tagged."""
    model, x = adapted(0.5), activation(TOKENS, WIDTH)
    with functorch_config.patch(activation_memory_budget=0):
        run = compiled(model, RUNLORA, strict=True)
        with pytest.raises(Exception, match=r"activation_memory_budget to 0\.01 or more"):
            run(x)


def test_checkpointed_blocks_keep_as_little_as_before() -> None:
    assert kept(adapted(0.0, True), RUNLORA, memory="low") <= kept(adapted(0.0, True), INDUCTOR)


@pytest.mark.parametrize("memory", ("balanced", "low"))
def test_values_are_the_same(memory: str) -> None:
    model, x = adapted(), activation(TOKENS, WIDTH)
    wanted = outputs_and_grads(model, [x])
    found = outputs_and_grads(compiled(model, RUNLORA, memory=memory), [x])
    assert_same_values(found, wanted, RTOL)


def test_published_devices_have_a_price_for_random_numbers() -> None:
    for device in PUBLISHED.values():
        times = device.profile("bfloat16").seconds_per
        assert times["random"] > times["special"] > 0


class _Offers:
    """Chains as :func:`choose` asks for them, without a graph."""

    def __init__(self, masks: list[Chain], tensors: list[Chain]) -> None:
        self._masks, self._tensors, self.taken = masks, tensors, list[Chain]()

    def masks(self) -> list[Chain]:
        return self._masks

    def tensors(self) -> list[Chain]:
        return self._tensors

    def packed(self) -> list[Chain]:
        return []

    def gain(self, chain: Chain) -> int:
        return chain.size

    def take(self, chain: Chain) -> None:
        self.taken.append(chain)


def test_the_cheapest_bytes_are_chosen_until_the_budget_is_spent() -> None:
    node: Any = None
    one = Chain(node, (), frozenset(), 10, FREE)
    costs = {"dear": 9.0, "cheap": 1.0, "middle": 5.0}
    offers = [replace(one, cost=Cost({"random": int(c)})) for c in costs.values()]
    chains: Any = _Offers([], offers)

    def chosen(budget: float, per_byte: float) -> list[Any]:
        found = choose(chains, lambda cost: float(cost["random"]), budget, per_byte)
        return [chain.cost["random"] for chain in found]

    assert chosen(7.0, 0.0) == [1, 5]
    assert chosen(0.0, 0.5) == [1, 5]  # ten bytes each
    assert chosen(9.0, 0.5) == [1, 5, 9]
    assert chosen(0.0, 0.0) == []
