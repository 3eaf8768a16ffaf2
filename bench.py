"""How fast, against what? Training step, generation and data, each measured beside its peer, in one process, in turns.

    python experiments.py bench --out results/bench.json      # the shape of the preset that this machine gets
    python experiments.py bench --compile --rounds 30         # compiled rows too (minutes)

The peer is a plain DiT of the same width, depth, heads, tokens and batch, put together from standard modules as in facebookresearch/DiT
and SiT: no RoPE, no QK-norm, the caption as one mean embedding, AdamW, an EMA updated parameter by parameter. Arms take turns step by step
after a warm-up, so that what the machine does meanwhile meets them all; what is reported is the median step and the ratio to the
plain arm with a t interval over rounds (of log ratios).

FLOP are counted by torch (torch.utils.flop_counter: matrix products and attention, forward and backward); their rate is also given as a
share of what one large matrix product reaches in this process. "Saved" is what autograd keeps for the backward pass.
"""
from __future__ import annotations

import copy
import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import config
import data
import evaluate
import guidance
import learner
import regime
import structure_reg
from model import Codec, DiT, Words, flow_matching_loss, interpolate

# --- the peer -------------------------------------------------------------------------------------------------------------------

class PlainBlock(nn.Module):
    """A DiT block as published: adaLN-zero, multi-head attention, MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        s1, g1, a1, s2, g2, a2 = self.ada(c).chunk(6, dim=1)
        q, k, v = rearrange(self.qkv(self.norm1(x) * (1 + g1[:, None]) + s1[:, None]), "b t (n h d) -> n b h t d", n=3, h=self.heads)
        x = x + a1[:, None] * self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h t d -> b t (h d)"))
        return x + a2[:, None] * self.mlp(self.norm2(x) * (1 + g2[:, None]) + s2[:, None])


class PlainDiT(nn.Module):
    """x_t (B, T, C), t (B,), ids (B, S) or cond (B, T, C) -> v_hat (B, T, C)."""

    def __init__(self, channels: int, width: int, depth: int, heads: int, vocab: int, cond: bool, tokens: int):
        super().__init__()
        self.embed = nn.Linear(channels * (1 + cond), width)
        self.pos = nn.Parameter(torch.randn(1, tokens, width) * 0.02, requires_grad=False)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.words = nn.Embedding(vocab, width, padding_idx=0) if vocab else None
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(depth))
        self.norm, self.ada, self.head = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6), nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)), nn.Linear(width, channels)

    def forward(self, x_t: Tensor, t: Tensor, ids: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        h = self.embed(x_t if cond is None else torch.cat([x_t, cond], -1)) + self.pos
        c = self.time(DiT.time_features(t))
        if ids is not None:
            mask = (ids > 0)[..., None]
            c = c + (self.words(ids) * mask).sum(1) / mask.sum(1)
        for block in self.blocks:
            h = block(h, c)
        s, g = self.ada(c).chunk(2, dim=1)
        return self.head(self.norm(h) * (1 + g[:, None]) + s[:, None])


class Plain:
    """The peer's training step."""

    def __init__(self, cfg: config.Config, vocab: int, tokens: int, compiled: bool):
        self.cfg, self.model = cfg, PlainDiT(cfg.channels, cfg.width, cfg.depth, cfg.heads, vocab, cfg.task == "sr", tokens).to(cfg.device)
        self.ema, self.net = copy.deepcopy(self.model).requires_grad_(False), torch.compile(self.model) if compiled else self.model
        self.opt = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0)

    def loss(self, b: dict) -> Tensor:
        x_t, v = interpolate(b["x0"], b["eps"], b["t"])
        with torch.autocast(self.cfg.device.split(":")[0], torch.bfloat16, enabled=self.cfg.precision == "bf16"):
            v_hat = self.net(x_t, b["t"], b.get("ids"), b.get("cond"))
        return flow_matching_loss(v_hat, v).mean()

    def step(self, b: dict) -> None:
        loss = self.loss(b)
        self.opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.opt.step()
        with torch.no_grad():
            for e, p in zip(self.ema.parameters(), self.model.parameters()):
                e.mul_(0.9999).add_(p, alpha=1 - 0.9999)


class Ours:
    """learner.Learner's step, with the mechanisms at given weights."""

    def __init__(self, cfg: config.Config, words, features: int, lam: float, mu: float):
        self.learner, self.lam, self.mu, self.k = learner.Learner(cfg, words, features if lam else 0, torch.zeros(features)), lam, mu, 0
        self.groups = structure_reg.by_depth(cfg.depth, 3)

    def loss(self, b: dict, lap=lambda name: None) -> Tensor:
        return self.learner.losses(b, self.k, self.lam, self.mu, self.groups, lap)["total"]

    def step(self, b: dict, lap=lambda name: None) -> None:
        self.k += 1
        self.loss(b, lap).backward()
        lap("backward")
        self.learner.update(self.k, lap)


# --- measuring --------------------------------------------------------------------------------------------------------------------

def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def in_turns(arms: dict, rounds: int, warm_up: int = 3) -> dict[str, np.ndarray]:
    """{name: function without arguments} -> {name: seconds of each round}; the order within a round is drawn anew each time."""
    rng, seconds = np.random.default_rng(0), {name: [] for name in arms}
    for k in range(warm_up + rounds):
        for name in rng.permutation(list(arms)):
            start = time.perf_counter()
            arms[name]()
            if k >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(v) for name, v in seconds.items()}


def ratio(a: np.ndarray, b: np.ndarray) -> dict:
    """How many times as fast is b as a, over rounds: geometric mean of a / b and its 95 % t interval."""
    logs = np.log(a / b)
    return {"ratio": float(np.exp(logs.mean())), "interval": [float(np.exp(x)) for x in evaluate.mean_interval(logs)]}


def matmul_rate(device: str, dtype, n: int = 2_048) -> float:
    """FLOP/s of an n x n matrix product, the best of ten."""
    a, best = torch.randn(n, n, device=device, dtype=dtype), np.inf
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def flop(fn) -> int:
    """FLOP of matrix products and attention in fn()."""
    counter = FlopCounterMode(display=False)
    with counter:
        fn()
    return counter.get_total_flops()


def saved_bytes(loss_of) -> int:
    """Bytes that autograd keeps of loss_of() for its backward pass, each storage once (parameters included where they are kept)."""
    seen = {}
    def pack(x):
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss_of()
    return sum(seen.values())


def bench_steps(task: str, base: dict, batches: list[dict], words, compiled: bool, rounds: int) -> list[dict]:
    """Rows of the training step: plain, vanilla, stage, vanilla under AdamW; in fp32 and bf16; eager, and compiled if asked."""
    rows, features = [], guidance.load_teacher().features
    for precision in ("fp32", "bf16"):
        arms = {}
        for how in ("eager", "compiled")[: 1 + compiled]:
            cfg = config.resolve({**base, "task": task, "precision": precision, "compile": how == "compiled", "out": "unused"})
            arms |= {("plain", how): Plain(cfg, len(words) if words else 0, batches[0]["x0"].shape[1], how == "compiled"),
                     ("vanilla", how): Ours(cfg, words, features, 0.0, 0.0), ("stage", how): Ours(cfg, words, features, cfg.lambda0, cfg.mu0),
                     ("AdamW", how): Ours(dataclasses.replace(cfg, optimizer="adamw"), words, features, 0.0, 0.0)}  # vanilla with the peer's optimizer
        turn = {name: 0 for name in arms}
        def one(name):
            b = batches[turn[name] % len(batches)]                 # all arms see the same batches
            turn[name] += 1
            arms[name].step(b)
            wait(cfg.device)
        seconds = in_turns({"/".join(name): (lambda name=name: one(name)) for name in arms}, rounds)
        rate = matmul_rate(cfg.device, torch.bfloat16 if precision == "bf16" else torch.float32)
        for name, arm in arms.items():
            s, work = seconds["/".join(name)], None
            if name[1] == "eager":
                work = flop(lambda: arm.loss(batches[0]).backward())
            rows.append({"task": task, "precision": precision, "arm": name[0], "mode": name[1], "step_ms": 1e3 * float(np.median(s)), "clips_per_s": cfg.batch / float(np.median(s)),
                         "against_plain": ratio(seconds[f"plain/{name[1]}"], s), "rounds": len(s),
                         **({"flop_per_s": work / float(np.median(s)), "share_of_matmul": work / float(np.median(s)) / rate, "saved_mb": saved_bytes(lambda: arm.loss(batches[0])) / 1e6} if work else {}),
                         **({"peak_mb": torch.cuda.max_memory_allocated() / 1e6} if cfg.device.startswith("cuda") else {})})
    return rows


def bench_run_cost(task: str, base: dict, precision: str, batches: list[dict], words, codec, rounds: int, ahead) -> dict:
    """What `stage` costs over `vanilla`, averaged over a run of the preset's length with guidance on throughout: its steps, and its
    probes and structure checks at their own times. And the share of each part of a stage step."""
    cfg = config.resolve({**base, "task": task, "precision": precision, "out": "unused"})
    teacher = guidance.load_teacher()
    vanilla, stage = Ours(cfg, words, teacher.features, 0.0, 0.0), Ours(cfg, words, teacher.features, cfg.lambda0, cfg.mu0)
    ear, latch = guidance.Ear(codec, teacher).to(cfg.device), structure_reg.Structure(cfg.depth, 0)
    two = {k: torch.cat([b[k] for b in batches[:2]]) for k in batches[0] if k != "ids"}
    if "ids" in batches[0]:
        two["ids"] = nn.utils.rnn.pad_sequence([row for b in batches[:2] for row in b["ids"]], batch_first=True)
    listen = learner.Probe(two, ear, None, "t1")
    count, laps = [0], evaluate.Laps(cfg.device)
    def train_step(arm, lap=lambda name: None):
        count[0] += 1
        arm.step(ahead(count[0]), lap)
        wait(cfg.device)
    def measured():
        laps.start()
        count[0] += 1
        b = ahead(count[0])
        laps("data")
        stage.step(b, laps)
    def probe():
        with stage.learner.autocast():
            listen(stage.learner.ema)
    seconds = in_turns({"vanilla": lambda: train_step(vanilla), "stage": measured,
                        "probe": probe,
                        "check": lambda: (setattr(latch, "seen", None), latch.check(10**9, learner.circuits(stage.learner.model)))}, rounds)
    probes = len(regime.probe_steps(cfg.steps))
    total = lambda name: float(np.median(seconds[name]))
    extra = probes * total("probe") + 4 * (probes // 8) * total("probe") + probes / 2 * total("check")  # a full probe a doubling has four more forward passes
    parts = {k: v / sum(laps.seconds.values()) for k, v in laps.seconds.items()}
    step, share = ratio(seconds["stage"], seconds["vanilla"]), extra / (cfg.steps * total("vanilla"))
    return {"task": task, "precision": precision, "steps": cfg.steps, "step": step, "probe_ms": 1e3 * total("probe"), "probes": probes,
            "check_ms": 1e3 * total("check"), "stage_over_vanilla": {"ratio": step["ratio"] + share, "interval": [x + share for x in step["interval"]]}, "parts_of_a_stage_step": dict(sorted(parts.items(), key=lambda x: -x[1]))}


def by_size(seconds: dict[str, np.ndarray], clip_s: float) -> list[dict]:
    """{number of clips: seconds of each round} -> rows; clip_s: length of a clip."""
    return [{"clips": int(n), "s": float(np.median(s)), "s_a_clip": float(np.median(s)) / int(n), "times_real_time": clip_s * int(n) / float(np.median(s))} for n, s in seconds.items()]


def bench_generation(run, rounds: int, sizes=(4, 16, 64)) -> list[dict]:
    """Seconds to make n clips, from caption (or muffled clip) to waveform."""
    captions = [data.SoundWorld("val", 64).caption(i) for i in range(64)]
    muffled = np.zeros((64, round(run.config["seconds"] * data.RATE)), np.float32)
    make = (lambda n: evaluate.generate(run, captions[:n], list(range(n)))) if run.config["task"] == "t2a" else (lambda n: evaluate.upsample(run, muffled[:n], 2_000, list(range(n))))
    seconds = in_turns({str(n): (lambda n=n: make(n)) for n in (1, *sizes)}, max(3, rounds // 5), 1)
    return by_size(seconds, run.config["seconds"])


def bench_data(rounds: int, sizes=(8, 32, 128)) -> list[dict]:
    """Seconds to render n SoundWorld clips, one thread; times real time a core."""
    world = data.SoundWorld("train")
    seconds = in_turns({str(n): (lambda n=n: [world.render(i) for i in range(n)]) for n in sizes}, max(3, rounds // 10), 1)
    return by_size(seconds, data.CLIP_S)


def bench(device: str = "auto", preset: str = "auto", rounds: int = 20, compiled: bool = False, out: Path | None = None, clips: int = 300) -> dict:
    """Measure everything at a preset's shape, print the table, write JSON to `out`."""
    result = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rounds": rounds, "steps": [], "run": [], "generation": {}, "data": bench_data(rounds)}
    for task in ("t2a", "sr"):
        base = {"device": evaluate.pick_device(device), "preset": preset}
        cfg = config.resolve({**base, "task": task, "out": "unused"})
        result |= {"device": evaluate.hardware(cfg.device), "preset": cfg.preset,
                   "shape": {k: getattr(cfg, k) for k in ("width", "depth", "heads", "batch", "channels", "seconds")}}
        world = data.SoundWorld("train", clips, seconds=cfg.seconds).prepare()
        codec = Codec(cfg.channels).fit(world.wave(i) for i in range(100))
        latents, ear = data.LatentCache(world, codec), guidance.Ear(codec, guidance.load_teacher())
        muffled, phi = data.LatentCache(world, codec, cfg.variants) if task == "sr" else None, data.LatentCache(world, ear)
        captions = [[world.caption(i)] for i in range(clips)]
        words = Words.fit(c for cs in captions for c in cs) if task == "t2a" else None
        ids, T = words.cache(captions) if words else [], codec.tokens(round(cfg.seconds * data.RATE))
        def ahead(k):
            drawn = data.draw_batch(latents, muffled, cfg.batch, T, np.random.default_rng(k), phi)
            return learner.batch_to(drawn, ids, cfg, torch.Generator().manual_seed(k), cfg.m_late)
        batches = [ahead(k) for k in range(4)]
        result["steps"] += bench_steps(task, base, batches, words, compiled, rounds)
        faster = min((r for r in result["steps"] if r["task"] == task and r["arm"] == "vanilla" and r["mode"] == "eager"), key=lambda r: r["step_ms"])["precision"]
        result["run"].append(bench_run_cost(task, base, faster, batches, words, codec, rounds, ahead))
        model = evaluate.build_model({**vars(cfg)}, words).to(cfg.device).eval().requires_grad_(False)
        result["generation"][task] = bench_generation(evaluate.Run(Path("bench"), vars(cfg), model, codec, words, 0), rounds)
    print(table(result))
    if out:
        data.write_whole(out, json.dumps(result, indent=1) + "\n")
    return result


def estimate(task: str = "t2a", clips: int = 2) -> list[dict]:
    """For each preset, from its network at `clips` clips in bfloat16: FLOP of a step, memory it needs, and how that splits. No GPU needed.

    memory = weights, gradients, average, optimizer (16 bytes a parameter under AdamW, 12 under Muon) + what autograd saves, which grows with the
    clips that are in flight at once: batch / (devices x accumulate). time = steps x FLOP / (peak FLOP/s x share of it that is reached)."""
    rows = []
    for preset in config.PRESETS:
        cfg = config.resolve({"task": task, "preset": preset, "device": "cpu", "recipe": "static", "precision": "bf16", "batch": clips, "out": "unused"})
        full = config.resolve({"task": task, "preset": preset, "device": "cpu", "out": "unused"})
        T, features = Codec(cfg.channels).tokens(round(cfg.seconds * data.RATE)), guidance.load_teacher().features
        b = {"x0": torch.randn(clips, T, cfg.channels), "eps": torch.randn(clips, T, cfg.channels), "t": torch.rand(clips), "drop": torch.zeros(clips, dtype=torch.bool), "phi": torch.randn(clips, T, features)}
        b |= {"ids": torch.ones(clips, 16, dtype=torch.long)} if task == "t2a" else {"cond": torch.randn(clips, T, cfg.channels)}
        row = {"task": task, "preset": preset, "tokens": T, "batch": full.batch, "steps": full.steps}
        for checkpointing in (False, True):
            cfg.checkpointing = checkpointing
            arm = Ours(cfg, Words(["x"] * 200) if task == "t2a" else None, features, cfg.lambda0, 0.0)
            loss = lambda: arm.loss(b)
            at = [saved_bytes(lambda: arm.loss({k: v[:n] for k, v in b.items()})) for n in (clips // 2, clips)]
            row["saved_mb_a_clip" + "_checkpointing" * checkpointing] = (at[1] - at[0]) / (clips - clips // 2) / 1e6  # what does not grow with the clips are the weights
            if not checkpointing:
                row["parameters"], row["flop_a_step"] = sum(p.numel() for p in arm.learner.model.parameters()), flop(lambda: loss().backward()) / clips * full.batch
        inner = sum(p.numel() for p in (arm.learner.model_opts[1].param_groups[0]["params"] if len(arm.learner.model_opts) > 1 else []))
        row["fixed_gb"] = (16 * row["parameters"] - 4 * inner) / 1e9
        row["memory_gb"] = row["fixed_gb"] + full.batch * row["saved_mb_a_clip"] / 1e3
        kept, block = row["saved_mb_a_clip_checkpointing"], (row["saved_mb_a_clip"] - row["saved_mb_a_clip_checkpointing"]) / full.depth  # one block at a time is there again
        row["memory_gb_checkpointing_accumulate_4"] = row["fixed_gb"] + full.batch / 4 * (kept + block) / 1e3
        rows.append(row)
    return rows


def estimate_table(rows: list[dict]) -> str:
    lines = [f"{'preset':8s}{'task':5s}parameters  tokens  batch    steps  FLOP a step  saved a clip (checkpointing)  memory  with --checkpointing --accumulate 4"]
    for r in rows:
        lines.append(f"{r['preset']:8s}{r['task']:5s}{r['parameters'] / 1e6:8.1f} M  {r['tokens']:5d}  {r['batch']:5d}  {r['steps']:7d}  {r['flop_a_step']:11.2e}  {r['saved_mb_a_clip']:8.1f} MB ({r['saved_mb_a_clip_checkpointing']:6.1f} MB)"
                     f"     {r['memory_gb']:7.1f} GB  {r['memory_gb_checkpointing_accumulate_4']:7.1f} GB")
    return "\n".join(lines)


def table(r: dict) -> str:
    between = lambda x: f"{x['ratio']:.2f} [{x['interval'][0]:.2f}, {x['interval'][1]:.2f}]"
    lines = [f"{r['device']}, {r['threads']} threads, torch {r['torch']}, preset {r['preset']} ({', '.join(f'{k} {v}' for k, v in r['shape'].items())}), {r['rounds']} rounds",
             f"{'training step':30s} ms   clips/s   times as fast as plain, 95 %   GFLOP/s  of a matrix product   saved MB   peak MB"]
    for s in r["steps"]:
        lines.append(f"{s['task']:4s}{s['precision']:5s}{s['mode']:9s}{s['arm']:8s} {s['step_ms']:7.1f} {s['clips_per_s']:9.0f}   {between(s['against_plain']):28s}"
                     + (f" {s['flop_per_s'] / 1e9:8.1f}  {100 * s['share_of_matmul']:10.1f} %        {s['saved_mb']:8.1f}" if "flop_per_s" in s else "") + (f"   {s['peak_mb']:.0f}" if "peak_mb" in s else ""))
    for run in r["run"]:
        lines += [f"{run['task']} {run['precision']}: stage over vanilla, averaged over {run['steps']} steps with {run['probes']} probes ({run['probe_ms']:.0f} ms each): {between(run['stage_over_vanilla'])} times; a step alone {between(run['step'])} times",
                  "    of a stage step: " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in run["parts_of_a_stage_step"].items())]
    for name, rows in (*((f"{task}: clips made at once", g) for task, g in r["generation"].items()), ("SoundWorld clips rendered, one core", r["data"])):
        lines.append(f"{name}: " + "; ".join(f"{x['clips']}: {x['s']:.2f} s, {1e3 * x['s_a_clip']:.0f} ms each, {x['times_real_time']:.0f} x real time" for x in sorted(rows, key=lambda x: x["clips"])))
    return "\n".join(lines)
