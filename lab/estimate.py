"""What a preset needs, without measuring it: work and memory of a step, counted on a CPU with two clips.

    python -m lab.estimate                              # a table of all presets, both tasks (no GPU needed)
    python -m lab.estimate --out results/estimate.json

A step is losses, backward pass and update, under guidance, in bfloat16. Counted are

    FLOP      of matrix products and attention (torch.utils.flop_counter)
    launches  kernels that are started: operations of torch that compute something, as a CPU is given them. On
              a GPU a few are cut in two or joined; an operation on a list of tensors counts as one
    bytes     what these operations read and write, as if nothing stayed in a cache: more than a GPU moves
    saved     what autograd keeps for the backward pass; it grows with the clips that are in flight at once

What grows with the clips is told from what does not (the update) by counting twice, with one clip and two.

    memory = weights, average, optimizer (16 bytes a parameter under AdamW, 12 under Muon), gradients (4 more)
             where a batch is cut into parts, + saved a clip x batch / (devices x accumulate)
    step   = the longer of launches x 15 us (the processor's time)                                 # ASSUMED
             and FLOP / (0.4 x peak FLOP/s) + bytes / (bytes/s) (the card's)                       # ASSUMED

Comes in: parts.config.PRESETS. Goes out: a row a preset, as a table and as JSON (MB are 10^6 bytes, GB 10^9).
No GPU has confirmed the seconds; lab/check_device.py measures them.

Public: flop, saved_bytes, Work, work, CARDS, step_seconds, count_step, estimate, estimate_table.
"""
from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import structure_reg
import train
from parts import config
from parts.arguments import Parser, new_json
from parts.audio import RATE
from parts.codec import Codec
from parts.errors import run_cli
from parts.files import to_json, write_text
from parts.teacher import load_teacher
from parts.text import Words

TASKS = ("t2a", "sr")
CLIPS = 2           # random clips that work is counted with
LAUNCH_S = 15e-6   # seconds of the processor a launch, Python and autograd included  # ASSUMED
REACHED = 0.4      # share of the peak that matrix products reach                     # ASSUMED
CARDS = {          # by their makers: FLOP/s in bfloat16 without sparsity, bytes/s of memory
    "H100": (989e12, 3.35e12),
    "RTX 4060": (30e12, 272e9),  # a card of 8 GB
}


# --- counting -----------------------------------------------------------------------------------------------

def _attention(query, key, value, *_, **__) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient, query, key, value, *_, **__) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# torch's counter knows the kernels of a GPU alone, and counts a CPU's attention as nothing. Shapes -> FLOP.
ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
          torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward}


def flop(function) -> int:
    """FLOP of matrix products and attention in function()."""
    counter = FlopCounterMode(display=False, custom_mapping=ON_CPU)
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


class Work(NamedTuple):
    """Of a step, or a part of one."""
    flop: float
    launches: float
    bytes: float


class _Launches(TorchDispatchMode):
    """Sees every operation below autograd, those of the backward pass too, after composite ones have been
    taken apart; counts those that compute, and the bytes of their tensors. Matrix products are counted and
    not computed (random numbers stand for them): a count needs shapes alone."""

    NOTHING = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view",
               "_local_scalar_dense", "is_same_size", "resize_", "_record_function_enter_new",
               "_record_function_exit")
    FACTORS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # where they begin among the arguments

    def __init__(self):
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        if name in self.FACTORS:
            a, b = args[self.FACTORS[name] :][:2]                          # (..., n, k), (..., k, m)
            out = a.new_empty(*a.shape[:-1], b.shape[-1]).uniform_(-1, 1)
        else:
            out = operation(*args, **(kwargs or {}))
        returned = [value.alias_info for value in operation._schema.returns]
        a_view = any(alias is not None and not alias.is_write for alias in returned)
        if not a_view and name not in self.NOTHING:
            self.launches += 1
            self.bytes += sum(map(_bytes_of, tree_leaves((args, kwargs, out))))
        return out


def _bytes_of(x) -> int:
    """Bytes of a tensor's elements; of an expanded one, those that there are. 0: not a tensor."""
    if not isinstance(x, torch.Tensor):
        return 0
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def work(function) -> Work:
    """What function() asks for."""
    flops, launches = FlopCounterMode(display=False, custom_mapping=ON_CPU), _Launches()
    with launches, flops:  # the inner one is asked first
        function()
    return Work(flops.get_total_flops(), launches.launches, launches.bytes)


def step_seconds(step: Work, card: str) -> float:
    """Seconds of a step on a card: the processor starts kernels while the card works."""
    peak, bandwidth = CARDS[card]
    return max(step.launches * LAUNCH_S, step.flop / (REACHED * peak) + step.bytes / bandwidth)


# --- a preset -----------------------------------------------------------------------------------------------

def estimate(task: str) -> list[dict]:
    """Rows {task, preset, tokens, batch, steps, parameters, flop_a_step, launches_a_step, bytes_a_step,
    minutes {card: of training}, saved_mb_a_clip (_checkpointing), fixed_gb, memory_gb
    (_checkpointing_accumulate_4)}, one a preset: counted on its network, with CLIPS random clips, in
    bfloat16, with guidance."""
    return [_estimate_preset(task, preset) for preset in config.PRESETS]


def count_step(cfg: config.Config, clips: int = CLIPS) -> Work:
    """What a step of these settings asks for, all of its batch; counted on the CPU with `clips` clips."""
    small = dataclasses.replace(cfg, device="cpu", batch=clips, accumulate=1, compile=False)
    features = load_teacher().features
    networks, loss_of = _networks(small, features, cfg.checkpointing)
    return _count_step(small, networks, loss_of, _random_batch(small, features), cfg.batch)


def _count_step(small: config.Config, networks, loss_of, batch: dict, clips: int) -> Work:
    """Counted on a small batch, told for one of `clips`."""
    half = small.batch // 2
    of_half = np.array(work(lambda: loss_of(_first(half, batch)).backward()))
    work(lambda: train.update(small, networks, 1))  # the first one makes the optimizers' state
    of_all = np.array(work(lambda: loss_of(batch).backward()))
    of_update = np.array(work(lambda: train.update(small, networks, 2)))
    a_clip = (of_all - of_half) / (small.batch - half)
    return Work(*(of_all + (clips - small.batch) * a_clip + of_update).tolist())


def _estimate_preset(task: str, preset: str) -> dict:
    full = config.resolve({"task": task, "preset": preset, "device": "cpu", "out": "unused"})
    cfg = config.resolve({"task": task, "preset": preset, "device": "cpu", "recipe": "static",
                          "precision": "bf16", "batch": CLIPS, "out": "unused"})
    features = load_teacher().features
    batch = _random_batch(cfg, features)
    row = {"task": task, "preset": preset, "tokens": batch["x0"].shape[1], "batch": full.batch,
           "steps": full.steps}

    # One pair of networks at a time: those of `full` take gigabytes.
    saved = _saved_mb_a_clip(_networks(cfg, features, checkpointing=True)[1], batch)
    networks, loss_of = _networks(cfg, features, checkpointing=False)
    row["saved_mb_a_clip_checkpointing"] = saved
    row["saved_mb_a_clip"] = _saved_mb_a_clip(loss_of, batch)
    row["parameters"] = _count(networks.model.parameters())
    step = _count_step(cfg, networks, loss_of, batch, full.batch)
    row |= {"flop_a_step": step.flop, "launches_a_step": round(step.launches), "bytes_a_step": step.bytes}
    row["minutes"] = {card: full.steps * step_seconds(step, card) / 60 for card in CARDS}

    # 16 bytes a parameter, 4 fewer under Muon, which keeps one moment where AdamW keeps two. (Gradients come
    # as what was saved goes.)
    optimizers = networks.model_optimizers
    under_muon = _count(optimizers[1].param_groups[0]["params"]) if len(optimizers) > 1 else 0
    row["fixed_gb"] = (16 * row["parameters"] - 4 * under_muon) / 1e9
    row["memory_gb"] = row["fixed_gb"] + full.batch * row["saved_mb_a_clip"] / 1e3

    # Under checkpointing one block at a time is there again in the backward pass.
    block = (row["saved_mb_a_clip"] - saved) / full.depth
    fixed = row["fixed_gb"] + 4 * row["parameters"] / 1e9          # gradients of the parts before
    row["memory_gb_checkpointing_accumulate_4"] = fixed + full.batch / 4 * (saved + block) / 1e3
    return row


def _random_batch(cfg: config.Config, features: int) -> dict:
    """A batch as data.add_noise makes it, of noise."""
    clips, tokens = cfg.batch, Codec(cfg.channels).tokens(round(cfg.seconds * RATE))
    batch = {"x0": torch.randn(clips, tokens, cfg.channels), "eps": torch.randn(clips, tokens, cfg.channels),
             "t": torch.rand(clips), "drop": torch.zeros(clips, dtype=torch.bool),
             "phi": torch.randn(clips, tokens, features)}
    if cfg.task == "t2a":
        batch["ids"] = torch.ones(clips, 16, dtype=torch.long)
    else:
        batch["cond"] = torch.randn(clips, tokens, cfg.channels)
    return batch


def _first(clips: int, batch: dict) -> dict:
    return {name: x[:clips] for name, x in batch.items()}


def _networks(cfg: config.Config, features: int, checkpointing: bool) -> tuple:
    """-> networks of these settings, and their total loss as a function of a batch."""
    cfg.checkpointing = checkpointing
    words = Words(["x"] * 200) if cfg.task == "t2a" else None
    networks = train.build_networks(cfg, words, features, torch.zeros(features))
    driven = train.drive(cfg, 0.0, 0, structure_reg.GroupDetector(cfg.depth))

    def loss_of(batch: dict):
        return train.losses(cfg, networks, batch, 0, driven)["total"]

    return networks, loss_of


def _saved_mb_a_clip(loss_of, batch: dict) -> float:
    """What a clip adds, in MB: what does not grow with the clips are the weights."""
    half = CLIPS // 2
    of_half = saved_bytes(lambda: loss_of(_first(half, batch)))
    of_all = saved_bytes(lambda: loss_of(batch))
    return (of_all - of_half) / (CLIPS - half) / 1e6


def _count(parameters) -> int:
    return sum(p.numel() for p in parameters)


# --- table and command --------------------------------------------------------------------------------------

def estimate_table(rows: list[dict]) -> str:
    lines = [f"{'preset':8s}{'task':5s}parameters  tokens  batch    steps  FLOP a step  launches  "
             "bytes a step  saved a clip (checkpointing)  memory  with --checkpointing --accumulate 4  "
             " minutes of training"]
    for row in rows:
        saved = f"{row['saved_mb_a_clip']:8.1f} MB ({row['saved_mb_a_clip_checkpointing']:6.1f} MB)"
        minutes = ", ".join(f"{card} {x:,.1f}" for card, x in row["minutes"].items())
        lines.append(f"{row['preset']:8s}{row['task']:5s}{row['parameters'] / 1e6:8.1f} M  "
                     f"{row['tokens']:5d}  {row['batch']:5d}  {row['steps']:7d}  {row['flop_a_step']:11.2e}  "
                     f"{row['launches_a_step']:8d}  {row['bytes_a_step']:12.2e}  "
                     f"{saved}     {row['memory_gb']:7.1f} GB  "
                     f"{row['memory_gb_checkpointing_accumulate_4']:7.1f} GB"
                     f"                             {minutes}")
    return "\n".join(lines)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=new_json, help="JSON")
    args = parser.parse_args()
    rows = [row for task in TASKS for row in estimate(task)]
    print(estimate_table(rows))
    if args.out:
        write_text(args.out, to_json(rows, indent=1) + "\n")


if __name__ == "__main__":
    run_cli(main)
