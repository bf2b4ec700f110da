"""A synthetic library directory, as the pipeline would leave it, for tests and for looking at."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from tclora.config import Config
from tclora.evaluate.harm import foretold, summarise_cross
from tclora.evaluate.winners import winners
from tclora.files import sha256_path
from tests.report.frames import (
    MERGES,
    K,
    draw_by_module,
    draw_clusters,
    draw_crossed,
    draw_curve,
    draw_items,
    draw_log,
    draw_pairs,
    draw_recovery,
    draw_routing,
    draw_shared,
    draw_summary,
)

UNLISTED = ("library.json", "report.html")


def build_library(folder: Path, *, labelled: bool = True) -> Path:
    """Write a library of K clusters; `labelled` says whether the rows have task labels."""
    rng = np.random.default_rng(0)
    for name in ("training", "evaluation"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    clusters = draw_clusters(rng)
    if not labelled:
        clusters["task"] = None
    items = draw_items(rng, clusters)
    clusters.to_parquet(folder / "clusters.parquet")
    draw_curve(rng).to_parquet(folder / "explained_variance.parquet")
    draw_routing(clusters).to_parquet(folder / "routing.parquet")
    items.to_parquet(folder / "evaluation/items.parquet")
    draw_summary(items, labelled).to_parquet(folder / "evaluation/summary.parquet")
    draw_recovery(rng).to_parquet(folder / "evaluation/recovery.parquet")
    winners(items, resamples=100).to_parquet(folder / "evaluation/winners.parquet")
    draw_pairs(np.random.default_rng(1)).to_parquet(folder / "interference.parquet")
    draw_shared(np.random.default_rng(2)).to_parquet(folder / "shared_structure.parquet")
    draw_by_module(np.random.default_rng(3)).to_parquet(folder / "interference_modules.parquet")
    crossed = summarise_cross(draw_crossed(np.random.default_rng(4)), resamples=100)
    crossed.to_parquet(folder / "evaluation/cross.parquet")
    harm = foretold(crossed, pd.read_parquet(folder / "interference.parquet"), resamples=100)
    harm.to_parquet(folder / "evaluation/harm.parquet")
    for name in [*(f"cluster-{k}" for k in range(K - 1)), "joint"]:
        log = draw_log(rng, 240 if name == "joint" else 60)
        (folder / f"training/{name}.json").write_text(json.dumps(log))
    for k in range(K):
        (folder / f"adapters/cluster-{k}").mkdir(parents=True)
        (folder / f"adapters/cluster-{k}/adapter_config.json").write_text("{}")
    (folder / "library.json").write_text(json.dumps(_manifest()))
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    """List the files of a library as they are now, as a run would that had written them."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in files]
    digests = {name: sha256_path(folder / name) for name in names if name not in UNLISTED}
    edit_manifest(folder, digests=digests)


def edit_manifest(folder: Path, **changes) -> None:
    path = folder / "library.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _job(**changes):
    done = {"steps": 60, "supervised_tokens": 54000, "final_loss": 1.043, "seconds": 312.4}
    return done | {"rows": 60, "status": "done", "error": None} | changes


def _manifest():
    training = {f"cluster-{k}": _job() for k in range(K - 1)}
    training[f"cluster-{K - 1}"] = _job(
        status="failed",
        error="loss became NaN at step 12 <in batch 3>; lower train.lr",
        final_loss=None,
        steps=12,
        supervised_tokens=10800,
        seconds=61.0,
    )
    training["joint"] = _job(steps=240, supervised_tokens=324000, seconds=1873.0, rows=360)
    config = Config.model_validate({"name": "demo", "merge": {"methods": list(MERGES)}})
    adapter = 19_537_920
    storage = {"separate_adapters": K * adapter, "factors": adapter + 84_000}
    merges = {
        name: {
            "rank": 96 if name == "ties" else 16,
            "parameters": adapter // 4,
            "bytes": adapter,
            "notes": "division by counts, election by mass" if name == "ties" else "",
            "truncation_loss": 0.034 if name == "ties" else 0.0,
        }
        for name in MERGES
    }
    profile = {
        "rows_train": 360.0,
        "rows_test": 72.0,
        "rows_ood": 24.0,
        "rows_composition": 12.0,
        "rows": 468.0,
        "tasks": 9.0,
        "skipped_rows": 2.0,
        "repeated_prompts": 0.0,
        "prompt_tokens_mean": 61.27,
        "prompt_tokens_max": 214.0,
        "response_tokens_mean": 5.6,
        "response_tokens_max": 9.0,
        "truncated_rows": 1.0,
    }
    return {
        "schema": 2,
        "name": "demo <run>",
        "created": "2025-01-02T03:04:05+00:00",
        "config": config.model_dump(mode="json"),
        "base_model": {"id": "smollm2-135m-instruct", "location": "built in", "digest": "ab" * 32},
        "embedding_model": {"id": "all-minilm-l6-v2", "digest": "cd" * 32},
        "profile": profile,
        "clustering": {
            "method": "kmeans",
            "k": K,
            "silhouette": 0.312,
            "ari": 0.871,
            "nmi": 0.884,
            "notices": ["3 rows were dropped as noise."],
        },
        "training": training,
        "factors": {"rank": 16, "explained_variance": 0.847},
        "merges": merges,
        "routed": {
            "accuracy": 0.987,
            "calibration_error": 0.012,
            "coverage_test": 0.99,
            "coverage_ood": 0.0,
            "bytes_share": 0.173,
            "calibration_curve": [
                {"low": 0.8, "n": 12, "confidence": 0.87, "accuracy": 0.75},
                {"low": 0.9, "n": 60, "confidence": 0.99, "accuracy": 1.0},
            ],
            "method": "tc-lora",
            "router": "nearest",
            "by_token": False,
        },
        "storage": storage,
        "links": {"mlflow_run": "https://mlflow.example/runs/1", "prefect_flow_run": None},
        "versions": {"tclora": "0.1.0", "torch": "2.6.0"},
        "digests": {},
    }
