"""diffusers: LoRA files loaded into a pipeline, scaled, fused, and swapped while it is compiled."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checks import RUNLORA
from market import randomise_lora_b
from peft import LoraConfig, get_peft_model_state_dict
from recipes import FAST, Watch, Work, assert_all_found, check, run_recipe
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

WIDTH, IMAGE, TEXT = 32, 16, 48
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "ff.net.0.proj"]


def _transformer() -> Any:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=0,
        attention_head_dim=WIDTH // 2,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def _pipeline() -> Any:
    """A pipeline of a transformer alone: the rest takes no part."""
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.FluxPipeline(scheduler=scheduler, transformer=_transformer(), **absent)


def _save_lora(folder: Path, rank: int, seed: int) -> str:
    """A LoRA file of random weights, in diffusers' format."""
    transformer = _transformer()
    torch.manual_seed(seed)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS))
    randomise_lora_b(transformer)
    diffusers.FluxPipeline.save_lora_weights(
        folder, transformer_lora_layers=get_peft_model_state_dict(transformer)
    )
    return str(folder)


@torch.no_grad()
def _denoised(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    (sample,) = pipe.transformer(
        hidden_states=torch.randn(1, IMAGE, 4, generator=generator),
        encoder_hidden_states=torch.randn(1, TEXT, WIDTH, generator=generator),
        pooled_projections=torch.randn(1, WIDTH, generator=generator),
        timestep=torch.tensor([0.5]),
        img_ids=torch.zeros(IMAGE, 3),
        txt_ids=torch.zeros(TEXT, 3),
        return_dict=False,
    )
    return sample.clone()


def test_a_loaded_lora_is_rewritten(tmp_path: Path) -> None:
    folder = _save_lora(tmp_path, rank=4, seed=1)
    models = {}

    def run(backend: str) -> dict[str, Tensor]:
        pipe = _pipeline()
        run_recipe("diffusers", backend, pipe=pipe, folder=folder)
        models[backend] = pipe.transformer
        return {"sample": _denoised(pipe)}

    ours, inductor = check(run)
    assert ours.work == Work(graphs=1, breaks=0, recompiles=0)
    assert ours.flops < inductor.flops
    assert_all_found(ours, models[RUNLORA])


def test_repeated_blocks_are_compiled(tmp_path: Path) -> None:
    folder = _save_lora(tmp_path, rank=4, seed=1)

    def run(backend: str) -> dict[str, Tensor]:
        pipe = _pipeline()
        pipe.load_lora_weights(folder, adapter_name="style")
        pipe.transformer.compile_repeated_blocks(backend=backend)
        return {"sample": _denoised(pipe)}

    ours, _ = check(run, backends=FAST)
    assert ours.work == Work(graphs=1, breaks=0, recompiles=0)


@pytest.mark.slow
def test_scaled_fused_and_changed_while_compiled(tmp_path: Path) -> None:
    first = _save_lora(tmp_path / "first", rank=4, seed=1)
    second = _save_lora(tmp_path / "second", rank=2, seed=2)
    steps: dict[str, list[Work]] = {}

    def run(backend: str) -> dict[str, Tensor]:
        pipe, watch = _pipeline(), Watch()
        values: dict[str, Tensor] = {}
        works = steps[backend] = []

        def look(name: str) -> None:
            values[name] = _denoised(pipe)
            works.append(watch.work())

        pipe.load_lora_weights(first, adapter_name="first")
        pipe.load_lora_weights(second, adapter_name="second")
        pipe.transformer.compile(backend=backend)
        pipe.set_adapters("first")
        look("first")
        pipe.set_adapters("first", 0.5)
        look("scaled")
        pipe.set_adapters(["first", "second"], [0.7, 0.3])
        look("both")
        pipe.fuse_lora()
        look("fused")
        pipe.unfuse_lora()
        look("unfused")
        return values

    check(run, backends=FAST)
    ours, other = (steps[backend] for backend in FAST)
    assert ours == other


def test_hot_swapping_recompiles_nothing(tmp_path: Path) -> None:
    ranks = (4, 8, 2)
    folders = [_save_lora(tmp_path / f"{r}", rank=r, seed=r) for r in ranks]
    models = {}

    def run(backend: str) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        pipe = _pipeline()
        models[backend] = pipe.transformer

        def show(pipe: Any) -> None:
            values[f"{len(values)}"] = _denoised(pipe)

        run_recipe("diffusers_hotswap", backend, pipe=pipe, folders=folders, show=show)
        return values

    ours, _ = check(run, backends=FAST)
    assert len(ours.values) == len(ranks)
    assert ours.work == Work(graphs=1, breaks=0, recompiles=0)
    assert_all_found(ours, models[FAST[0]])
