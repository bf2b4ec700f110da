"""The tables of a synthetic library, drawn at random."""

import numpy as np
import pandas as pd

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
SCRIPT = "<script>alert('prompt')</script>"
MERGES = {"tc-lora": 0.94, "regmean": 0.91, "uniform": 0.57, "ties": 0.44, "task-arithmetic": -0.9}
METHODS = ("base", "own", "joint", *MERGES)


def draw_clusters(rng):
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


def draw_routing(clusters):
    """Known prompts go to their cluster; out-of-domain ones are unknown."""
    rows = clusters[clusters["split"] != "train"].drop(columns=["x", "y"])
    weights = pd.get_dummies(rows["cluster"]).astype("float32").add_prefix("cluster-")
    known = rows["split"] != "ood"
    rows = rows.assign(true=rows["cluster"], nearest=rows["cluster"], known=known, confidence=0.9)
    return pd.concat([rows, weights], axis=1).reset_index(drop=True)


def draw_curve(rng):
    rows = []
    for rank in (1, 2, 4, 8, 16, 32, 64):
        whole = 1 - 0.9 * np.exp(-rank / 9)
        rows.append(("overall", rank, whole))
        rows += [(f"layers.{i}.q", rank, whole ** rng.uniform(0.7, 1.5)) for i in range(20)]
    return pd.DataFrame(rows, columns=["module", "rank", "explained_variance"])


def draw_items(rng, clusters):
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


def draw_summary(items, labelled):
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


def draw_recovery(rng):
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


def draw_pairs(rng):
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


def draw_by_module(rng):
    pairs = draw_pairs(rng)[["first", "second"]]
    modules = [*(f"model.layers.{i}.{part}" for i in range(4) for part in ("q", "up")), "head"]
    parts = [pairs.assign(module=module) for module in modules]
    table = pd.concat(parts, ignore_index=True)
    return table.assign(
        sign_conflict=rng.uniform(0, 0.5, len(table)), weight=rng.uniform(1, 2, len(table))
    )


def draw_crossed(rng):
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


def draw_shared(rng):
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


def draw_log(rng, steps):
    done = np.arange(1, steps + 1)
    loss = 1 + 1.6 * np.exp(-done / (0.15 * steps)) + rng.normal(0, 0.12, steps)
    return [
        {"step": int(s), "loss": x, "lr": 2e-4, "grad_norm": 1.0, "tokens": 900, "seconds": 0.5 * s}
        for s, x in zip(done.tolist(), loss.tolist(), strict=True)
    ]
