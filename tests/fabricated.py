"""Rows of runs that never were, for the tests of tables and experiments; and random generators, for those of
densities."""
import torch


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


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def left_after(density, n: int = 17) -> tuple:
    """What a generator gives after a density of timesteps has drawn n of it: uniform and normal values."""
    generator = generator_of(1)
    density.sample(n, generator)
    return torch.rand(4, generator=generator), torch.randn(4, generator=generator)
