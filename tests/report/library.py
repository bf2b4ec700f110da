"""A synthetic library directory, as the pipeline would leave it, for tests and for looking at."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from tclora.config import Config
from tclora.evaluate.harm import foretold, summarise_cross
from tclora.evaluate.winners import winners
from tclora.files import sha256_path

K = 6
TRAIN_TASKS = (
    "arithmetic",
    '<b>bold</b> & "quotes"',
    "dates_$x^2$",
    "sorting",
    "spelling",
    "units",
)
OOD_TASKS = ("chess & checkers", "riddles")
COMPOSITION_TASK = "dates + units"
ANSWER = "42 <i>units</i>"
HELD_OUT = ("test", "ood", "composition")
COLUMNS = ["id", "prompt", "task", "split", "cluster", "similarity", "x", "y"]
UNLISTED = ("library.json", "report.html")
SCRIPT = "<script>alert('prompt')</script>"
MERGES = {"tc-lora": 0.94, "regmean": 0.91, "uniform": 0.57, "ties": 0.44, "task-arithmetic": -0.9}
METHODS = ("base", "own", "joint", *MERGES)


def build_library(folder: Path, *, labelled: bool = True) -> Path:
    """Write a library of K clusters; `labelled` says whether the rows have task labels."""
    rng = np.random.default_rng(0)
    for name in ("training", "evaluation"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    clusters = _clusters(rng)
    if not labelled:
        clusters["task"] = None
    items = _items(rng, clusters)
    clusters.to_parquet(folder / "clusters.parquet")
    _curve(rng).to_parquet(folder / "explained_variance.parquet")
    _routing(clusters).to_parquet(folder / "routing.parquet")
    items.to_parquet(folder / "evaluation/items.parquet")
    _summary(items, labelled).to_parquet(folder / "evaluation/summary.parquet")
    _recovery(rng).to_parquet(folder / "evaluation/recovery.parquet")
    winners(items, resamples=100).to_parquet(folder / "evaluation/winners.parquet")
    _pairs(np.random.default_rng(1)).to_parquet(folder / "interference.parquet")
    _shared(np.random.default_rng(2)).to_parquet(folder / "shared_structure.parquet")
    _by_module(np.random.default_rng(3)).to_parquet(folder / "interference_modules.parquet")
    crossed = summarise_cross(_crossed(np.random.default_rng(4)), resamples=100)
    crossed.to_parquet(folder / "evaluation/cross.parquet")
    harm = foretold(crossed, pd.read_parquet(folder / "interference.parquet"), resamples=100)
    harm.to_parquet(folder / "evaluation/harm.parquet")
    for name in [*(f"cluster-{k}" for k in range(K - 1)), "joint"]:
        log = _log(rng, 240 if name == "joint" else 60)
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


def _clusters(rng):
    rows = []
    centres = rng.normal(0, 3, (K, 2))
    tasks = [(task, "train", 60) for task in TRAIN_TASKS]
    tasks += [(task, "test", 12) for task in TRAIN_TASKS]
    tasks += [(task, "ood", 12) for task in OOD_TASKS] + [(COMPOSITION_TASK, "composition", 12)]
    for task, split, n in tasks:
        home = TRAIN_TASKS.index(task) if task in TRAIN_TASKS else len(task) % K
        for i in range(n):
            cluster = home if rng.random() < 0.93 else int(rng.integers(K))
            x, y = centres[cluster] + rng.normal(0, 0.7, 2)
            prompt = f"{SCRIPT} {task}: what follows {i}? {'Explain each step. ' * (i % 9)}"
            rows.append(
                (f"{len(rows):06x}", prompt, task, split, cluster, rng.uniform(0.5, 0.9), x, y)
            )
    frame = pd.DataFrame(rows, columns=COLUMNS)
    frame.loc[frame.index[:3], "cluster"] = -1
    return frame


def _routing(clusters):
    """Known prompts go to their cluster; out-of-domain ones are unknown."""
    rows = clusters[clusters["split"] != "train"].drop(columns=["x", "y"])
    weights = pd.get_dummies(rows["cluster"]).astype("float32").add_prefix("cluster-")
    known = rows["split"] != "ood"
    rows = rows.assign(true=rows["cluster"], nearest=rows["cluster"], known=known, confidence=0.9)
    return pd.concat([rows, weights], axis=1).reset_index(drop=True)


def _curve(rng):
    rows = []
    for rank in (1, 2, 4, 8, 16, 32, 64):
        whole = 1 - 0.9 * np.exp(-rank / 9)
        rows.append(("overall", rank, whole))
        rows += [(f"layers.{i}.q", rank, whole ** rng.uniform(0.7, 1.5)) for i in range(20)]
    return pd.DataFrame(rows, columns=["module", "rank", "explained_variance"])


def _items(rng, clusters):
    rows = []
    for method in METHODS:
        share = {"base": 0.0, "own": 1.0, "joint": 0.97}.get(method, MERGES.get(method))
        held_out = clusters[clusters["split"].isin(["test"] if method == "own" else HELD_OUT)]
        n = len(held_out)
        tokens = rng.integers(3, 9, n)
        right = (rng.random(n) < 0.15 + 0.6 * max(0, share)).astype(float)
        rows.append(
            held_out[["split", "task", "cluster", "id", "prompt"]].assign(
                method=method,
                answer=ANSWER,
                tokens=tokens,
                nll=tokens * (2.6 - 1.5 * share + rng.normal(0, 0.3, n)),
                correct=right,
                generated=np.where(right > 0, ANSWER, "about 40\nor so"),
            )
        )
    return pd.concat(rows, ignore_index=True)


def _summary(items, labelled):
    rows = []
    kinds = {"cluster": "cluster", "all": items["split"].map(lambda _: "all")}
    if labelled:
        kinds["task"] = "task"
    for kind, by in kinds.items():
        for (method, split, group), part in items.groupby(["method", "split", by]):
            names = {"method": method, "split": split, "group_kind": kind, "group": str(group)}
            rows.append(names | _scores(part, accurate=group != "spelling"))
    return pd.DataFrame(rows)


def _scores(part, *, accurate):
    nll = part["nll"].sum() / part["tokens"].sum()
    accuracy = part["correct"].mean() if accurate else np.nan
    half = 0.9 / len(part) ** 0.5
    scores = {"n": len(part), "nll": nll, "nll_low": nll - half / 3, "nll_high": nll + half / 3}
    ends = {"accuracy_low": accuracy - half, "accuracy_high": accuracy + half}
    return scores | {"accuracy": accuracy} | {k: min(1, max(0, v)) for k, v in ends.items()}


def _recovery(rng):
    rows = []
    for method, mean in {"joint": 0.97, **MERGES}.items():
        noise = rng.normal(0, 0.06, K)
        values = mean + noise - noise.mean()
        named = {str(k): value for k, value in enumerate(values)}
        named |= {"mean": values.mean(), "worst": values.min()}
        rows += [
            (method, name, 20, value, value - 0.05, value + 0.04) for name, value in named.items()
        ]
    frame = pd.DataFrame(rows, columns=["method", "cluster", "n", "recovery", "low", "high"])
    frame.loc[frame["cluster"] == "mean", "n"] = 20 * K
    frame.loc[frame["cluster"] == "worst", ["low", "high"]] = np.nan
    return frame


def _pairs(rng):
    first, second = np.triu_indices(K, k=1)
    pairs = pd.DataFrame(
        {"first": [f"cluster-{k}" for k in first], "second": [f"cluster-{k}" for k in second]}
    )
    pairs["cosine"] = rng.uniform(-0.1, 0.2, len(pairs))
    for measure in ("input_overlap", "output_overlap", "sign_conflict"):
        pairs[measure] = rng.uniform(0, 1, len(pairs))
    for measure in ("input_angle", "output_angle", "input_nearest", "output_nearest"):
        pairs[measure] = rng.uniform(20, 90, len(pairs))
    return pairs


def _by_module(rng):
    pairs = _pairs(rng)[["first", "second"]]
    modules = [*(f"model.layers.{i}.{part}" for i in range(4) for part in ("q", "up")), "head"]
    parts = [pairs.assign(module=module) for module in modules]
    table = pd.concat(parts, ignore_index=True)
    return table.assign(
        sign_conflict=rng.uniform(0, 0.5, len(table)), weight=rng.uniform(1, 2, len(table))
    )


def _crossed(rng):
    """Forty rows of every cluster; added adapters do harm, each by an amount of its own."""
    rows = []
    for cluster in range(K):
        own, level = f"cluster-{cluster}", 4 * rng.normal(1.1, 0.2, 40)
        for adapter in ("base", *(f"cluster-{k}" for k in range(K))):
            for added in (False, True) if adapter not in ("base", own) else (False,):
                rise = rng.uniform(-0.05, 0.4) if added else 1.2 * (adapter != own)
                rows += [
                    (f"{cluster}-{i}", cluster, adapter, added, nll + (3 + 0.05 * i) * rise, 4)
                    for i, nll in enumerate(level)
                ]
    return pd.DataFrame(rows, columns=["id", "cluster", "adapter", "added", "nll", "tokens"])


def _shared(rng):
    """Two modules of each of four layers, and a head outside them."""
    modules = [*(f"model.layers.{i}.{part}" for i in range(4) for part in ("q", "up")), "head"]
    shared = rng.uniform(0, 0.3, len(modules))
    return pd.DataFrame(
        {
            "module": modules,
            "rank": 4,
            "energy": rng.uniform(0.5, 1, len(modules)),
            "shared": shared,
            "spread": 1 + shared * (K - 1),
            "core_consistency": [12.0, -340.0, np.nan, *[99.0] * (len(modules) - 3)],
        }
    )


def _log(rng, steps):
    done = np.arange(1, steps + 1)
    loss = 1 + 1.6 * np.exp(-done / (0.15 * steps)) + rng.normal(0, 0.12, steps)
    return [
        {"step": int(s), "loss": x, "lr": 2e-4, "grad_norm": 1.0, "tokens": 900, "seconds": 0.5 * s}
        for s, x in zip(done.tolist(), loss.tolist(), strict=True)
    ]


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
