"""Train a latent diffusion transformer for captioned audio, or for audio super-resolution. Reads top to bottom.

    python train.py                                     # captions to sound, preset by device, about ten CPU minutes
    python train.py --task sr                           # muffled to full band
    python train.py --recipe static                     # another row of RECIPES; or one mechanism alone: --structure off
    python train.py --data path/to/folder --val-fold 5  # your own captioned recordings
    python train.py --resume runs/t2a [--steps N]       # continue, or extend

What happens: data -> codec fit -> latents -> loop { probe, r, batch, t, x_t, losses, step, EMA } -> table and sounds in the run folder
(config.json, log.jsonl, checkpoint.pt, samples/, dashboard.png, scores.json). The regime r (regime.py) says where training is;
`drive` turns it into lambda (guidance.py), the centre m of p(t) (sampler.py) and mu (structure_reg.py).

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
import guidance
import regime
import sampler
import structure_reg
from data import RATE, UserError
from model import DiT, Words, flow_matching_loss, interpolate, make_optimizers


class Stopped(UserError):
    """Ctrl-C or SIGTERM: the step was finished, all is saved, the run can be continued."""


warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # RMSNorm in bf16: slower, not wrong


# --- configuration --------------------------------------------------------------------------------------------------------

@dataclass
class Config:
    task: str = "t2a"            # t2a: caption -> sound; sr: band-limited -> full-band sound
    data: str = "soundworld"     # soundworld, a folder of recordings (layouts: data.AudioFolder), or a mixture: a=3,soundworld=1
    max_missing: float = 0.0     # share of a folder's clips that its metadata may name and the disk not hold
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
    recipe: str = "stage"        # vanilla | static | stop | clock | stage: a row of RECIPES; single flags are laid over it
    guidance: str = "adaptive"   # off | constant | adaptive: lambda(r)
    codec: str = "mel"           # the latent space; mel: log-mel + PCA, or a neural codec (folder or hub id)
    text: str = "words"          # words: the embedded encoder, trained along, or a frozen one (folder or hub id)
    teacher: str = "tiny"        # tiny: the shipped one | its controls: random (not pretrained) | shuffled (what it hears in other clips) | folder or hub id
    teacher_layer: int = 0       # of a pretrained teacher, from 1; 0: the last
    lambda0: float = 0.5         # weight of the alignment loss (REPA: 0.5)
    gamma: float = 1.0           # exponent of its decay
    stop_at: float = 0.0         # share of the steps after which constant guidance ends at once (HASTE); 0: never
    align: int = 0               # aligned block, from 1; 0: round(0.4 L)
    timesteps: str = "adaptive"  # off: reference density (m = 0) | constant: centre t_mean | adaptive: from t_early to t_mean with r
    t_mean: float = 1.5          # m of the constant mode; > 0 is towards noise
    t_early: float = 2.0         # m at r = 0
    t_std: float = 1.0           # s of the logit-normal
    structure: str = "adaptive"  # off | constant: groups by depth, from the start | adaptive: groups found in the weights, once they have converged
    mu0: float = 0.1             # weight of the structure loss
    struct_loss: str = "grouped"  # grouped | dispersive
    regime: str = "slope"        # source of r: slope | loss | clock | replay:FILE (another run's log.jsonl)
    signal: str = "t1"           # what the slope is taken of: t1 | levels | ratio | latent (regime.signal)
    probe: str = "auto"          # auto: measure D where r depends on it | always | never
    cfg: float = 2.5             # guidance scale w of previews and scores (t2a; sr uses 1)
    sample_steps: int = 16       # Euler steps of previews and scores
    eval_every: int = 550        # steps between validation, previews and checkpoints
    score_clips: int = 500       # clips of the final table
    clap: str = ""               # a CLAP model (folder or hub id) for the final table's CLAP score
    audio_model: str = ""        # any audio model, for the final table's KID and Frechet distance
    trust_remote_code: bool = False  # run Python code that comes with a pretrained model
    allow_pickle: bool = False   # read pretrained weights that are not safetensors
    workers: int = -1            # processes that prepare data; -1: one a core
    profile: bool = False        # print each part's share of the time at the end


PRESETS = {  # what differs from the defaults above; a second entry is laid over it for super-resolution
    "smoke": ({}, {"steps": 2_000, "eval_every": 500, "clips": 2_500, "score_clips": 100}),
    "small": ({"steps": 20_000, "batch": 128, "width": 384, "depth": 12, "heads": 6, "clips": 40_000, "lr": 5e-4, "muon_lr": 2e-3, "eval_every": 1_000}, {}),
    "full": ({"steps": 300_000, "batch": 256, "width": 768, "depth": 16, "heads": 12, "channels": 96, "seconds": 10.24, "clips": 20_000,
              "lr": 2e-4, "muon_lr": 1e-3, "warmup": 2_000, "eval_every": 5_000}, {}),
}
RECIPES = {  # who drives what; the other settings are the same in every row
    "vanilla": {"guidance": "off", "timesteps": "off", "structure": "off"},
    "static": {"guidance": "constant", "timesteps": "constant", "structure": "off"},
    "stop": {"guidance": "constant", "timesteps": "constant", "structure": "off", "stop_at": 0.4},
    "clock": {"guidance": "adaptive", "timesteps": "adaptive", "structure": "adaptive", "regime": "clock"},
    "stage": {"guidance": "adaptive", "timesteps": "adaptive", "structure": "adaptive", "regime": "slope"},
}
TRUST = ("trust_remote_code", "allow_pickle")  # said anew each time: a folder from elsewhere must not say it for the user
MODES = ("off", "constant", "adaptive")
CHOICES = {"task": ("t2a", "sr"), "preset": ("auto", *PRESETS), "precision": ("auto", "fp32", "bf16"), "optimizer": ("muon", "adamw"),
           "recipe": tuple(RECIPES), "guidance": MODES, "timesteps": MODES, "structure": MODES, "struct_loss": tuple(structure_reg.LOSSES),
           "signal": regime.SIGNALS, "probe": ("auto", "always", "never")}


def parse(argv: list[str]) -> tuple[dict, str]:
    """Command line -> ({field: typed value} as given, run folder to resume or '')."""
    import argparse
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--resume", metavar="RUN", default="", help="continue the run in this folder")
    hints = typing.get_type_hints(Config)
    for f in dataclasses.fields(Config):
        how = {"action": argparse.BooleanOptionalAction, "default": None} if hints[f.name] is bool else {"type": hints[f.name], "choices": CHOICES.get(f.name)}
        p.add_argument("--" + f.name.replace("_", "-"), dest=f.name, help=f"default {f.default!r}", **how)
    given = {k: v for k, v in vars(p.parse_args(argv)).items() if v is not None}
    resume = given.pop("resume")
    extra = sorted(set(given) - {"steps", "device", "workers", "profile", *TRUST})
    if resume and extra:
        raise UserError(f"--resume continues with the run's own settings; only --steps, --device, --workers and --profile may be added, not --{extra[0].replace('_', '-')}")
    return given, resume


def resolve(given: dict) -> Config:
    """Defaults < preset (by device) < recipe < what the user typed."""
    cfg = Config(**{k: given[k] for k in ("task", "device", "preset") if k in given})
    cfg.device = evaluate.pick_device(cfg.device)
    if cfg.preset == "auto":
        cfg.preset = "small" if cfg.device.startswith("cuda") else "smoke"
    base, for_sr = PRESETS[cfg.preset]
    cfg = dataclasses.replace(cfg, **base, **(for_sr if cfg.task == "sr" else {}), **RECIPES[given.get("recipe", cfg.recipe)])
    cfg = dataclasses.replace(cfg, **{k: v for k, v in given.items() if k not in ("device", "preset")})
    if not given.get("out"):
        names = [f"runs/{cfg.task}" + (f"-{k}" if k > 1 else "") for k in range(1, 10_000)]
        cfg.out = next(n for n in names if not Path(n).exists())
    for name, ok, why in (("steps", cfg.steps > 0, "positive"), ("batch", cfg.batch > 0, "positive"), ("lr", cfg.lr > 0, "positive"), ("muon_lr", cfg.muon_lr > 0, "positive"),
                          ("heads", cfg.heads > 0 and cfg.width % (2 * cfg.heads) == 0, "such that width / heads is an even number"),
                          ("channels", 0 < cfg.channels <= 128, "from 1 to 128"), ("seconds", 0.5 <= cfg.seconds <= 30, "from 0.5 to 30"),
                          ("seed", cfg.seed >= 0, "0 or more"), ("max_missing", 0 <= cfg.max_missing < 1, "in [0, 1)"), ("warmup", cfg.warmup > 0, "positive"), ("score_clips", cfg.score_clips >= 2, "at least 2"),
                          ("clips", cfg.clips >= 100, "at least 100"), ("variants", cfg.variants > 0, "positive"), ("eval_every", cfg.eval_every > 0, "positive"),
                          ("cond_drop", 0 <= cfg.cond_drop < 1, "in [0, 1)"), ("sample_steps", cfg.sample_steps > 0, "positive"),
                          ("lambda0", cfg.lambda0 >= 0, "0 or more"), ("mu0", cfg.mu0 >= 0, "0 or more"), ("gamma", cfg.gamma > 0, "positive"),
                          ("stop_at", 0 <= cfg.stop_at <= 1, "in [0, 1]"), ("align", 0 <= cfg.align <= cfg.depth, f"a block from 1 to {cfg.depth}, or 0"),
                          ("t_std", cfg.t_std > 0, "positive"), ("depth", cfg.depth > 0, "positive"),
                          ("probe", cfg.probe != "never" or cfg.regime != "slope" or "adaptive" not in (cfg.guidance, cfg.timesteps, cfg.structure),
                           "auto or always where an adaptive mechanism follows the slope")):
        if not ok:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be {why}")
    try:
        regime.Regime(cfg.regime, cfg.steps)
    except (ValueError, OSError) as e:
        raise UserError(f"--regime {cfg.regime}: {e}") from None
    return dataclasses.replace(cfg, align=cfg.align or max(1, round(0.4 * cfg.depth)))


# --- parts of the loop ----------------------------------------------------------------------------------------------------

def drive(cfg: Config, r: float, k: int, latch: structure_reg.Structure) -> tuple[float, float, float, list[int] | None]:
    """The regime r at step k -> (lambda, m, mu, groups of blocks): where the three mechanisms meet what drives them."""
    lam = {"off": 0.0, "adaptive": guidance.weight(r, cfg.lambda0, cfg.gamma),
           "constant": 0.0 if cfg.stop_at and k > cfg.stop_at * cfg.steps else cfg.lambda0}[cfg.guidance]
    m = {"off": sampler.REFERENCE_M, "constant": cfg.t_mean, "adaptive": sampler.centre(r, cfg.t_early, cfg.t_mean)}[cfg.timesteps]
    mu = {"off": 0.0, "constant": cfg.mu0, "adaptive": structure_reg.weight(r, cfg.mu0, k, latch.latched, round(0.1 * cfg.steps))}[cfg.structure]
    return lam, m, mu, latch.groups or structure_reg.by_depth(cfg.depth, latch.G)


def batch_to(b: dict, ids: list, cfg: Config, g: torch.Generator, m: float = 0.0) -> dict:
    """A numpy batch -> tensors on the device, with the noise of the step drawn from g (on the CPU, so that it is the same
    whatever the device): x0, eps (B, T, C), t (B,), drop (B,), mask (B, T) or None, ids (B, S) or cond (B, T, C)[, phi (B, T, F)]."""
    x0 = torch.from_numpy(b["x0"])
    out = {"x0": x0, "eps": torch.randn(x0.shape, generator=g), "t": sampler.sample(len(x0), m, cfg.t_std, generator=g),
           "drop": torch.rand(len(x0), generator=g) < cfg.cond_drop}
    if not b["mask"].all():
        out["mask"] = torch.from_numpy(b["mask"])
    out |= {name: torch.from_numpy(b[name]) for name in ("cond", "phi") if name in b}
    if "cond" not in b:
        rows = [ids[i][k % len(ids[i])] for i, k in zip(b["i"], b["wording"])]
        out["ids"] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {k: v.to(cfg.device, non_blocking=True) for k, v in out.items()}


def predict(model: DiT, b: dict, drop: bool = True, return_blocks: bool = False):
    """-> v_hat [, hs], v (B, T, C) of a batch."""
    x_t, v = interpolate(b["x0"], b["eps"], b["t"])
    gone = b["drop"] if drop else None
    text = model.encode_text(b["ids"], gone) if "ids" in b else None
    out = model(x_t, b["t"], text, b.get("cond"), b.get("mask"), gone if "cond" in b else None, return_blocks)
    return (*out, v) if return_blocks else (out, v)


@torch.no_grad()
def validation_loss(model: DiT, batches: list[dict], bins: int = 10) -> list[float]:
    """Loss on held-out clips at t = .05, .15 ... .95, the same noise each time; one bin a number."""
    out = []
    for k in range(bins):
        loss = [flow_matching_loss(*predict(model, {**b, "t": torch.full_like(b["t"], (k + 0.5) / bins)}, drop=False), b.get("mask")) for b in batches]
        out.append(float(torch.cat(loss).mean()))
    return out


@torch.no_grad()
def measure(model: DiT, b: dict, hear, target: torch.Tensor, mean: torch.Tensor | None, levels, shuffled: bool) -> tuple[dict, float | None]:
    """One probe -> ({t: D}, D at t = 1 under the neighbour's condition or None). Nothing is drawn."""
    def with_condition(shift):
        text = model.encode_text(b["ids"].roll(shift, 0)) if "ids" in b else None
        cond = b["cond"].roll(shift, 0) if "cond" in b else None
        return lambda x_t, t: model(x_t, t, text, cond, b.get("mask"))
    D = regime.probe(with_condition(0), hear, b["x0"], b["eps"], levels, mean, target, b.get("mask"))
    other = regime.probe(with_condition(1), hear, b["x0"], b["eps"], (1.0,), mean, target, b.get("mask"))[1.0] if shuffled else None
    return D, other


def open_teacher(cfg: Config) -> torch.nn.Module:
    """The SSL teacher that the configuration names."""
    if cfg.teacher in ("tiny", "shuffled"):
        return guidance.load_teacher()
    if cfg.teacher == "random":
        return guidance.random_teacher(cfg.seed)
    import pretrained
    return pretrained.PretrainedTeacher(cfg.teacher, cfg.teacher_layer, trust=cfg.trust_remote_code, pickles=cfg.allow_pickle, device=cfg.device)


def circuits(model: DiT) -> list[tuple]:
    """(W_O, W_V, W_1, W_2, C) of each block: what structure_reg.py compares."""
    return [(b.out.weight, b.qkv.weight.chunk(3)[2], b.mlp[0].weight, b.mlp[2].weight, b.ada.weight) for b in model.blocks]


# --- the run --------------------------------------------------------------------------------------------------------------

def train(given: dict, resume: str = "") -> Path:
    """Run a configuration to its end and return its folder. `given` holds Config fields; with `resume`, of that folder's run."""
    began, ckpt = time.time(), None
    if resume:
        cfg, ckpt = evaluate.load_checkpoint(Path(resume))
        if "optimizer" not in ckpt or set(cfg) != {f.name for f in dataclasses.fields(Config)}:
            raise UserError(f"--resume {resume}: an exported or foreign checkpoint (no optimizer state, or other settings); it can be used, not continued")
        cfg = dataclasses.replace(Config(**cfg), out=resume, **dict.fromkeys(TRUST, False) | given)
        cfg.device = evaluate.pick_device(cfg.device)
        if cfg.steps <= ckpt["step"] and "steps" in given:
            raise UserError(f"--steps {cfg.steps}: {resume} already has {ckpt['step']} steps; give a larger number")
    else:
        cfg = resolve(given)
        if Path(cfg.out).exists() and any(Path(cfg.out).iterdir()):
            raise UserError(f"--out {cfg.out}: folder is not empty; resume it with --resume {cfg.out}, or choose another")
    workers = None if cfg.workers < 0 else cfg.workers

    # parts that may be missing come first: that should cost nobody the minutes of preparation
    foreign = (cfg.device, cfg.trust_remote_code, cfg.allow_pickle)
    codec = evaluate.open_codec(dataclasses.asdict(cfg), *foreign)
    cfg.channels = codec.channels  # a neural codec may have fewer
    words = evaluate.open_text(dataclasses.asdict(cfg), [], *foreign) if cfg.task == "t2a" and cfg.text != "words" else None
    where = regime.Regime(cfg.regime, cfg.steps)
    probing = cfg.probe == "always" or cfg.probe == "auto" and where.source == "slope" and "adaptive" in (cfg.guidance, cfg.timesteps, cfg.structure)
    teacher = open_teacher(cfg) if cfg.guidance != "off" or probing else None

    # data: waveforms, codec, latents
    print(f"cache: {data.cache_dir()} (safe to delete at any time)")
    train_set, val_set = (data.open_data(cfg.data, split, n, cfg.val_fold, cfg.seconds, cfg.max_missing) for split, n in (("train", cfg.clips), ("val", 256)))
    out = Path(cfg.out)
    (out / "samples").mkdir(parents=True, exist_ok=True)  # claims the name before the minutes of preparation
    missing = sorted({*getattr(train_set, "missing", []), *getattr(val_set, "missing", [])})
    if missing:
        (out / "missing.txt").write_text("\n".join(missing) + "\n", encoding="utf-8")
        print(f"{len(missing)} clips are missing and left out; they are listed in {out / 'missing.txt'}")
    train_set.prepare(workers)
    val_set.prepare(workers)
    if ckpt:
        evaluate.load_weights(resume, codec, ckpt["codec"])
    else:
        codec.fit(train_set.wave(i)[: 10 * RATE] for i in np.random.default_rng(cfg.seed).permutation(len(train_set))[:500])
        print(f"codec {cfg.codec}: {cfg.channels} components hold {100 * codec.explained:.1f} % of the variance; {codec.rate:g} tokens a second")
    latents, val_latents = data.LatentCache(train_set, codec), data.LatentCache(val_set, codec)
    muffled, val_muffled = (data.LatentCache(d, codec, cfg.variants, workers) if cfg.task == "sr" else None for d in (train_set, val_set))
    T = codec.tokens(round(cfg.seconds * RATE))
    ids, val_ids = [], []
    if cfg.task == "t2a":
        captions = [[train_set.caption(i, k) for k in range(train_set.wordings)] for i in range(len(train_set))]
        if words is None:
            words = Words(ckpt["words"]) if ckpt else Words.fit(c for cs in captions for c in cs)
        ids, val_ids = words.cache(captions), words.cache([[val_set.caption(i)] for i in range(len(val_set))])
    val_batches = [batch_to(data.draw_batch(val_latents, val_muffled, 64, T, np.random.default_rng([cfg.seed, 9, k])), val_ids, cfg,
                            torch.Generator().manual_seed(9_000 + k)) for k in range(2)]

    # model, EMA, optimizer
    torch.manual_seed(cfg.seed)
    model = evaluate.build_model(dataclasses.asdict(cfg), words).to(cfg.device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    model_opts = make_optimizers(model, cfg.optimizer, cfg.lr, cfg.muon_lr, cfg.weight_decay)

    # regime and mechanisms; each draws from a generator of its own
    latch = structure_reg.Structure(cfg.depth, cfg.seed)
    watching, phi, projector, opts = cfg.structure == "adaptive" or cfg.probe == "always", None, None, list(model_opts)
    if teacher is not None:
        ear = guidance.Ear(codec, teacher)
        if cfg.guidance != "off":
            phi, projector = data.LatentCache(train_set, ear), guidance.Projector(cfg.width, ear.channels, cfg.seed).to(cfg.device)
            opts.append(torch.optim.AdamW(projector.parameters(), cfg.lr, (0.9, 0.99), weight_decay=cfg.weight_decay))
        phi_mean = guidance.feature_mean(ear, latents, train_set, cfg.device)
        ear = ear.to(cfg.device)
        hear, mean = (torch.nn.Identity(), None) if cfg.signal == "latent" else (ear, phi_mean)
        probe_batch = {k: v[:48] for k, v in val_batches[0].items()}
        target = hear(probe_batch["x0"])
    step, before = 0, 0.0
    if ckpt:
        evaluate.load_weights(resume, model, ckpt["model"])
        evaluate.load_weights(resume, ema, ckpt["ema"])
        if projector:
            evaluate.load_weights(resume, projector, ckpt["projector"])
        for opt, state in zip(opts, ckpt["optimizer"], strict=True):
            opt.load_state_dict(state)
        where.load_state_dict(ckpt["regime"])
        latch.load_state_dict(ckpt["structure"])
        step, before = ckpt["step"], ckpt["seconds"]
    autocast = lambda on: torch.autocast(cfg.device.split(":")[0], torch.bfloat16, enabled=on)
    if cfg.precision == "auto":
        def trial(bf16: bool):  # emulated bf16 can be ten times slower: on a CPU a small batch tells as much
            b = val_batches[0] if cfg.device.startswith("cuda") else {k: v[:8] for k, v in val_batches[0].items()}
            with autocast(bf16):
                v_hat, v = predict(model, b)
            flow_matching_loss(v_hat, v).mean().backward()
            model.zero_grad()
        cfg.precision = evaluate.pick_precision(trial, cfg.device)
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1) + "\n")
    log = evaluate.open_log(out / "log.jsonl", step)
    run = evaluate.Run(out, dataclasses.asdict(cfg), ema, codec, words, step)
    n_par = sum(p.numel() for p in model.parameters())
    print(f"{cfg.task} on {cfg.data}: {len(train_set)} clips, {n_par / 1e6:.2f} M parameters, recipe {cfg.recipe}, {cfg.steps} steps of {cfg.batch} on {cfg.device}, run folder {out}")

    stop = []  # Ctrl-C or SIGTERM: finish the step, save, leave
    old = {s: signal.signal(s, lambda *a: stop.append(a[0])) for s in (signal.SIGINT, signal.SIGTERM)}

    laps = evaluate.Laps(cfg.device if cfg.profile else "")
    seconds = lambda: before + sum(v for k, v in laps.seconds.items() if k != "log and evaluation")  # what training itself took

    def checkpoint():
        evaluate.save_checkpoint(out / "checkpoint.pt", step=step, config=dataclasses.asdict(cfg), model=model.state_dict(), ema=ema.state_dict(),
                                 optimizer=[opt.state_dict() for opt in opts], codec=codec.state_dict(), words=words.words if words is not None else [], seconds=seconds(),
                                 regime=where.state_dict(), structure=latch.state_dict(), projector=projector.state_dict() if projector else {})

    bar, prepared = tqdm(total=cfg.steps, initial=step, unit="step", dynamic_ncols=True, mininterval=0.5), time.time()
    while step < cfg.steps and not stop:
        start, step = time.perf_counter(), step + 1
        warm = min(1, step / cfg.warmup)
        for opt, lr in zip(model_opts, (cfg.lr, cfg.muon_lr)):          # the projector needs no warm-up: its loss is bounded
            opt.param_groups[0]["lr"] = lr * warm

        # where is training? Before the step, so that a replay of the log drives each step as it was driven here
        j, found = where.probe_index(step), {}
        laps.start()
        if j is not None and where.source == "loss":
            where.update(step, where.mean_loss())
        if j is not None and probing:
            levels, shuffled = (regime.LEVELS, True) if j % regime.PER_DOUBLING == 0 else regime.needs(cfg.signal)
            with autocast(cfg.precision == "bf16"):
                D, other = measure(ema, probe_batch, hear, target, mean, levels, shuffled)
            found = {"D": regime.signal(cfg.signal, D, other), "D_t": {str(t): d for t, d in D.items()}, **({} if other is None else {"D_shuffled": other})}
            if where.source == "slope":
                where.update(step, found["D"])
        r = where.r(step)
        laps("probe")
        if j is not None and j % 2 == 0 and watching:
            seen = latch.check(step, circuits(model))
            if seen:
                found["structure"] = seen
        laps("structure")
        lam, m, mu, groups = drive(cfg, r, step, latch)

        g = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)  # all randomness of a step comes from (seed, step):
        rng = np.random.default_rng([cfg.seed, 1, step])                # resuming needs no generator state
        b = batch_to(data.draw_batch(latents, muffled, cfg.batch, T, rng, phi if lam else None), ids, cfg, g, m)
        laps("data")

        with autocast(cfg.precision == "bf16"):
            v_hat, hs, v = predict(model, b, return_blocks=True)
        loss = loss_fm = flow_matching_loss(v_hat, v, b.get("mask")).mean()
        loss_ssl = loss_struct = torch.zeros(())
        laps("forward")
        if lam:
            half = slice(step % 2, None, 2)  # even and odd tokens in turn: neighbours resemble each other, and P on all of them costs 10 % of a step
            with autocast(cfg.precision == "bf16"):
                z = projector(hs[cfg.align][:, half])
            heard = b["phi"].roll(1, 0) if cfg.teacher == "shuffled" else b["phi"]
            loss_ssl = guidance.alignment_loss(z, heard[:, half] - phi_mean, b["mask"][:, half] if "mask" in b else None)
            loss = loss + lam * loss_ssl
            if j is not None and j % 4 == 0:
                found["agreement"] = guidance.gradient_agreement(loss_fm, loss_ssl, list(model.blocks[cfg.align - 1].parameters()))
        laps("guidance")
        if mu:
            loss_struct = structure_reg.LOSSES[cfg.struct_loss](hs, groups, b.get("mask"))
            loss = loss + mu * loss_struct
        laps("structure")

        for opt in opts:
            opt.zero_grad(set_to_none=True)
        loss.backward()
        laps("backward")
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        if not torch.isfinite(grad_norm):  # before the step: the weights are still good
            raise UserError(f"step {step}: loss or gradient is not finite; the last checkpoint in {out} is intact. A smaller --lr usually helps")
        for opt in opts:
            opt.step()  # the projector's does nothing where guidance is off: its gradients are None
        if where.source == "loss":
            where.observe(loss_fm)
        laps("optimizer")
        decay = min(cfg.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        laps("EMA")

        if step % 10 == 0 or step == cfg.steps or j is not None:
            log({"step": step, "loss": loss.item(), "loss_fm": loss_fm.item(), "loss_ssl": loss_ssl.item(), "loss_struct": loss_struct.item(), "lambda": lam,
                 "mu": mu, "m": m, "r": r, "struct_active": int(mu > 0), "t_mean": float(b["t"].mean()), "lr": cfg.lr * warm, "grad_norm": float(grad_norm),
                 "step_s": time.perf_counter() - start, **found, **({"slope": where.s} if j is not None and where.s is not None else {}),
                 **({"no_signal": 1} if where.no_signal else {})})
            bar.set_postfix(loss=f"{loss.item():.3f}", r=f"{r:.2f}", refresh=False)
        bar.update()
        if step % cfg.eval_every == 0 or step == cfg.steps:
            run.step, by_t = step, validation_loss(ema, val_batches)
            quick = evaluate.preview(run, val_set)
            log({"step": step, "eval": {"val_loss": float(np.mean(by_t)), "val_loss_t": by_t, "seconds": seconds(), **quick}})
            checkpoint()  # after its line in the log: a kill in between then loses steps, which are made again, and never an evaluation
            evaluate.dashboard(out)
            bar.write(f"step {step}: validation loss {np.mean(by_t):.4f}" + "".join(f", {k.replace('_', ' ')} {v:.3f}" for k, v in quick.items() if v is not None and k != "order_n") + f", r {r:.2f}")
        laps("log and evaluation")
    bar.close()
    for s, handler in old.items():
        signal.signal(s, handler)
    if stop:
        checkpoint()
        raise Stopped(f"stopped at step {step}; continue with: python train.py --resume {out}")
    if cfg.profile:
        print(laps.table())

    print(f"trained {step} steps; {prepared - began:.0f} s of preparation, {time.time() - prepared:.0f} s of training and previews")
    evaluate.score([run], clips=cfg.score_clips, out=out / "scores.json", clap=cfg.clap, audio_model=cfg.audio_model, trust=cfg.trust_remote_code,
                   pickles=cfg.allow_pickle, device=cfg.device, prepare_s=round(prepared - began), train_s=round(time.time() - prepared))
    evaluate.dashboard(out)
    print(f"total {time.time() - began:.0f} s. Sounds: {out / 'samples'}   dashboard: {out / 'dashboard.png'}")
    return out


def main() -> None:
    train(*parse(sys.argv[1:]))


if __name__ == "__main__":
    data.run_cli(main)
