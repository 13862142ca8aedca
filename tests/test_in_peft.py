"""Adapters that are switched, merged, added, deleted and swapped while the model is compiled.

The results have to be right at once, and nothing may be compiled that Inductor would not compile.
"""

from collections import OrderedDict
from pathlib import Path

import torch
from checks import RUNLORA, assert_same_values
from market import lora_layers, randomise_lora_b
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from recipes import Watch, Work, assert_all_found, check, run_recipe
from torch import Tensor, nn

IN, HIDDEN, OUT, TOKENS = 32, 64, 32, 64
TARGETS = ["up", "down"]
SWAPS = [(r, alpha) for r in (1, 2, 3, 5, 8) for alpha in (4, 11)]


def _model(rank: int = 4, alpha: int = 8, seed: int = 0) -> PeftModel:
    torch.manual_seed(0)
    layers = OrderedDict(up=nn.Linear(IN, HIDDEN), act=nn.GELU(), down=nn.Linear(HIDDEN, OUT))
    base = nn.Sequential(layers)
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS))
    randomise_lora_b(model)
    return model


def _input() -> Tensor:
    return torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(0))


def test_adapters_are_managed_while_compiled() -> None:
    x = _input()
    history: dict[str, list[Work]] = {}

    def run(backend: str) -> dict[str, Tensor]:
        model, watch = _model(), Watch()
        works = history[backend] = []
        values: dict[str, Tensor] = {}

        def look(name: str) -> None:
            with torch.no_grad():
                values[name] = model(x).clone()
            works.append(watch.work())

        model.compile(backend=backend)
        look("first")
        torch.manual_seed(2)
        model.add_adapter("second", LoraConfig(r=8, lora_alpha=4, target_modules=TARGETS))
        randomise_lora_b(model)
        look("another was added, and is not active")
        model.set_adapter("second")
        look("second")
        model.set_adapter("default")
        look("first again")
        with model.disable_adapter():
            look("none")
        look("enabled again")
        model.merge_adapter()
        look("merged")
        model.unmerge_adapter()
        look("unmerged")
        model.delete_adapter("second")
        look("second deleted")
        return values

    ours, _ = check(run)
    assert history["runlora"] == history["inductor"]
    assert_same_values({"": ours.values["first again"]}, {"": ours.values["enabled again"]}, 0)
    assert (ours.values["none"] - ours.values["first again"]).abs().max() > 1e-3


def test_hot_swapping_recompiles_nothing(tmp_path: Path) -> None:
    folders = [str(tmp_path / f"{i}") for i in range(len(SWAPS))]
    for seed, (folder, (rank, alpha)) in enumerate(zip(folders, SWAPS, strict=True)):
        _model(rank, alpha, seed).save_pretrained(folder)
    x = _input()
    models = {}

    def run(backend: str) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}

        @torch.no_grad()
        def show(model: nn.Module) -> None:
            values[f"{len(values)}"] = model(x).clone()

        model = models[backend] = _model()
        run_recipe(
            "hotswap",
            backend,
            model=model,
            folders=folders,
            show=show,
            hotswap_adapter=hotswap_adapter,
            prepare_model_for_compiled_hotswap=prepare_model_for_compiled_hotswap,
        )
        return values

    ours, inductor = check(run)
    assert len(ours.values) == len(SWAPS)
    assert ours.work == Work(graphs=1, breaks=0, recompiles=0)
    assert ours.flops < inductor.flops
    assert_all_found(ours, models[RUNLORA])
    for layer in lora_layers(models[RUNLORA]).values():
        assert layer.scaling["default"].ndim == 0  # a tensor
