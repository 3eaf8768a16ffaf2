"""What a preset needs, without measuring it: FLOP of a step and memory, counted on a CPU with two clips.

    python -m lab.estimate                              # a table of all presets, both tasks (no GPU needed)
    python -m lab.estimate --out results/estimate.json

FLOP are counted by torch (torch.utils.flop_counter: matrix products and attention, forward and backward).
"Saved" is what autograd keeps for the backward pass; it grows with the clips that are in flight at once:

    memory = weights, gradients, average, optimizer (16 bytes a parameter under AdamW, 12 under Muon)
             + saved a clip x batch / (devices x accumulate)
    time   = steps x FLOP / (peak FLOP/s x share of it that is reached)

Comes in: parts.config.PRESETS. Goes out: a row a preset, as a table and as JSON (MB are 10^6 bytes, GB 10^9).

Public: flop, saved_bytes, estimate, estimate_table.
"""
from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import structure_reg
import train
from parts import config
from parts.arguments import Parser
from parts.audio import RATE
from parts.codec import Codec
from parts.errors import run_cli
from parts.files import to_json, write_text
from parts.teacher import load_teacher
from parts.text import Words

TASKS = ("t2a", "sr")


# --- counting -----------------------------------------------------------------------------------------------

def flop(function) -> int:
    """FLOP of matrix products and attention in function()."""
    counter = FlopCounterMode(display=False)
    with counter:
        function()
    return counter.get_total_flops()


def saved_bytes(loss_of) -> int:
    """Bytes that autograd keeps of loss_of() for its backward pass, each storage once (parameters included
    where it keeps them)."""
    sizes = {}  # address of a storage -> bytes

    def pack(x):
        storage = x.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return x

    def unpack(x):
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss_of()
    return sum(sizes.values())


# --- a preset -----------------------------------------------------------------------------------------------

def estimate(task: str = "t2a", clips: int = 2) -> list[dict]:
    """Rows {task, preset, tokens, batch, steps, parameters, flop_a_step, saved_mb_a_clip (_checkpointing),
    fixed_gb, memory_gb (_checkpointing_accumulate_4)}, one a preset: counted on its network, with `clips`
    random clips, in bfloat16, with guidance."""
    return [_estimate_preset(task, preset, clips) for preset in config.PRESETS]


def _estimate_preset(task: str, preset: str, clips: int) -> dict:
    full = config.resolve({"task": task, "preset": preset, "device": "cpu", "out": "unused"})
    cfg = config.resolve({"task": task, "preset": preset, "device": "cpu", "recipe": "static",
                          "precision": "bf16", "batch": clips, "out": "unused"})
    tokens = Codec(cfg.channels).tokens(round(cfg.seconds * RATE))
    features = load_teacher().features
    batch = _random_batch(cfg, tokens, features)
    row = {"task": task, "preset": preset, "tokens": tokens, "batch": full.batch, "steps": full.steps}

    networks, loss_of = _networks(cfg, features, checkpointing=False)
    row["saved_mb_a_clip"] = _saved_mb_a_clip(loss_of, batch, clips)
    row["parameters"] = _count(networks.model.parameters())
    row["flop_a_step"] = flop(lambda: loss_of(batch).backward()) / clips * full.batch
    networks, loss_of = _networks(cfg, features, checkpointing=True)
    row["saved_mb_a_clip_checkpointing"] = _saved_mb_a_clip(loss_of, batch, clips)

    # 16 bytes a parameter, 4 fewer under Muon, which keeps one moment where AdamW keeps two.
    optimizers = networks.model_optimizers
    under_muon = _count(optimizers[1].param_groups[0]["params"]) if len(optimizers) > 1 else 0
    row["fixed_gb"] = (16 * row["parameters"] - 4 * under_muon) / 1e9
    row["memory_gb"] = row["fixed_gb"] + full.batch * row["saved_mb_a_clip"] / 1e3

    # Under checkpointing one block at a time is there again in the backward pass.
    saved = row["saved_mb_a_clip_checkpointing"]
    block = (row["saved_mb_a_clip"] - saved) / full.depth
    row["memory_gb_checkpointing_accumulate_4"] = row["fixed_gb"] + full.batch / 4 * (saved + block) / 1e3
    return row


def _random_batch(cfg: config.Config, tokens: int, features: int) -> dict:
    """A batch as train.add_noise makes it, of noise."""
    clips = cfg.batch
    batch = {"x0": torch.randn(clips, tokens, cfg.channels), "eps": torch.randn(clips, tokens, cfg.channels),
             "t": torch.rand(clips), "drop": torch.zeros(clips, dtype=torch.bool),
             "phi": torch.randn(clips, tokens, features)}
    if cfg.task == "t2a":
        batch["ids"] = torch.ones(clips, 16, dtype=torch.long)
    else:
        batch["cond"] = torch.randn(clips, tokens, cfg.channels)
    return batch


def _networks(cfg: config.Config, features: int, checkpointing: bool) -> tuple:
    """-> networks of these settings, and their total loss as a function of a batch."""
    cfg.checkpointing = checkpointing
    words = Words(["x"] * 200) if cfg.task == "t2a" else None
    networks = train.build_networks(cfg, words, features, torch.zeros(features))
    driven = train.drive(cfg, 0.0, 0, structure_reg.GroupDetector(cfg.depth))

    def loss_of(batch: dict):
        return train.losses(cfg, networks, batch, 0, driven)["total"]

    return networks, loss_of


def _saved_mb_a_clip(loss_of, batch: dict, clips: int) -> float:
    """What a clip adds, in MB: what does not grow with the clips are the weights."""
    half = clips // 2
    of_half = saved_bytes(lambda: loss_of({name: x[:half] for name, x in batch.items()}))
    of_all = saved_bytes(lambda: loss_of(batch))
    return (of_all - of_half) / (clips - half) / 1e6


def _count(parameters) -> int:
    return sum(p.numel() for p in parameters)


# --- table and command --------------------------------------------------------------------------------------

def estimate_table(rows: list[dict]) -> str:
    lines = [f"{'preset':8s}{'task':5s}parameters  tokens  batch    steps  FLOP a step  "
             "saved a clip (checkpointing)  memory  with --checkpointing --accumulate 4"]
    for row in rows:
        saved = f"{row['saved_mb_a_clip']:8.1f} MB ({row['saved_mb_a_clip_checkpointing']:6.1f} MB)"
        lines.append(f"{row['preset']:8s}{row['task']:5s}{row['parameters'] / 1e6:8.1f} M  "
                     f"{row['tokens']:5d}  {row['batch']:5d}  {row['steps']:7d}  {row['flop_a_step']:11.2e}  "
                     f"{saved}     {row['memory_gb']:7.1f} GB  "
                     f"{row['memory_gb_checkpointing_accumulate_4']:7.1f} GB")
    return "\n".join(lines)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    rows = [row for task in TASKS for row in estimate(task)]
    print(estimate_table(rows))
    if args.out:
        write_text(args.out, to_json(rows, indent=1) + "\n")


if __name__ == "__main__":
    run_cli(main)
