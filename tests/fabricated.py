"""Rows of runs that never were, for the tests of tables and experiments; random generators, for those of
densities; noise."""
import json
import zlib
from pathlib import Path

import numpy as np
import torch

from lab.runner import folder_of, resolve_arm
from parts.audio import RATE
from parts.config import save_config


def half(arm, seed, k=None) -> float:
    return 0.5


def fabricated_rows(arms, seeds, final, curve=half, steps=(10, 20, 40, 80), **more) -> list[dict]:
    """Rows as lab.runner.collect writes them. final(arm, seed): accuracy of the final table; curve(arm, seed,
    step): accuracy on the way; more: other qualities, functions like curve."""
    rows = []
    for arm in arms:
        for seed in seeds:
            for k in steps:
                row = {"experiment": "x", "arm": arm, "seed": seed, "step": k, "seconds": k / 2, "r": 0.0,
                       "event_accuracy": curve(arm, seed, k)}
                row |= {name: quality(arm, seed, k) for name, quality in more.items()}
                if k == steps[-1]:
                    row["final"] = {"exact": final(arm, seed)}
                rows.append(row)
    return rows


def fabricated_run(out: Path, arm: str, options: dict, seed: int, seeds: list[int]) -> Path:
    """In the place of lab.runner.run_arm: a finished run, whose qualities follow from its name."""
    path = folder_of(out, arm, seed)
    path.mkdir(parents=True)
    save_config(path, resolve_arm(options, seed=seed))
    quality = 0.5 + zlib.crc32(path.name.encode()) / 2**33
    lines = [{"step": 8, "D": 3.0}, {"step": 32, "D": 5.0}]
    lines += [{"step": k, "r": k / 40, "eval": {"val_loss": 1.0, "val_loss_t": [1.0], "seconds": k / 2,
                                               "event_accuracy": quality * k / 40}} for k in (10, 20, 40)]
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = {"x": {"protocol": {}, "rows": [{"row": "model", "exact": quality}]}}
    (path / "scores.json").write_text(json.dumps(scores))
    return path


def gaussian(n=RATE * 2, seed=0) -> np.ndarray:
    """White noise (N,) of RMS 0.1."""
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32) * 0.1


def pairs(n=2) -> list[tuple]:
    """(caption, real (N,), made (N,)) of previews."""
    clips = gaussian(n * 2 * RATE).reshape(n, 2, RATE)
    return [(f"$caption {k}: rain, then wind_", real, made) for k, (real, made) in enumerate(clips)]


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def left_after(density, n: int = 17) -> tuple:
    """What a generator gives after a density of timesteps has drawn n of it: uniform and normal values."""
    generator = generator_of(1)
    density.sample(n, generator)
    return torch.rand(4, generator=generator), torch.randn(4, generator=generator)
