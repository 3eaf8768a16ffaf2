"""How fast, against what? Training step, generation and data, each measured beside its peer, in one process.

    python -m lab.bench --out results/bench.json      # the shape of the preset `smoke`; --preset small
    python -m lab.bench --compile --rounds 30         # compiled rows too (minutes)

Arms take turns step by step after a warm-up, so that whatever else the machine does meets them all alike.
Reported are the median step and the ratio to the plain arm, with a t interval over rounds (of log ratios).
The arms of the training step:

    plain     lab/plain_dit.py: a DiT of the same shape as published
    vanilla   ours without mechanisms
    static    ours with guidance
    stage     ours with guidance and the structure loss, at their full weights
    AdamW     vanilla with the peer's optimizer

What a whole run of `stage` costs over one of `static` is its step, its probes, its structure checks and
the gradients that it compares (train.measure_gradients), each at its own time in the same rounds; at 400
and at 3,000 steps, since probes come at every quarter of a doubling and weigh more in a short run.

FLOP are counted by torch (lab/estimate.py); their rate is also given as a share of what one large matrix
product reaches in this process. "Saved" is what autograd keeps for the backward pass. MB are 10^6 bytes.

Comes in: a preset (its shapes), SoundWorld clips. Goes out: a table, and a dict that can be written as JSON:
rows of the training step, of a whole run, of generation, of data.

Public: Ours, driven_by, wait, in_turns, ratio, matmul_rate, bench_steps, bench_run_cost, run_cost,
bench_generation, bench_data, bench, table, estimate_hours.
"""
from __future__ import annotations

import dataclasses
import functools
import itertools
import time
import types
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import evaluate
import regime
import structure_reg
import train
from lab.axes import CLIPS, FINAL, SAMPLED_TWICE, SCALES
from lab.estimate import flop, saved_bytes
from lab.plain_dit import Plain
from lab.statistics import format_ratio
from model import DiT, block_weights, conditioned, flow_matching_loss
from parts import config, runs
from parts.arguments import Parser, new_json, whole
from parts.audio import CLIP_S, RATE
from parts.band_limit import CUTOFF
from parts.codec import Codec
from parts.components import beside_model
from parts.decoder import Decoder
from parts.devices import Timer, hardware, pick_device, pick_precision
from parts.errors import UserError, run_cli
from parts.files import to_json, write_text
from parts.metrics import mean_interval
from parts.previews import QUICK_STEPS
from parts.soundworld import SoundWorld
from parts.spectra import N_MELS
from parts.teacher import TeacherFeatures, load_teacher
from parts.text import Words

RUNS = (400, 3_000)  # steps of the runs whose cost is told


class Ours:
    """train.py's step, driven alike at every step."""

    def __init__(self, cfg: config.Config, words, features: int, driven: train.Driven):
        """features: width of the teacher's features."""
        self.cfg, self.driven, self.steps_done = cfg, driven, 0
        features_used = features if driven.lam else 0
        phi_mean = torch.zeros(features, device=cfg.device)
        self.networks = train.build_networks(cfg, words, features_used, phi_mean)

    def loss(self, batch: dict, timer=train.ignore) -> Tensor:
        return self.losses(batch, timer)["total"]

    def losses(self, batch: dict, timer=train.ignore) -> dict:
        return train.losses(self.cfg, self.networks, batch, self.steps_done, self.driven, timer)

    def step(self, batch: dict, timer=train.ignore) -> None:
        self.steps_done += 1
        self.loss(batch, timer).backward()
        timer("backward")
        train.update(self.cfg, self.networks, self.steps_done, timer)


def driven_by(cfg: config.Config, arm: str) -> train.Driven:
    """What drives a step of vanilla, static or stage; the structure loss has a fixed weight."""
    modes = {**config.RECIPES["static"], "structure": "constant"} if arm == "stage" else config.RECIPES[arm]
    cfg = dataclasses.replace(cfg, **modes)
    detector = structure_reg.GroupDetector(cfg.depth)
    detector.take_ratio(1.0)
    return train.drive(cfg, 0.0, 0, detector)


# --- measuring ----------------------------------------------------------------------------------------------

def wait(device: str) -> None:
    """Until a GPU has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def in_turns(arms: dict, rounds: int, warm_up: int = 3) -> dict[str, np.ndarray]:
    """{name: function without arguments} -> {name: seconds of each round}; the order within a round is drawn
    anew each time."""
    rng = np.random.default_rng(0)
    seconds = {name: [] for name in arms}
    for k in range(warm_up + rounds):
        for name in rng.permutation(list(arms)):
            start = time.perf_counter()
            arms[name]()
            if k >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(times) for name, times in seconds.items()}


def ratio(a: np.ndarray, b: np.ndarray) -> dict:
    """How many times as fast is b as a, from the seconds of each round: geometric mean of a / b and its 95 %
    t interval."""
    logs = np.log(a / b)
    return {"ratio": float(np.exp(logs.mean())), "interval": [float(np.exp(x)) for x in mean_interval(logs)]}


def matmul_rate(device: str, dtype) -> float:
    """FLOP/s of a matrix product that is large for the device, the best of ten."""
    n = 8_192 if device.startswith("cuda") else 2_048
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = np.inf
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


# --- the training step --------------------------------------------------------------------------------------

def bench_steps(task: str, base: dict, batches: list[dict], words, compiled: bool, rounds: int) -> list[dict]:
    """Rows of the training step: every arm in fp32 and bf16; eager, and compiled if asked. base: settings of
    all arms; words: the text encoder or None."""
    rows = []
    features = load_teacher().features
    for precision in ("fp32", "bf16"):
        arms = {}
        for mode in ("eager", "compiled")[: 1 + compiled]:
            cfg = config.resolve({**base, "task": task, "precision": precision, "compile": mode == "compiled",
                                  "out": "unused"})
            for name, arm in _arms(cfg, words, features, batches[0]["x0"].shape[1]).items():
                arms[name, mode] = arm

        # All arms see the same batches, each in its own turn.
        turns = {}
        for (name, mode), arm in arms.items():
            turns[f"{name}/{mode}"] = functools.partial(_step, arm, itertools.cycle(batches), cfg.device)
        seconds = in_turns(turns, rounds)

        best_rate = matmul_rate(cfg.device, torch.bfloat16 if precision == "bf16" else torch.float32)
        for (name, mode), arm in arms.items():
            mine, plain = seconds[f"{name}/{mode}"], seconds[f"plain/{mode}"]
            median = float(np.median(mine))
            row = {"task": task, "precision": precision, "arm": name, "mode": mode, "step_ms": 1e3 * median,
                   "clips_per_s": cfg.batch / median, "against_plain": ratio(plain, mine),
                   "rounds": len(mine)}
            if mode == "eager":
                row |= _work(arm, batches[0], median, best_rate)
            if cfg.device.startswith("cuda"):
                row["step_mb"] = _step_mb(arm, batches[0], cfg.device)
            rows.append(row)
    return rows


def _arms(cfg: config.Config, words, features: int, tokens: int) -> dict:
    ours = {arm: Ours(cfg, words, features, driven_by(cfg, arm))
            for arm in ("vanilla", "static", "stage")}
    with_adamw = dataclasses.replace(cfg, optimizer="adamw")
    return {"plain": Plain(cfg, len(words) if words else 0, tokens, cfg.compile), **ours,
            "AdamW": Ours(with_adamw, words, features, ours["vanilla"].driven)}


def _step_mb(arm, batch: dict, device: str) -> float:
    """Most memory that a step takes beyond what all arms hold between steps."""
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    arm.step(batch)
    return (torch.cuda.max_memory_allocated(device) - held) / 1e6


def _step(arm, batches, device: str) -> None:
    arm.step(next(batches))
    wait(device)


def _work(arm, batch: dict, seconds: float, best_rate: float) -> dict:
    """FLOP/s of a step that takes these seconds, their share of the best rate there is, and memory saved."""
    work = flop(lambda: arm.loss(batch).backward())
    if not work:
        return {}
    return {"flop_per_s": work / seconds, "share_of_matmul": work / seconds / best_rate,
            "saved_mb": saved_bytes(lambda: arm.loss(batch)) / 1e6}


# --- a whole run --------------------------------------------------------------------------------------------

def bench_run_cost(task: str, base: dict, precision: str, batches: list[dict], words, codec, rounds: int,
                   batch_of_step) -> dict:
    """What `stage` costs over `static` (run_cost), with guidance and structure on from the first step to
    the last, and the share of each part of a stage step. batch_of_step(k): draws the batch of step k."""
    cfg = config.resolve({**base, "task": task, "precision": precision, "out": "unused"})
    teacher = load_teacher()
    static, stage, still = (Ours(cfg, words, teacher.features, driven_by(cfg, arm))
                            for arm in ("static", "stage", "stage"))
    extract = TeacherFeatures(codec, teacher).to(cfg.device)
    measure_D = regime.Probe(batches[0], extract, None, cfg.regime_signal)
    steps, timer = itertools.count(1), Timer(cfg.device)

    def static_step():
        static.step(batch_of_step(next(steps)))
        wait(cfg.device)

    def stage_step():
        timer.start()
        batch = batch_of_step(next(steps))
        timer("data")
        stage.step(batch, timer)
        wait(cfg.device)

    def probe():
        with stage.networks.autocast():
            measure_D(conditioned(stage.networks.ema, measure_D.batch))

    def check():
        # A new detector each time: an old one passes over weights that have hardly moved. Of fewer blocks
        # nothing is checked (train.measure).
        if cfg.depth >= structure_reg.TESTABLE:
            structure_reg.GroupDetector(cfg.depth).check(10**9, block_weights(stage.networks.model), 1.0)

    # The gradients of one graph, again and again: its weights (`still`) do not move.
    loss, detector = still.losses(batches[0]), structure_reg.GroupDetector(cfg.depth)
    run = types.SimpleNamespace(cfg=cfg, networks=still.networks, regime=train.open_regime(cfg),
                                probe=None, detector=detector, step=regime.FIRST)

    def gradients(j: int, **left_out):
        train.measure_gradients(run, j, still.driven._replace(**left_out), batches[0], loss)

    seconds = in_turns({"static": static_step, "stage": stage_step, "probe": probe, "check": check,
                        "agreement": functools.partial(gradients, 0, share=0.0),
                        "share": functools.partial(gradients, 1)}, rounds)
    all_parts = sum(timer.seconds.values())
    parts = {part: part_s / all_parts for part, part_s in timer.seconds.items()}
    return {"task": task, "precision": precision, "step": ratio(seconds["stage"], seconds["static"]),
            "ms": {name: 1e3 * float(np.median(times)) for name, times in seconds.items()},
            "stage_over_static": [run_cost(K, seconds) for K in RUNS],
            "parts_of_a_stage_step": dict(sorted(parts.items(), key=lambda part: -part[1]))}


def run_cost(K: int, seconds: dict[str, np.ndarray]) -> dict:
    """A run of K steps of `stage` against one of `static`. seconds {name: of each round}: a step of both, a
    probe, a structure check, and what the gradients take that are compared for their agreement and for the
    structure loss's share. probe_share: the probes' share of the seconds of the stage run."""
    probes = regime.probe_steps(K)
    # A check at every probe; the share once structure is on, after half the run; agreement at every second
    # probe, under any guidance, so `static` pays for it too.
    probe_s, agreement_s = len(probes) * seconds["probe"], len(probes[::2]) * seconds["agreement"]
    share_s = sum(k > K / 2 for k in probes) * seconds["share"]
    stage_s = K * seconds["stage"] + probe_s + len(probes) * seconds["check"] + agreement_s + share_s
    static_s = K * seconds["static"] + agreement_s
    return {"steps": K, "probes": len(probes), **ratio(stage_s, static_s),
            "probe_share": float(np.mean(probe_s / stage_s))}


# --- generation and data ------------------------------------------------------------------------------------

def by_size(seconds: dict[str, np.ndarray], clip_s: float) -> list[dict]:
    """{number of clips: seconds of each round} -> rows; clip_s: length of a clip."""
    rows = []
    for size, times in seconds.items():
        n, median = int(size), float(np.median(times))
        rows.append({"clips": n, "s": median, "s_a_clip": median / n, "times_real_time": clip_s * n / median})
    return rows


def bench_generation(run, rounds: int, sizes=(4, 16, 64)) -> list[dict]:
    """Seconds to make n clips, from caption (or muffled clip) to waveform."""
    captions = [SoundWorld("val", 64).caption(i) for i in range(64)]
    muffled = np.zeros((64, round(run.config["seconds"] * RATE)), np.float32)

    def make(n: int) -> None:
        if run.config["task"] == "t2a":
            evaluate.generate(run, captions[:n], list(range(n)))
        else:
            evaluate.upsample(run, muffled[:n], CUTOFF, list(range(n)))

    seconds = in_turns({str(n): functools.partial(make, n) for n in (1, *sizes)}, max(3, rounds // 5), 1)
    return by_size(seconds, run.config["seconds"])


def bench_data(rounds: int, sizes=(8, 32, 128)) -> list[dict]:
    """Seconds to render n SoundWorld clips, one thread; times real time a core."""
    world = SoundWorld("train")

    def render(n: int) -> None:
        for i in range(n):
            world.render(i)

    seconds = in_turns({str(n): functools.partial(render, n) for n in sizes}, max(3, rounds // 10), 1)
    return by_size(seconds, CLIP_S)


# --- all of it ----------------------------------------------------------------------------------------------

def bench(device: str = "auto", preset: str = "auto", rounds: int = 20, compiled: bool = False,
          out: Path | None = None, clips: int = 300) -> dict:
    """Measure everything at a preset's shape, print the table, write JSON to `out`. clips: how many clips of
    SoundWorld the batches are drawn from."""
    device = pick_device(device)
    result = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rounds": rounds, "steps": [],
              "run": [], "generation": {}, "data": bench_data(rounds)}
    for task in ("t2a", "sr"):
        base = {"device": device, "preset": preset}
        cfg = config.resolve({**base, "task": task, "out": "unused"})
        result["device"] = hardware(cfg.device)
        result["preset"] = cfg.preset
        result["shape"] = {name: getattr(cfg, name)
                           for name in ("width", "depth", "heads", "batch", "channels", "seconds")}

        codec, words, batch_of_step = _prepare(cfg, clips)
        batches = [batch_of_step(k) for k in range(4)]
        rows = bench_steps(task, base, batches, words, compiled, rounds)
        result["steps"] += rows

        # A run is measured in the precision that train.py would choose.
        precision = pick_precision(cfg.device)
        cost = bench_run_cost(task, base, precision, batches, words, codec, rounds, batch_of_step)
        result["run"].append(cost)

        model = evaluate.build_model(vars(cfg), words).to(cfg.device).eval().requires_grad_(False)
        run = evaluate.Run(Path("bench"), vars(cfg), model, beside_model(codec, cfg.device), words, 0)
        result["generation"][task] = bench_generation(run, rounds)
    print(table(result))
    if out:
        write_text(out, to_json(result, indent=1) + "\n")
    return result


def _prepare(cfg: config.Config, clips: int) -> tuple:
    """Codec, latents, teacher's features and captions of SoundWorld clips, as train.py prepares them ->
    codec, text encoder or None, function that draws the batch of step k."""
    world = SoundWorld("train", clips, seconds=cfg.seconds).prepare()
    codec = Codec(cfg.channels).fit(world.wave(i) for i in range(100))
    tokens = codec.tokens(round(cfg.seconds * RATE))
    latents = data.LatentCache(world, codec)
    muffled = data.LatentCache(world, codec, cfg.variants) if cfg.task == "sr" else None
    phi = data.LatentCache(world, TeacherFeatures(codec, load_teacher()))
    words, token_ids = None, []
    if cfg.task == "t2a":
        captions = [world.caption(i) for i in range(clips)]
        words = Words.fit(captions)
        token_ids = words.cache([[caption] for caption in captions])

    density = driven_by(cfg, "static").density

    def batch_of_step(k: int) -> dict:
        drawn = data.draw_batch(latents, muffled, cfg.batch, tokens, np.random.default_rng(k), phi)
        return data.add_noise(drawn, token_ids, cfg, torch.Generator().manual_seed(k), density)

    return codec, words, batch_of_step


def table(result: dict) -> str:
    """What `bench` measured, ready to print."""
    shape = ", ".join(f"{name} {value}" for name, value in result["shape"].items())
    lines = [f"{result['device']}, {result['threads']} threads, torch {result['torch']}, "
             f"preset {result['preset']} ({shape}), {result['rounds']} rounds",
             f"{'training step':30s} ms   clips/s   times as fast as plain, 95 %   GFLOP/s  "
             "of a matrix product   saved MB   peak MB"]
    lines += [_step_line(row) for row in result["steps"]]
    for run in result["run"]:
        lines += _run_lines(run)
    for task, rows in result["generation"].items():
        lines.append(_sizes_line(f"{task}: clips made at once", rows))
    lines.append(_sizes_line("SoundWorld clips rendered, one core", result["data"]))
    return "\n".join(lines)


def _step_line(row: dict) -> str:
    line = (f"{row['task']:4s}{row['precision']:5s}{row['mode']:9s}{row['arm']:8s} {row['step_ms']:7.1f} "
            f"{row['clips_per_s']:9.0f}   {format_ratio(row['against_plain']):28s}")
    if "flop_per_s" in row:
        line += (f" {row['flop_per_s'] / 1e9:8.1f}  {100 * row['share_of_matmul']:10.1f} %        "
                 f"{row['saved_mb']:8.1f}")
    if "step_mb" in row:
        line += f"   {row['step_mb']:.0f}"
    return line


def _run_lines(run: dict) -> list[str]:
    who, ms = f"{run['task']} {run['precision']}", run["ms"]
    lines = [f"{who}: stage over static, {cost['steps']} steps: {format_ratio(cost)} times; "
             f"{cost['probes']} probes take {100 * cost['probe_share']:.1f} % of its seconds"
             for cost in run["stage_over_static"]]
    extras = [f"{name} {ms[name]:.0f} ms" for name in ("probe", "check", "agreement", "share")]
    shares = [f"{part} {100 * share:.1f} %" for part, share in run["parts_of_a_stage_step"].items()]
    return [*lines, f"    a step alone {format_ratio(run['step'])} times; " + ", ".join(extras),
            "    of a stage step: " + ", ".join(shares)]


def _sizes_line(name: str, rows: list[dict]) -> str:
    texts = []
    for row in sorted(rows, key=lambda row: row["clips"]):
        texts.append(f"{row['clips']}: {row['s']:.2f} s, {1e3 * row['s_a_clip']:.0f} ms each, "
                     f"{row['times_real_time']:.0f} x real time")
    return f"{name}: {'; '.join(texts)}"


# --- hours of an experiment ---------------------------------------------------------------------------------

def estimate_hours(options: list[dict]) -> float:
    """Hours for runs with these train.py options, one after another: a measured forward and backward pass of
    each distinct shape, times the steps, plus a quarter for the rest of a step; and the clips that previews
    and final tables generate and decode. Rendering of data is not counted."""
    known = {}  # shape -> what was measured
    total = 0.0
    for given in options:
        cfg = config.resolve({**given, "out": "unused", "regime": "clock"})
        sr = cfg.task == "sr"
        tokens = round(25 * cfg.seconds)
        shape = (cfg.device, cfg.channels, cfg.width, cfg.depth, cfg.heads, cfg.batch, cfg.task, tokens)
        if shape not in known:
            known[shape] = _measure_shape(cfg, tokens)
        step, decode = known[shape]

        # One clip takes a forward pass (a third of a step) an integration step, two with guidance.
        one = cfg.sample_steps * (1 if sr else 2) * step / 3 / cfg.batch
        quick = QUICK_STEPS / cfg.sample_steps * one + decode
        n = min(cfg.score_clips, CLIPS[cfg.task])
        # An evaluation (lab/axes.py): captions at two guidance scales, some of them twice; all of
        # super-resolution's twice; four previews. At the end of captions, scales are tried and two scored.
        metrics = 2 * n if sr else 2 * (n + min(n, SAMPLED_TWICE))
        previews = _evaluations(cfg) * (metrics * quick + 4 * (one + decode))
        if not sr:
            previews += len(SCALES) * n * quick + 4 * min(cfg.score_clips, FINAL) * (one + decode)
        # Rows of the final table: the model and its ceiling; in super-resolution two samples, two baselines.
        table_of_a_clip = (2 * one + 7 * decode) if sr else (one + 2 * decode)
        final = cfg.score_clips * table_of_a_clip
        total += (1.25 * cfg.steps * step + previews + final) / 3_600
    return total


def _evaluations(cfg: config.Config) -> int:
    """How often a run is evaluated."""
    if cfg.eval_every:
        return -(-cfg.steps // cfg.eval_every)
    probes = regime.probe_steps(cfg.steps)
    due = sum(runs.evaluation_due(cfg, k, j) for j, k in enumerate(probes))
    return due + (cfg.steps not in probes)


def _measure_shape(cfg: config.Config, tokens: int) -> tuple[float, float]:
    """-> seconds of a forward and backward pass of a batch, and of decoding one clip."""
    sr = cfg.task == "sr"
    model = DiT(cfg.channels, cfg.width, cfg.depth, cfg.heads, 0 if sr else 200, sr).to(cfg.device)
    x = torch.randn(cfg.batch, tokens, cfg.channels, device=cfg.device)
    t = torch.rand(cfg.batch, device=cfg.device)
    ids = torch.ones(cfg.batch, 10, dtype=torch.long, device=cfg.device)

    def forward_and_backward():
        text = None if sr else model.encode_text(ids)
        flow_matching_loss(model(x, t, text), x).mean().backward()

    # The codec is beside the network on a GPU, otherwise on the CPU.
    codec_device = cfg.device if cfg.device.startswith("cuda") else "cpu"
    decoder = Decoder().to(codec_device)

    def decode():
        decoder.decode(torch.rand(16, 2 * tokens, N_MELS, device=codec_device), list(range(16)))

    return _fastest(forward_and_backward, cfg.device), _fastest(decode, codec_device) / 16


def _fastest(function, device: str) -> float:
    def done():
        function()
        wait(device)
    return float(in_turns({"it": done}, rounds=3, warm_up=1)["it"].min())


# --- command ------------------------------------------------------------------------------------------------

def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--preset", choices=config.CHOICES["preset"], default="auto")
    parser.add_argument("--rounds", type=whole(), default=20)
    parser.add_argument("--compile", action="store_true", help="compiled rows too")
    parser.add_argument("--out", type=new_json, help="JSON")
    args = parser.parse_args()
    if args.rounds < 3:
        raise UserError(f"--rounds {args.rounds}: must be at least 3")
    bench(args.device, args.preset, args.rounds, args.compile, args.out)


if __name__ == "__main__":
    run_cli(main)
