"""Train a latent diffusion transformer for captioned audio, or for audio super-resolution. Reads top to bottom.

    python train.py                                     # captions to sound, preset by device, about ten CPU minutes
    python train.py --task sr                           # muffled to full band
    python train.py --data path/to/folder --val-fold 5  # your own captioned recordings
    python train.py --resume runs/t2a [--steps N]       # continue, or extend

What happens: data -> codec fit -> latents -> loop { batch, t, x_t, loss, step, EMA } -> table and sounds in the run folder
(config.json, log.jsonl, checkpoint.pt, samples/, dashboard.png, scores.json).

Conventions: t in [0, 1], t = 1 is pure noise, t = 0 is data; x_t = (1-t) x0 + t eps; v = eps - x0; the network predicts v.
Guidance scale w = 1 is plain conditional. B batch, T tokens, C latent channels, D width.
"""
from __future__ import annotations

import copy
import dataclasses
import json
import signal
import sys
import time
import typing
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import evaluate
import sampler
from data import RATE, UserError
from model import Codec, DiT, Words, flow_matching_loss, interpolate


warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # RMSNorm in bf16: slower, not wrong


# --- configuration --------------------------------------------------------------------------------------------------------

@dataclass
class Config:
    task: str = "t2a"            # t2a: caption -> sound; sr: band-limited -> full-band sound
    data: str = "soundworld"     # soundworld, or a folder of recordings with metadata.csv|jsonl
    val_fold: int = 0            # folder data: the value of column `fold` that is held out; 0: a tenth of the files
    out: str = ""                # run folder; empty: runs/<task>, numbered when taken
    preset: str = "auto"         # smoke (CPU, MPS) | small (one GPU) | full; auto: by device
    device: str = "auto"         # cpu | cuda | mps
    precision: str = "auto"      # fp32 | bf16; auto: the one that measures faster on this machine at this shape
    seed: int = 0                # everything random derives from it
    steps: int = 2_200           # optimizer steps
    batch: int = 32              # clips a step
    width: int = 128             # D
    depth: int = 4               # L, transformer blocks
    heads: int = 4               # attention heads
    channels: int = 64           # C, principal components kept by the codec
    seconds: float = 2.56        # length of training crops
    clips: int = 6_000           # SoundWorld training clips
    variants: int = 3            # sr: band-limited versions of each training clip
    optimizer: str = "muon"      # muon: for the matrices inside blocks, AdamW for the rest | adamw: for everything
    lr: float = 2e-3             # rate after warm-up; constant, because a decay would favour early-finishing arms
    muon_lr: float = 5e-3        # the same for Muon, in units of AdamW's rate (update RMS 0.2 lr)
    warmup: int = 100            # steps of linear warm-up
    weight_decay: float = 0.01   # decoupled, in both optimizers
    clip: float = 1.0            # gradient norm ceiling
    ema: float = 0.9999          # EMA ceiling; ramped as (1 + k) / (10 + k), so the average spans the last tenth of the run
    cond_drop: float = 0.1       # share of samples trained without condition, for classifier-free guidance
    timesteps: str = "constant"  # off: reference density (m = 0) | constant: centre t_mean
    t_mean: float = 1.5          # m of the constant mode; > 0 is towards noise
    t_std: float = 1.0           # s of the logit-normal
    cfg: float = 2.5             # guidance scale w of previews and scores (t2a; sr uses 1)
    sample_steps: int = 16       # Euler steps of previews and scores
    eval_every: int = 550        # steps between validation, previews and checkpoints
    score_clips: int = 500       # clips of the final table
    workers: int = -1            # processes that prepare data; -1: one a core


PRESETS = {  # what differs from the defaults above; a second entry is laid over it for super-resolution
    "smoke": ({}, {"steps": 2_000, "eval_every": 500, "clips": 2_500, "score_clips": 100}),
    "small": ({"steps": 20_000, "batch": 128, "width": 384, "depth": 12, "heads": 6, "clips": 40_000, "lr": 5e-4, "muon_lr": 2e-3, "eval_every": 1_000}, {}),
    "full": ({"steps": 300_000, "batch": 256, "width": 768, "depth": 16, "heads": 12, "channels": 96, "seconds": 10.24, "clips": 20_000,
              "lr": 2e-4, "muon_lr": 1e-3, "warmup": 2_000, "eval_every": 5_000}, {}),
}
CHOICES = {"task": ("t2a", "sr"), "preset": ("auto", *PRESETS), "precision": ("auto", "fp32", "bf16"), "optimizer": ("muon", "adamw"),
           "timesteps": ("off", "constant")}


def parse(argv: list[str]) -> tuple[dict, str]:
    """Command line -> ({field: typed value} as given, run folder to resume or '')."""
    import argparse
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--resume", metavar="RUN", default="", help="continue the run in this folder")
    hints = typing.get_type_hints(Config)
    for f in dataclasses.fields(Config):
        p.add_argument("--" + f.name.replace("_", "-"), dest=f.name, type=hints[f.name], choices=CHOICES.get(f.name), help=f"default {f.default!r}")
    given = {k: v for k, v in vars(p.parse_args(argv)).items() if v is not None}
    resume = given.pop("resume")
    extra = sorted(set(given) - {"steps", "device", "workers"})
    if resume and extra:
        raise UserError(f"--resume continues with the run's own settings; only --steps, --device and --workers may be added, not --{extra[0].replace('_', '-')}")
    return given, resume


def resolve(given: dict) -> Config:
    """Defaults < preset (by device) < what the user typed."""
    cfg = Config(**{k: given[k] for k in ("task", "device", "preset") if k in given})
    cfg.device = evaluate.pick_device(cfg.device)
    if cfg.preset == "auto":
        cfg.preset = "small" if cfg.device.startswith("cuda") else "smoke"
    base, for_sr = PRESETS[cfg.preset]
    cfg = dataclasses.replace(cfg, **base, **(for_sr if cfg.task == "sr" else {}))
    cfg = dataclasses.replace(cfg, **{k: v for k, v in given.items() if k not in ("device", "preset")})
    if not given.get("out"):
        names = [f"runs/{cfg.task}" + (f"-{k}" if k > 1 else "") for k in range(1, 10_000)]
        cfg.out = next(n for n in names if not Path(n).exists())
    for name, ok, why in (("steps", cfg.steps > 0, "positive"), ("batch", cfg.batch > 0, "positive"), ("lr", cfg.lr > 0, "positive"), ("muon_lr", cfg.muon_lr > 0, "positive"),
                          ("heads", cfg.heads > 0 and cfg.width % (2 * cfg.heads) == 0, "such that width / heads is an even number"),
                          ("channels", 0 < cfg.channels <= 128, "from 1 to 128"), ("seconds", 0.5 <= cfg.seconds <= 30, "from 0.5 to 30"),
                          ("seed", cfg.seed >= 0, "0 or more"), ("warmup", cfg.warmup > 0, "positive"), ("score_clips", cfg.score_clips >= 2, "at least 2"),
                          ("clips", cfg.clips >= 100, "at least 100"), ("variants", cfg.variants > 0, "positive"), ("eval_every", cfg.eval_every > 0, "positive"),
                          ("cond_drop", 0 <= cfg.cond_drop < 1, "in [0, 1)"), ("sample_steps", cfg.sample_steps > 0, "positive")):
        if not ok:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be {why}")
    return cfg


# --- parts of the loop ----------------------------------------------------------------------------------------------------

def batch_to(b: dict, ids: list, cfg: Config, g: torch.Generator) -> dict:
    """A numpy batch -> tensors on the device, with the noise of the step drawn from g (on the CPU, so that it is the same
    whatever the device): x0, eps (B, T, C), t (B,), drop (B,), mask (B, T) or None, ids (B, S) or cond (B, T, C)."""
    x0 = torch.from_numpy(b["x0"])
    m = cfg.t_mean if cfg.timesteps == "constant" else sampler.REFERENCE_M
    out = {"x0": x0, "eps": torch.randn(x0.shape, generator=g), "t": sampler.sample(len(x0), m, cfg.t_std, generator=g),
           "drop": torch.rand(len(x0), generator=g) < cfg.cond_drop}
    if not b["mask"].all():
        out["mask"] = torch.from_numpy(b["mask"])
    if "cond" in b:
        out["cond"] = torch.from_numpy(b["cond"])
    else:
        rows = [ids[i][k % len(ids[i])] for i, k in zip(b["i"], b["wording"])]
        out["ids"] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {k: v.to(cfg.device, non_blocking=True) for k, v in out.items()}


def predict(model: DiT, b: dict, drop: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """-> v_hat, v (B, T, C) of a batch."""
    x_t, v = interpolate(b["x0"], b["eps"], b["t"])
    gone = b["drop"] if drop else None
    text = model.encode_text(b["ids"], gone) if "ids" in b else None
    return model(x_t, b["t"], text, b.get("cond"), b.get("mask"), drop=gone if "cond" in b else None), v


@torch.no_grad()
def validation_loss(model: DiT, batches: list[dict], bins: int = 10) -> list[float]:
    """Loss on held-out clips at t = .05, .15 ... .95, the same noise each time; one bin a number."""
    out = []
    for k in range(bins):
        loss = [flow_matching_loss(*predict(model, {**b, "t": torch.full_like(b["t"], (k + 0.5) / bins)}, drop=False), b.get("mask")) for b in batches]
        out.append(float(torch.cat(loss).mean()))
    return out


def pick_precision(model: DiT, b: dict, cfg: Config) -> str:
    """Time forward + backward in float32 and in bf16, alternating, after a warm-up: bf16 wins on tensor cores, and loses on
    CPUs that emulate it. fp16 overflows where bf16 does not, so it is no candidate."""
    seconds = {"fp32": [], "bf16": []}
    if cfg.device.startswith("mps"):
        return "fp32"  # autocast to bf16 is partial there
    if not cfg.device.startswith("cuda"):
        b = {k: v[:8] for k, v in b.items()}  # emulated bf16 can be ten times slower: a small batch tells as much
    for round_ in range(4):
        for name in seconds:
            start = time.perf_counter()
            with torch.autocast(cfg.device.split(":")[0], torch.bfloat16, enabled=name == "bf16"):
                v_hat, v = predict(model, b)
            flow_matching_loss(v_hat, v).mean().backward()
            model.zero_grad()
            if cfg.device.startswith("cuda"):
                torch.cuda.synchronize()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    best = {k: min(v) for k, v in seconds.items()}
    choice = "bf16" if best["bf16"] < 0.9 * best["fp32"] else "fp32"
    print(f"precision: {choice} (a step's forward and backward: fp32 {1e3 * best['fp32']:.0f} ms, bf16 {1e3 * best['bf16']:.0f} ms)")
    return choice


def make_optimizers(model: DiT, cfg: Config) -> list[torch.optim.Optimizer]:
    """[AdamW] or [AdamW, Muon]. Muon replaces the momentum of a weight matrix by the nearest orthogonal one, so that its rare
    directions learn as fast as its common ones. It is made for matrices inside the network: embeddings, what reads t, the
    head, norms and biases stay with AdamW.  # Jordan et al. 2024; update RMS as AdamW's: Liu et al. 2025"""
    inner = {n for n, p in model.named_parameters() if cfg.optimizer == "muon" and p.ndim == 2 and n.startswith(("blocks.", "text.layers."))}
    pick = lambda yes: [p for n, p in model.named_parameters() if (n in inner) == yes]
    opts = [torch.optim.AdamW(pick(False), cfg.lr, (0.9, 0.99), weight_decay=cfg.weight_decay, fused=cfg.device != "mps")]
    if inner:
        opts.append(torch.optim.Muon(pick(True), cfg.muon_lr, weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return opts


# --- the run --------------------------------------------------------------------------------------------------------------

def train(given: dict, resume: str = "") -> Path:
    """Run a configuration to its end and return its folder. `given` holds Config fields; with `resume`, of that folder's run."""
    began, ckpt = time.time(), None
    if resume:
        cfg, ckpt = evaluate.load_checkpoint(Path(resume))
        if "optimizer" not in ckpt or set(cfg) != {f.name for f in dataclasses.fields(Config)}:
            raise UserError(f"--resume {resume}: an exported or foreign checkpoint (no optimizer state, or other settings); it can be used, not continued")
        cfg = dataclasses.replace(Config(**cfg), out=resume, **given)
        cfg.device = evaluate.pick_device(cfg.device)
        if cfg.steps <= ckpt["step"] and "steps" in given:
            raise UserError(f"--steps {cfg.steps}: {resume} already has {ckpt['step']} steps; give a larger number")
    else:
        cfg = resolve(given)
        if Path(cfg.out).exists() and any(Path(cfg.out).iterdir()):
            raise UserError(f"--out {cfg.out}: folder is not empty; resume it with --resume {cfg.out}, or choose another")
    workers = None if cfg.workers < 0 else cfg.workers

    # data: waveforms, codec, latents
    print(f"cache: {data.cache_dir()} (safe to delete at any time)")
    train_set = data.open_data(cfg.data, "train", cfg.clips, cfg.val_fold, cfg.seconds)
    val_set = data.open_data(cfg.data, "val", 256, cfg.val_fold, cfg.seconds)
    out = Path(cfg.out)
    (out / "samples").mkdir(parents=True, exist_ok=True)  # claims the name before the minutes of preparation
    train_set.prepare(workers)
    val_set.prepare(workers)
    codec = Codec(cfg.channels)
    if ckpt:
        codec.load_state_dict(ckpt["codec"])
    else:
        codec.fit(train_set.wave(i)[: 10 * RATE] for i in np.random.default_rng(cfg.seed).permutation(len(train_set))[:500])
        print(f"codec: {cfg.channels} components hold {100 * codec.explained:.1f} % of the log-mel variance")
    latents, val_latents = data.LatentCache(train_set, codec), data.LatentCache(val_set, codec)
    muffled, val_muffled = (data.LatentCache(d, codec, cfg.variants, workers) if cfg.task == "sr" else None for d in (train_set, val_set))
    T = codec.tokens(round(cfg.seconds * RATE))
    words, ids = None, []
    if cfg.task == "t2a":
        captions = [[train_set.caption(i, k) for k in range(train_set.wordings)] for i in range(len(train_set))]
        words = Words(ckpt["words"]) if ckpt else Words.fit(c for cs in captions for c in cs)
        ids = [[words.encode([c])[0] for c in cs] for cs in captions]
    val_ids = [[words.encode([val_set.caption(i)])[0]] for i in range(len(val_set))] if words else []
    val_batches = [batch_to(data.draw_batch(val_latents, val_muffled, 64, T, np.random.default_rng([cfg.seed, 9, k])), val_ids, cfg,
                            torch.Generator().manual_seed(9_000 + k)) for k in range(2)]

    # model, EMA, optimizer
    torch.manual_seed(cfg.seed)
    model = DiT(cfg.channels, cfg.width, cfg.depth, cfg.heads, len(words) if words else 0, cfg.task == "sr").to(cfg.device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    opts = make_optimizers(model, cfg)
    step = 0
    if ckpt:
        evaluate.load_weights(resume, model, ckpt["model"])
        evaluate.load_weights(resume, ema, ckpt["ema"])
        for opt, state in zip(opts, ckpt["optimizer"], strict=True):
            opt.load_state_dict(state)
        step = ckpt["step"]
    if cfg.precision == "auto":
        cfg.precision = pick_precision(model, val_batches[0], cfg)
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1) + "\n")
    log = evaluate.open_log(out / "log.jsonl", step)
    run = evaluate.Run(out, dataclasses.asdict(cfg), ema, codec, words, step)
    n_par = sum(p.numel() for p in model.parameters())
    print(f"{cfg.task} on {cfg.data}: {len(train_set)} clips, {n_par / 1e6:.2f} M parameters, {cfg.steps} steps of {cfg.batch} on {cfg.device}, run folder {out}")

    stop = []  # Ctrl-C or SIGTERM: finish the step, save, leave
    old = {s: signal.signal(s, lambda *a: stop.append(a[0])) for s in (signal.SIGINT, signal.SIGTERM)}

    def checkpoint():
        evaluate.save_checkpoint(out / "checkpoint.pt", step=step, config=dataclasses.asdict(cfg), model=model.state_dict(), ema=ema.state_dict(),
                                 optimizer=[opt.state_dict() for opt in opts], codec=codec.state_dict(), words=words.words if words else [])

    bar, prepared = tqdm(total=cfg.steps, initial=step, unit="step", dynamic_ncols=True, mininterval=0.5), time.time()
    while step < cfg.steps and not stop:
        start, step = time.perf_counter(), step + 1
        warm = min(1, step / cfg.warmup)
        for opt, lr in zip(opts, (cfg.lr, cfg.muon_lr)):
            opt.param_groups[0]["lr"] = lr * warm
        g = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)  # all randomness of a step comes from (seed, step):
        rng = np.random.default_rng([cfg.seed, 1, step])                # resuming needs no generator state
        b = batch_to(data.draw_batch(latents, muffled, cfg.batch, T, rng), ids, cfg, g)

        with torch.autocast(cfg.device.split(":")[0], torch.bfloat16, enabled=cfg.precision == "bf16"):
            v_hat, v = predict(model, b)
        loss_fm = flow_matching_loss(v_hat, v, b.get("mask")).mean()
        loss = loss_fm

        model.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        if not torch.isfinite(grad_norm):  # before the step: the weights are still good
            raise UserError(f"step {step}: loss or gradient is not finite; the last checkpoint in {out} is intact. A smaller --lr usually helps")
        for opt in opts:
            opt.step()
        decay = min(cfg.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)

        if step % 10 == 0 or step == cfg.steps:
            log({"step": step, "loss": loss.item(), "loss_fm": loss_fm.item(), "loss_ssl": 0, "loss_struct": 0, "lambda": 0, "struct_active": 0,
                 "t_mean": float(b["t"].mean()), "lr": cfg.lr * warm, "grad_norm": float(grad_norm), "step_s": time.perf_counter() - start})
            bar.set_postfix(loss=f"{loss.item():.3f}", lr=f"{cfg.lr * warm:.1e}", refresh=False)
        bar.update()
        if step % cfg.eval_every == 0 or step == cfg.steps:
            run.step, by_t = step, validation_loss(ema, val_batches)
            checkpoint()
            quick = evaluate.preview(run, val_set)
            log({"step": step, "eval": {"val_loss": float(np.mean(by_t)), "val_loss_t": by_t, "seconds": time.time() - prepared, **quick}})
            evaluate.dashboard(out)
            bar.write(f"step {step}: validation loss {np.mean(by_t):.4f}" + "".join(f", {k.replace('_', ' ')} {v:.3f}" for k, v in quick.items()))
    bar.close()
    for s, handler in old.items():
        signal.signal(s, handler)
    if stop:
        checkpoint()
        raise UserError(f"stopped at step {step}; continue with: python train.py --resume {out}")

    print(f"trained {step} steps; {prepared - began:.0f} s of preparation, {time.time() - prepared:.0f} s of training and previews")
    evaluate.score([run], clips=cfg.score_clips, out=out / "scores.json", prepare_s=round(prepared - began), train_s=round(time.time() - prepared))
    evaluate.dashboard(out)
    print(f"total {time.time() - began:.0f} s. Sounds: {out / 'samples'}   dashboard: {out / 'dashboard.png'}")
    return out


def main() -> None:
    train(*parse(sys.argv[1:]))


if __name__ == "__main__":
    data.run_cli(main)
