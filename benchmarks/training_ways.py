"""Ways to train one adapter per file of rows, for ``benchmarks/training.py``.

Seconds are those of the training loops alone, without imports, loading and writing.
"""

import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, Trainer, TrainingArguments

from tclora.config import AdapterConfig
from tclora.model.base import Base
from tclora.model.locate import BUILTIN_BASE, locate_base_model
from tclora.model.tokens import TokenRow
from tclora.train.course import peak_memory
from tclora.train.engines import AdapterRequest, train_adapters
from tclora.train.lora import attach_lora

ENGINES = ("separate", "together")
RIVAL = "Trainer + PEFT"
PROBE_TOKENS, PROBE_SECONDS = 1024, 1.0


def base_model(dtype: str) -> Base:
    """Return SmolLM2-135M-Instruct and how it reads rows."""
    place = locate_base_model(BUILTIN_BASE)
    return Base(location=place, digest=BUILTIN_BASE, dtype=dtype, template="chat", max_tokens=512)


def measure(way: str, folder: Path, steps: int, batch_size: int, dtype: str) -> dict[str, float]:
    """Train one adapter per Parquet file of the folder; return the figures.

    The bound is the rate of the model's own matrix products, measured before and after the
    training, over the operations that training needs.
    """
    base = base_model(dtype)
    config = AdapterConfig(max_steps=steps, batch_size=batch_size, epochs=1000)
    files = sorted(folder.glob("*.parquet"))
    loaded = base.load()
    rows = {file: loaded.encode(file) for file in files}
    shapes = _shapes(loaded.model)
    needed = operations(loaded.model, config, [row for part in rows.values() for row in part])
    before = _product_rate(shapes, loaded.model.dtype)
    del loaded
    cpu = time.process_time()
    if way == RIVAL:
        seconds, loss = _trainer(base, rows, config)
    else:
        seconds, loss = by_engine(way, base, files, config)
    cpu = time.process_time() - cpu
    peak = peak_memory()
    rate = (before + _product_rate(shapes, getattr(torch, dtype))) / 2
    tokens = sum(len(row) for part in rows.values() for row in part)
    return {
        "tokens/s": tokens / seconds,
        "share of the bound": needed / rate / seconds,
        "products (GFLOP/s)": rate / 1e9,
        "seconds": seconds,
        "CPU seconds": cpu,
        "tokens": tokens,
        "peak (MB)": peak / 1e6,
        "mean loss": loss,
    }


def by_engine(
    engine: str, base: Base, files: list[Path], config: AdapterConfig
) -> tuple[float, float]:
    """Train one adapter per file by an engine; return the loops' seconds and the mean loss."""
    out = files[0].parent / engine
    requests = [
        AdapterRequest(
            name=file.stem, rows=file, target=out / file.stem, checkpoint=out / f"{file.stem}.part"
        )
        for file in files
    ]
    results = train_adapters(
        engine=engine, base=base, requests=requests, config=config,
        checkpoint_steps=config.max_steps or 1,
    ).values()  # fmt: skip
    spent = [result.history[-1]["seconds"] for result in results]
    loss = sum(result.final_loss for result in results) / len(results)
    return max(spent) if engine == "together" else sum(spent), loss


def _trainer(
    base: Base, rows: dict[Path, list[TokenRow]], config: AdapterConfig
) -> tuple[float, float]:
    """Train by `transformers.Trainer` and PEFT's layers, padded to the longest row of a batch."""
    seconds, losses = 0.0, []
    for file, own in rows.items():
        loaded = base.load()
        trainer = Trainer(
            model=attach_lora(loaded.model, config, seed=0),
            args=TrainingArguments(
                output_dir=str(file.with_suffix(".trainer")),
                max_steps=config.max_steps or 1,
                per_device_train_batch_size=config.batch_size,
                learning_rate=config.lr,
                lr_scheduler_type=config.schedule,
                bf16=loaded.model.dtype == torch.bfloat16,
                use_cpu=not torch.cuda.is_available(),
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=[_features(row) for row in own],
            data_collator=DataCollatorForSeq2Seq(loaded.tokenizer),
        )
        done = trainer.train()
        seconds += done.metrics["train_runtime"]
        losses.append(done.training_loss)
    return seconds, sum(losses) / len(losses)


def _features(row: TokenRow) -> dict[str, list[int]]:
    ids = [*row.prompt, *row.response]
    labels = [-100] * len(row.prompt) + list(row.response)
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _linear_layers(model: PreTrainedModel) -> list[torch.nn.Linear]:
    """Return the linear layers that every token passes through."""
    head = model.get_output_embeddings()
    return [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]


def _shapes(model: PreTrainedModel) -> Counter[tuple[int, ...]]:
    return Counter(tuple(layer.weight.shape) for layer in _linear_layers(model))


def operations(model: PreTrainedModel, config: AdapterConfig, rows: list[TokenRow]) -> float:
    """Return the operations that training on every row once needs.

    Forward pass and gradients of activations of every linear layer, forward pass and both gradients
    of the adapters, and the output layer where a response token is predicted. Attention's own
    products and everything elementwise are left out.
    """
    layers = _linear_layers(model)
    weights = sum(layer.weight.numel() for layer in layers)
    trained = sum(config.r * sum(layer.weight.shape) for layer in layers)
    head: Any = model.get_output_embeddings()
    tokens = sum(map(len, rows))
    supervised = sum(len(row.response) for row in rows)
    return tokens * (4 * weights + 6 * trained) + supervised * 4 * head.weight.numel()


def _product_rate(shapes: Counter[tuple[int, ...]], dtype: torch.dtype) -> float:
    """Return operations per second of forward products of these shapes, as often as each occurs."""
    pairs = [
        (torch.randn(PROBE_TOKENS, d_in).to(dtype), torch.randn(d_out, d_in).to(dtype), count)
        for (d_out, d_in), count in shapes.items()
    ]
    unit = math.gcd(*shapes.values())
    operations, begin = 0.0, 0.0
    for number in range(1_000_000):
        if number == 1:  # the first prepares
            begin = time.perf_counter()
        for x, weight, count in pairs:
            for _ in range(count // unit):
                x @ weight.mT
                operations += 2 * PROBE_TOKENS * weight.numel() if number else 0
        if number and time.perf_counter() - begin > PROBE_SECONDS:
            break
    return operations / (time.perf_counter() - begin)
