"""What do the blocks of a trained network add, and is it alike? What the structure loss acts on.

    python -m lab.block_work runs/without runs/with --out results/block-work.json

For each run the matrix (L, L) of mean cos^2 between the increments u_l = h_l - h_(l-1) of its blocks,
averaged over a clip's tokens and less their mean over 64 validation clips, at t = 0.7: what
structure_reg.grouped_loss takes the mean of, with each block in a group of its own. And `between_groups`: the
loss itself, for groups by depth.

Public: main, block_work.
"""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import data
import evaluate
import structure_reg
from model import predict
from parts.arguments import Parser, new_json
from parts.config import Config
from parts.errors import UserError, run_cli
from parts.files import to_json, write_text
from parts.latents import LatentCache
from sampler import LogitNormal

CLIPS, T = 64, 0.7


@torch.no_grad()
def block_work(run: evaluate.Run) -> dict:
    """-> {"cos2": (L, L) nested lists, "between_groups": structure loss of groups by depth}."""
    clips = data.open_set(run.config, "val", 256)
    latents = LatentCache(clips, run.codec)
    muffled = LatentCache(clips, run.codec, 1) if run.config["task"] == "sr" else None
    ids = [] if run.words is None else run.words.cache([[clips.caption(i)] for i in range(len(clips))])
    drawn = data.draw_batch(latents, muffled, CLIPS, run.tokens, np.random.default_rng(0))
    batch = data.add_noise(drawn, ids, Config(**run.config), torch.Generator().manual_seed(0), LogitNormal())
    batch["t"] = torch.full_like(batch["t"], T)
    _, hs, _ = predict(run.model, batch, drop=False)

    L = len(hs) - 1
    cos2 = np.eye(L)
    for i, j in zip(*np.triu_indices(L, 1)):
        pair = [hs[0], hs[0] + hs[i + 1] - hs[i], hs[0] + hs[i + 1] - hs[i] + hs[j + 1] - hs[j]]
        cos2[i, j] = cos2[j, i] = structure_reg.grouped_loss(pair, [0, 1], batch.get("mask"))
    groups = structure_reg.depth_groups(L, structure_reg.GroupDetector(L).G)
    between = structure_reg.grouped_loss(hs, groups, batch.get("mask"))
    return {"cos2": cos2.round(4).tolist(), "groups": groups, "between_groups": float(between)}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=new_json, required=True, help="JSON")
    args = parser.parse_args()
    result = {}
    for path in args.runs:
        run = evaluate.load_run(path)
        if run.config["depth"] < 2:
            raise UserError(f"{path}: has one block; nothing to compare")
        kept = ("task", "structure", "struct_loss", "struct_share", "depth", "width", "steps", "seed")
        if path.name in result:
            raise UserError(f"{path}: another run is called {path.name} too; rename one of the folders")
        result[path.name] = {**{name: run.config[name] for name in kept}, **block_work(run)}
        print(f"{path.name}: cos^2 between groups by depth {result[path.name]['between_groups']:.3f}")
    write_text(args.out, to_json(result, indent=1) + "\n")


if __name__ == "__main__":
    run_cli(main)
