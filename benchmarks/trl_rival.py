"""TRL's `SFTTrainer` with packing, for ``benchmarks/training_gpu.py``."""

import importlib.util
from pathlib import Path
from typing import Any

from drawn_models import Clock, Rows, clean, draw_model

from tclora.config import AdapterConfig
from tclora.train.lora import attach_lora

PACK = 1024  # tokens of a sequence


def trl(
    name: str, rows: Rows, config: AdapterConfig, folder: Path, *, liger: bool
) -> tuple[float, float]:
    """Train by TRL, one adapter after the other, rows packed."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Watch(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.clock = Clock()

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ANN401
            self.clock.see({"step": state.global_step - 1})

    seconds, tokens = 0.0, 0.0
    for own in rows:
        clean()
        flash = importlib.util.find_spec("flash_attn") is not None
        model = draw_model(name, "flash_attention_2" if flash else "sdpa")
        steps = config.max_steps or 1
        per_step = sum(map(len, own)) / steps
        watch = Watch()
        data = Dataset.from_list([
            {"input_ids": [*row.prompt, *row.response],
             "completion_mask": [0] * len(row.prompt) + [1] * len(row.response)}
            for row in own
        ])  # fmt: skip
        trainer = SFTTrainer(
            model=attach_lora(model, config, 0),
            args=SFTConfig(
                output_dir=str(folder / "trl"), max_steps=steps, packing=True, max_length=PACK,
                per_device_train_batch_size=max(1, round(per_step / PACK)), bf16=True,
                learning_rate=config.lr, gradient_checkpointing=False, report_to=[],
                save_strategy="no", logging_strategy="no", disable_tqdm=True,
                use_liger_kernel=liger, completion_only_loss=True,
            ),
            train_dataset=data,
            processing_class=_tokenizer(),
            callbacks=[watch],
        )  # fmt: skip
        packed = trainer.train_dataset
        mean = sum(map(len, packed["input_ids"])) / len(packed)
        trainer.train()
        seconds += watch.clock.per_step
        tokens += mean * trainer.args.per_device_train_batch_size
    return seconds, tokens


def _tokenizer() -> Any:  # noqa: ANN401
    """Return the tokenizer that TRL wants beside rows in tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    ends = {"pad_token": "<pad>", "eos_token": "</s>"}
    known = {token: number for number, token in enumerate(ends.values())}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(known, [])), **ends)
