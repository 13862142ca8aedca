"""transformers with PEFT: its Trainer, `generate`, and models unlike the market's."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from checks import RUNLORA
from market import MODELS
from peft import LoraConfig, PeftModel, get_peft_model
from recipes import (
    FAST,
    REAL,
    Work,
    adapted,
    assert_all_found,
    check,
    run_recipe,
    tiny_llama,
    tokens,
    train,
    trainable,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import CompileConfig, Trainer, TrainingArguments

DATASET = [{"input_ids": row, "labels": row} for row in tokens(6)]
STEPS = 3


def _arguments(folder: Path, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **more,
    )


def test_trainer_trains_the_same_adapter(tmp_path: Path) -> None:
    models = {}

    def run(backend: str) -> dict[str, Tensor]:
        torch.manual_seed(1)
        folder = tmp_path / backend
        names = run_recipe(
            "trainer",
            backend,
            base=tiny_llama(),
            dataset=DATASET,
            arguments=_arguments(folder),
            folder=folder,
            get_peft_model=get_peft_model,
            LoraConfig=LoraConfig,
            Trainer=Trainer,
        )
        model = models[backend] = names["model"]
        assert names["trainer"].state.global_step == STEPS
        assert not any("_orig_mod" in name for name in model.state_dict())
        loaded = PeftModel.from_pretrained(tiny_llama(), folder).eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            wanted = model.eval()(input_ids=tokens()).logits
            assert torch.equal(loaded(input_ids=tokens()).logits, wanted)
        return trainable(model)

    ours, _ = check(run)
    assert ours.work.graphs > 0
    assert_all_found(ours, models[RUNLORA])


def test_a_model_compiled_after_the_trainer_is_made(tmp_path: Path) -> None:
    def run(backend: str) -> dict[str, Tensor]:
        model = adapted(tiny_llama())
        trainer = Trainer(model=model, args=_arguments(tmp_path), train_dataset=DATASET)
        model.compile(backend=backend)
        trainer.train()
        return trainable(model)

    ours, _ = check(run, backends=FAST)
    assert ours.work.graphs > 0


@pytest.mark.slow
def test_trainers_checkpointing_breaks_the_graph_as_under_every_backend(tmp_path: Path) -> None:
    why = {}

    def run(backend: str) -> dict[str, Tensor]:
        model = adapted(tiny_llama())
        model.compile(backend=backend)
        arguments = _arguments(
            tmp_path,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
        Trainer(model=model, args=arguments, train_dataset=DATASET).train()
        why[backend] = set(counters["graph_break"])
        return trainable(model)

    ours, _ = check(run, backends=FAST)
    assert ours.work.breaks > 0
    ours_why, other_why = (why[backend] for backend in FAST)
    assert ours_why == other_why
    assert any("requires_grad_()" in reason for reason in ours_why)


def test_trainers_own_flag_does_not_know_the_backend(tmp_path: Path) -> None:
    arguments = _arguments(tmp_path, torch_compile_backend="runlora")
    with pytest.raises(ValueError, match="'RUNLORA' is not a valid DynamoBackend"):
        Trainer(model=adapted(tiny_llama()), args=arguments, train_dataset=DATASET)


@pytest.mark.parametrize(("recipe", "backends"), [("generate", REAL), ("prefill", FAST)])
def test_generated_tokens_are_the_same(recipe: str, backends: tuple[str, str]) -> None:
    prompt = tokens(1)
    models = {}

    def run(backend: str) -> dict[str, Tensor]:
        model = models[backend] = adapted(tiny_llama(use_cache=True)).eval()

        def config(**settings: Any) -> CompileConfig:
            compiled = CompileConfig(**settings)
            compiled._compile_all_devices = True  # on the CPU too
            return compiled

        names = run_recipe(recipe, backend, model=model, prompt=prompt, CompileConfig=config)
        generated = names["generated"]
        assert generated.shape[1] > prompt.shape[1] + 2
        return {"tokens": generated}

    ours, _ = check(run, rtol=0, backends=backends)
    assert ours.work.graphs > 0
    assert_all_found(ours, models[backends[0]])


def test_tied_embeddings_with_an_adapter_on_both() -> None:
    models = {}

    def run(backend: str) -> dict[str, Tensor]:
        base = tiny_llama(tie_word_embeddings=True)
        targets = ["q_proj", "down_proj", "lm_head", "embed_tokens"]
        model = models[backend] = adapted(base, target_modules=targets)
        assert model.get_base_model().lm_head.weight is base.model.embed_tokens.weight
        model.compile(backend=backend)
        return train(model, {"input_ids": tokens(), "labels": tokens()})

    ours, _ = check(run, backends=FAST)
    assert ours.work == Work(graphs=1, breaks=0, recompiles=0)
    assert any("lm_head" in name for name in ours.modules)


def _t5() -> nn.Module:
    torch.manual_seed(0)
    config = hf.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        dropout_rate=0.0,
        use_cache=False,
    )
    return hf.T5ForConditionalGeneration(config)


def _vit() -> nn.Module:
    torch.manual_seed(0)
    return MODELS["vit"].base()


@pytest.mark.parametrize("name", ("vit", pytest.param("t5", marks=pytest.mark.slow)))
def test_training_other_kinds_of_models(name: str) -> None:
    models = {}
    build, batch = {
        "t5": (_t5, {"input_ids": tokens(), "labels": tokens(seed=1, length=20)}),
        "vit": (_vit, MODELS["vit"].batch()),
    }[name]

    def run(backend: str) -> dict[str, Tensor]:
        model = models[backend] = adapted(build())
        model.compile(backend=backend)
        return train(model, batch)

    ours, _ = check(run, backends=FAST)
    assert ours.work.graphs > 0
    assert_all_found(ours, models[FAST[0]])
