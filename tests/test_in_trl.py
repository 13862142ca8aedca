"""TRL: supervised fine-tuning by the recipe of `docs/integrations.md`."""

from pathlib import Path
from typing import Any

import pytest
from recipes import (
    FAST,
    adapted,
    assert_all_found,
    check,
    run_recipe,
    tiny_llama,
    tokens,
    trainable,
)
from torch import Tensor

VOCAB = 64


def tokenizer() -> Any:
    """A tokenizer of as many words as the model has; it is not asked for any of them."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    model = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="</s>")


def test_sft_trains_the_same_adapter(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    settings = {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    models = {}

    def run(backend: str) -> dict[str, Tensor]:
        names = run_recipe(
            "trl",
            backend,
            base=tiny_llama(),
            LoraConfig=lambda **settings: settings,
            get_peft_model=lambda base, settings: adapted(base, **settings),
            SFTConfig=trl.SFTConfig,
            SFTTrainer=trl.SFTTrainer,
            settings=settings,
            dataset=datasets.Dataset.from_list([{"input_ids": row.tolist()} for row in tokens(4)]),
            tokenizer=tokenizer(),
        )
        assert names["trainer"].state.global_step == 2
        models[backend] = names["model"]
        return trainable(names["model"])

    ours, _ = check(run, backends=FAST)
    assert_all_found(ours, models[FAST[0]])
    assert max(report.flops_before - report.flops_after for report in ours.reports) > 0
