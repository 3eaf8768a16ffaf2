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

import contextlib
import copy
import dataclasses
import datetime
import json
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import config
import data
import evaluate
import guidance
import regime
import sampler
import structure_reg
from config import Config
from data import RATE, UserError
from model import DiT, Words, flow_matching_loss, interpolate, make_optimizers


class Stopped(UserError):
    """Ctrl-C or SIGTERM: the step was finished, all is saved, the run can be continued."""


# --- several devices: torchrun starts this file once a device, and each process takes its rows of the same batch ----------------

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def shared(x):
    """x of process 0, on all of them."""
    box = [x]
    if WORLD > 1:
        dist.broadcast_object_list(box)
    return box[0]


def join(given: dict, resume: str) -> tuple[Config, dict | None]:
    """Meet the other processes; -> settings and checkpoint as process 0 has them, with the device of this one."""
    cuda = evaluate.pick_device(given.get("device", "auto")).startswith("cuda")
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():  # patience: the others wait while process 0 prepares and evaluates
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=2))
    try:
        box = settings(given, resume) if RANK == 0 else None
    except UserError as e:
        box = e
    box = shared(box)
    if isinstance(box, UserError):
        raise box if RANK == 0 else SystemExit(2)
    cfg, ckpt = box
    if cfg.batch % (WORLD * cfg.accumulate):
        raise UserError(f"--batch {cfg.batch}: must be a multiple of {WORLD} processes x {cfg.accumulate} parts (--accumulate)")
    return dataclasses.replace(cfg, device=f"cuda:{os.environ['LOCAL_RANK']}") if cuda else cfg, ckpt


# --- parts of the loop ----------------------------------------------------------------------------------------------------

def drive(cfg: Config, r: float, k: int, latch: structure_reg.Structure) -> tuple[float, float, float, list[int] | None]:
    """The regime r at step k -> (lambda, m, mu, groups of blocks): where the three mechanisms meet what drives them."""
    lam = {"off": 0.0, "adaptive": guidance.weight(r, cfg.lambda0, cfg.gamma),
           "constant": 0.0 if cfg.stop_at and k > cfg.stop_at * cfg.steps else cfg.lambda0}[cfg.guidance]
    m = {"off": sampler.REFERENCE_M, "constant": cfg.t_mean, "adaptive": sampler.centre(r, cfg.t_early, cfg.t_mean)}[cfg.timesteps]
    mu = {"off": 0.0, "constant": cfg.mu0, "adaptive": structure_reg.weight(r, cfg.mu0, k, latch.latched, round(0.1 * cfg.steps))}[cfg.structure]
    return lam, m, mu, latch.groups or structure_reg.by_depth(cfg.depth, latch.G)


def batch_to(b: dict, ids: list, cfg: Config, g: torch.Generator, m: float = 0.0, size: int = 0, rows: slice = slice(None)) -> dict:
    """A numpy batch -> tensors on the device, with the noise of the step drawn from g (on the CPU, so that it is the same
    whatever the device): x0, eps (B, T, C), t (B,), drop (B,), mask (B, T) or None, ids (B, S) or cond (B, T, C)[, phi (B, T, F)].

    b may hold some `rows` of a batch of `size` clips: noise is drawn for all of them, so a row's is the same on any number of devices."""
    x0 = torch.from_numpy(b["x0"])
    size = size or len(x0)
    out = {"x0": x0, "eps": torch.randn(size, *x0.shape[1:], generator=g)[rows], "t": sampler.sample(size, m, cfg.t_std, generator=g)[rows],
           "drop": torch.rand(size, generator=g)[rows] < cfg.cond_drop}
    if not b["mask"].all():
        out["mask"] = torch.from_numpy(b["mask"])
    out |= {name: torch.from_numpy(b[name]) for name in ("cond", "phi") if name in b}
    if "cond" not in b:
        rows = [ids[i][k % len(ids[i])] for i, k in zip(b["i"], b["wording"])]
        out["ids"] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {k: v.to(cfg.device, non_blocking=True) for k, v in out.items()}


def predict(model: DiT, b: dict, drop: bool = True, return_blocks: bool = False, net=None):
    """-> v_hat [, hs], v (B, T, C) of a batch. net: the model as it is called where that is not the model itself (compiled, distributed)."""
    x_t, v = interpolate(b["x0"], b["eps"], b["t"])
    gone = b["drop"] if drop else None
    text = model.encode_text(b["ids"], gone) if "ids" in b else None
    out = (model if net is None else net)(x_t, b["t"], text, b.get("cond"), b.get("mask"), gone if "cond" in b else None, return_blocks)
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


class Learner:
    """What learns: the network, its average, the projector, their optimizers. `losses` and `update` are one step of training."""

    def __init__(self, cfg: Config, words, features: int = 0, phi_mean: torch.Tensor | None = None):
        """features: width of the teacher's features where there is guidance; phi_mean (F,): their mean."""
        torch.manual_seed(cfg.seed)
        self.cfg, self.phi_mean = cfg, phi_mean
        self.model = evaluate.build_model(dataclasses.asdict(cfg), words).to(cfg.device)
        self.model.checkpointing = cfg.checkpointing
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.projector = guidance.Projector(cfg.width, features, cfg.seed).to(cfg.device) if features else None
        self.model_opts = make_optimizers(self.model, cfg.optimizer, cfg.lr, cfg.muon_lr, cfg.weight_decay)
        self.opts = self.model_opts + ([torch.optim.AdamW(self.projector.parameters(), cfg.lr, (0.9, 0.99), weight_decay=cfg.weight_decay, fused=cfg.device != "mps")] if features else [])
        self.net, self.project = self.model, self.projector        # as they are called: averaging gradients over devices, compiled
        if WORLD > 1:
            spread = lambda module: torch.nn.parallel.DistributedDataParallel(module, [cfg.device] if cfg.device.startswith("cuda") else None)
            self.net, self.project = spread(self.model), spread(self.projector) if features else None
        if cfg.compile:
            self.net = torch.compile(self.net)

    def autocast(self):
        return torch.autocast(self.cfg.device.split(":")[0], torch.bfloat16, enabled=self.cfg.precision == "bf16")

    def losses(self, b: dict, step: int, lam: float, mu: float, groups: list[int] | None, lap=lambda name: None) -> dict:
        """Losses of a batch: total, fm, ssl, struct (those that are off are 0)."""
        cfg = self.cfg
        with self.autocast():
            v_hat, hs, v = predict(self.model, b, return_blocks=True, net=self.net)
        fm = flow_matching_loss(v_hat, v, b.get("mask")).mean()
        total, ssl, struct = fm, torch.zeros(()), torch.zeros(())
        lap("forward")
        if lam:
            some = slice(step % cfg.guide_every, None, cfg.guide_every)  # all tokens in turn: P on every one of them costs 10 % of a step
            with self.autocast():
                z = self.project(hs[cfg.align][:, some])
            heard = b["phi"].roll(1, 0) if cfg.teacher == "shuffled" else b["phi"]
            ssl = guidance.alignment_loss(z, heard[:, some] - self.phi_mean, b["mask"][:, some] if "mask" in b else None)
            total = total + lam * ssl
        lap("guidance")
        if mu:
            struct = structure_reg.LOSSES[cfg.struct_loss](hs, groups, b.get("mask"))
            total = total + mu * struct
        lap("structure")
        return {"total": total, "fm": fm, "ssl": ssl, "struct": struct}

    def update(self, step: int, lap=lambda name: None) -> torch.Tensor:
        """Clip the gradients, move the weights, then their average. -> norm of the gradient before clipping; if that is not finite, nothing moves."""
        cfg, warm = self.cfg, min(1, step / self.cfg.warmup)
        for opt, lr in zip(self.model_opts, (cfg.lr, cfg.muon_lr)):     # the projector needs no warm-up: its loss is bounded
            opt.param_groups[0]["lr"] = lr * warm
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.clip)
        finite = bool(torch.isfinite(norm))  # the one wait for the device in a step
        for opt in self.opts:
            if finite:
                opt.step()  # the projector's does nothing where guidance is off: its gradients are None
            opt.zero_grad(set_to_none=True)
        if not finite:
            return norm
        lap("optimizer")
        decay = min(cfg.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        lap("EMA")
        return norm

    def state_dict(self) -> dict:
        return {"model": self.model.state_dict(), "ema": self.ema.state_dict(), "optimizer": [opt.state_dict() for opt in self.opts],
                "projector": self.projector.state_dict() if self.projector else {}}

    def load(self, state: dict, where: str) -> None:
        for name in ("model", "ema", *(["projector"] if self.projector else [])):
            evaluate.load_weights(where, getattr(self, name), state[name])
        for opt, saved in zip(self.opts, state["optimizer"], strict=True):
            opt.load_state_dict(saved)


def pick_precision(learner: Learner, b: dict) -> str:
    """fp32 or bf16, whichever is faster here at this shape."""
    def trial(bf16: bool):  # emulated bf16 can be ten times slower: on a CPU a small batch tells as much
        some = b if learner.cfg.device.startswith("cuda") else {k: v[:8] for k, v in b.items()}
        with torch.autocast(learner.cfg.device.split(":")[0], torch.bfloat16, enabled=bf16):
            v_hat, v = predict(learner.model, some)
        flow_matching_loss(v_hat, v).mean().backward()
        learner.model.zero_grad()
    return evaluate.pick_precision(trial, learner.cfg.device)


SKIPS = 10  # steps in a row without a finite gradient, after which a run ends


def culprits(drawn: dict, train_set) -> list[str]:
    """Names of the clips of a batch that are not finite themselves, or of all of them; of all devices."""
    finite = np.all([np.isfinite(drawn[k]).all((1, 2)) for k in ("x0", "cond", "phi") if k in drawn], 0)
    names = [train_set.name(int(i)) for i in drawn["i"][~finite]]
    found = [(names, [train_set.name(int(i)) for i in drawn["i"]])] * WORLD
    if WORLD > 1:
        dist.all_gather_object(found, found[0])
    return sorted({n for bad, _ in found for n in bad} or {n for _, every in found for n in every})


def parts(b: dict, n: int) -> list[dict]:
    """A batch cut into n equal parts (gradient accumulation)."""
    return [b] if n == 1 else [dict(zip(b, part)) for part in zip(*(v.chunk(n) for v in b.values()))]


class Ahead:
    """Draws the clips of a step; on a GPU a thread draws those of the next one meanwhile. What is drawn depends on (seed, step) alone."""

    def __init__(self, cfg: Config, latents, muffled, T: int, phi, rows: slice):
        self.args, self.pool, self.next = (cfg, latents, muffled, T, phi, rows), ThreadPoolExecutor(1) if cfg.device.startswith("cuda") else None, None

    def draw(self, step: int, with_phi: bool) -> dict:
        cfg, latents, muffled, T, phi, rows = self.args
        return data.draw_batch(latents, muffled, cfg.batch, T, np.random.default_rng([cfg.seed, 1, step]), phi if with_phi else None, rows)

    def __call__(self, step: int, with_phi: bool) -> dict:
        known, job = self.next or (None, None)
        b = job.result() if known == (step, with_phi) else self.draw(step, with_phi)
        if self.pool:
            self.next = (step + 1, with_phi), self.pool.submit(self.draw, step + 1, with_phi)
        return b


# --- the run --------------------------------------------------------------------------------------------------------------

def settings(given: dict, resume: str) -> tuple[Config, dict | None]:
    """What the user gave, completed, and the checkpoint to go on from."""
    if not resume:
        cfg = config.resolve(given)
        if Path(cfg.out).exists() and any(Path(cfg.out).iterdir()):
            raise UserError(f"--out {cfg.out}: folder is not empty; resume it with --resume {cfg.out}, or choose another")
        return cfg, None
    begun = evaluate.has_checkpoint(Path(resume))  # or died before its first checkpoint: then from the start
    cfg, ckpt = evaluate.load_checkpoint(Path(resume)) if begun else (evaluate.load_config(Path(resume)), None)
    if ckpt and "optimizer" not in ckpt:
        raise UserError(f"--resume {resume}: an exported checkpoint (no optimizer state); it can be used, not continued")
    cfg = dataclasses.replace(Config(**cfg), out=resume, **dict.fromkeys(config.TRUST, False) | given)
    cfg.device = evaluate.pick_device(cfg.device)
    if ckpt and cfg.steps <= ckpt["step"] and "steps" in given:
        raise UserError(f"--steps {cfg.steps}: {resume} already has {ckpt['step']} steps; give a larger number")
    return cfg, ckpt


def train(given: dict, resume: str = "") -> Path:
    """Run a configuration to its end and return its folder. `given` holds Config fields; with `resume`, of that folder's run."""
    with contextlib.ExitStack() as stack:
        hold = lambda folder: stack.enter_context(data.alone(folder, f"{folder}: another process is training this run; wait for it, or end it"))
        if RANK == 0 and resume and (Path(resume) / "config.json").is_file():
            hold(Path(resume))
        cfg, ckpt = join(given, resume) if WORLD > 1 else settings(given, resume)
        return _train(cfg, ckpt, resume, hold)


def _train(cfg: Config, ckpt: dict | None, resume: str, hold) -> Path:
    """`train` with complete settings and the checkpoint to go on from. hold(folder): no other process may train there from now on."""
    began = time.time()
    workers, first = None if cfg.workers < 0 else cfg.workers, RANK == 0

    # parts that may be missing come first: that should cost nobody the minutes of preparation
    foreign = (cfg.device, cfg.trust_remote_code, cfg.allow_pickle)
    codec = evaluate.open_codec(dataclasses.asdict(cfg), *foreign)
    cfg.channels = codec.channels  # a neural codec may have fewer
    words = evaluate.open_text(dataclasses.asdict(cfg), [], *foreign) if cfg.task == "t2a" and cfg.text != "words" else None
    where, latch = regime.Regime(cfg.regime, cfg.steps), structure_reg.Structure(cfg.depth, cfg.seed)
    adaptive = "adaptive" in (cfg.guidance, cfg.timesteps, cfg.structure)
    probing = cfg.probe == "always" or cfg.probe == "auto" and where.source == "slope" and adaptive
    watching = cfg.structure == "adaptive" or cfg.probe == "always"
    teacher = open_teacher(cfg) if cfg.guidance != "off" or probing else None

    # data: waveforms, codec, latents, captions (several processes wait for the one that fills a cache)
    print(f"cache: {data.cache_dir()} (safe to delete at any time)")
    train_set, val_set = (data.open_data(cfg.data, split, n, cfg.val_fold, cfg.seconds, cfg.max_bad_share) for split, n in (("train", cfg.clips), ("val", 256)))
    out = Path(cfg.out)
    (out / "samples").mkdir(parents=True, exist_ok=True)
    if first and not resume:  # the name is taken before the minutes of preparation, and what dies there can be resumed
        hold(out)
        data.write_whole(out / "config.json", json.dumps(dataclasses.asdict(cfg), indent=1) + "\n")
    try:
        train_set.prepare(workers)
        val_set.prepare(workers)
    except UserError:  # too many files that can't be read
        if first and not resume:
            shutil.rmtree(out)
        raise
    for note in getattr(train_set, "notes", []) + getattr(val_set, "notes", []):
        print(f"note: {note}")
    bad = sorted({*getattr(train_set, "bad", []), *getattr(val_set, "bad", [])})
    if bad and first:
        data.write_whole(out / "bad.txt", "\n".join(map(data.printable, bad)) + "\n")
        print(f"note: {len(bad)} rows or files can't be used and are left out; they are listed in {out / 'bad.txt'}")
    if ckpt:
        evaluate.load_weights(resume, codec, ckpt["codec"])
    else:
        codec.fit(train_set.wave(i)[: 10 * RATE] for i in np.random.default_rng(cfg.seed).permutation(len(train_set))[:500])
        print(f"codec {cfg.codec}: {cfg.channels} components hold {100 * codec.explained:.1f} % of the variance; {codec.rate:g} tokens a second")
    latents, val_latents = data.LatentCache(train_set, codec), data.LatentCache(val_set, codec)
    muffled, val_muffled = (data.LatentCache(d, codec, cfg.variants, workers) if cfg.task == "sr" else None for d in (train_set, val_set))
    T, ids, val_ids = codec.tokens(round(cfg.seconds * RATE)), [], []
    if cfg.task == "t2a":
        captions = [[train_set.caption(i, k) for k in range(train_set.wordings)] for i in range(len(train_set))]
        if words is None:
            words = Words(ckpt["words"]) if ckpt else Words.fit(c for cs in captions for c in cs)
        ids, val_ids = words.cache(captions), words.cache([[val_set.caption(i)] for i in range(len(val_set))])
    val_batches = [batch_to(data.draw_batch(val_latents, val_muffled, 64, T, np.random.default_rng([cfg.seed, 9, k])), val_ids, cfg,
                            torch.Generator().manual_seed(9_000 + k)) for k in range(2)]

    # what learns, and what it is taught and measured by
    phi, ear, phi_mean = None, None, None
    if teacher is not None:
        ear = guidance.Ear(codec, teacher)
        phi = data.LatentCache(train_set, ear) if cfg.guidance != "off" else None
        phi_mean = guidance.feature_mean(ear, latents, train_set, cfg.device)
        ear = ear.to(cfg.device)
        hear, mean = (torch.nn.Identity(), None) if cfg.signal == "latent" else (ear, phi_mean)
        probe_batch = {k: v[:48] for k, v in val_batches[0].items()}
        target = hear(probe_batch["x0"])
    learner = Learner(cfg, words, ear.channels if phi else 0, phi_mean)
    model, ema, step, before = learner.model, learner.ema, 0, 0.0
    if ckpt:
        learner.load(ckpt, resume)
        where.load_state_dict(ckpt["regime"])
        latch.load_state_dict(ckpt["structure"])
        step, before = ckpt["step"], ckpt["seconds"]
    if cfg.precision == "auto":
        cfg.precision = shared(pick_precision(learner, val_batches[0]) if first else None)

    run, log, bar = evaluate.Run(out, dataclasses.asdict(cfg), ema, codec, words, step), lambda row: None, tqdm(disable=True)
    if first:
        data.write_whole(out / "config.json", json.dumps(dataclasses.asdict(cfg), indent=1) + "\n")
        log = evaluate.Log(out / "log.jsonl", step)
        print(f"{cfg.task} on {cfg.data}: {len(train_set)} clips, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, recipe {cfg.recipe}, {cfg.steps} steps of {cfg.batch} "
              f"on {f'{WORLD} x ' * (WORLD > 1)}{cfg.device}, run folder {out}")
        bar = tqdm(total=cfg.steps, initial=step, unit="step", dynamic_ncols=True, mininterval=0.5)
    stop, agreed, skips = [], False, 0  # Ctrl-C or SIGTERM: finish the step, save, leave; several processes leave at the same step
    old = {s: signal.signal(s, lambda *a: stop.append(a[0])) for s in (signal.SIGINT, signal.SIGTERM)}
    laps, prepared = evaluate.Laps(cfg.device if cfg.profile else ""), time.time()
    seconds = lambda: before + sum(v for k, v in laps.seconds.items() if k != "log and evaluation")  # what training itself took

    def checkpoint():
        if first:
            log.sync()
            evaluate.save_checkpoint(out / "checkpoint.pt", step=step, config=dataclasses.asdict(cfg), codec=codec.state_dict(), words=words.words if words is not None else [],
                                     seconds=seconds(), regime=where.state_dict(), structure=latch.state_dict(), **learner.state_dict())

    rows = slice(RANK * cfg.batch // WORLD, (RANK + 1) * cfg.batch // WORLD)
    ahead = Ahead(cfg, latents, muffled, T, phi, rows)
    while step < cfg.steps and not (agreed if WORLD > 1 else stop):
        start, step = time.perf_counter(), step + 1

        # where is training? Before the step, so that a replay of the log drives each step as it was driven here
        j, found = where.probe_index(step), {}
        laps.start()
        if j is not None and where.source == "loss":
            where.update(step, shared(where.mean_loss()))
        if j is not None and probing:
            levels, shuffled = (regime.LEVELS, True) if j % regime.PER_DOUBLING == 0 else regime.needs(cfg.signal)
            with learner.autocast():
                D, other = shared(measure(ema, probe_batch, hear, target, mean, levels, shuffled) if first else None)
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

        g = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)  # all randomness of a step comes from (seed, step): resuming needs no
        drawn = ahead(step, bool(lam))                                  # generator state, and any number of devices sees the same batch
        b = batch_to(drawn, ids, cfg, g, m, cfg.batch, rows)
        laps("data")
        sums = {}
        for part in parts(b, cfg.accumulate):
            loss = learner.losses(part, step, lam, mu, groups, laps)
            if lam and j is not None and j % 4 == 0 and not sums and WORLD == 1:
                found["agreement"] = guidance.gradient_agreement(loss["fm"], loss["ssl"], list(model.blocks[cfg.align - 1].parameters()))
                laps("guidance")
            (loss["total"] / cfg.accumulate if cfg.accumulate > 1 else loss["total"]).backward()
            laps("backward")
            sums = {k: sums.get(k, 0) + v.detach() / cfg.accumulate for k, v in loss.items()}
        grad_norm = float(learner.update(step, laps))
        finite = np.isfinite(grad_norm)
        skips = 0 if finite else skips + 1
        if where.source == "loss" and finite:
            where.observe(sums["fm"])

        if not finite:  # the weights have not moved
            found.pop("agreement", None)
            names = culprits(drawn, train_set)
            log({"step": step, "skipped": skips, "clips": names, "r": r, **found})
            bar.write(f"step {step} is skipped: its loss or gradient is not finite; clips {', '.join(names[:3])}{' ...' * (len(names) > 3)}")
            if skips == SKIPS:
                raise UserError(f"step {step}: no finite gradient in {SKIPS} steps; the clips are named in {out / 'log.jsonl'}. If they are sound, a smaller --lr usually "
                                f"helps. The last good checkpoint is {out / evaluate.CHECKPOINTS[0]}")
        elif step % 10 == 0 or step == cfg.steps or j is not None:
            log({"step": step, "loss": sums["total"].item(), "loss_fm": sums["fm"].item(), "loss_ssl": sums["ssl"].item(), "loss_struct": sums["struct"].item(), "lambda": lam,
                 "mu": mu, "m": m, "r": r, "struct_active": int(mu > 0), "t_mean": float(b["t"].mean()), "lr": learner.model_opts[0].param_groups[0]["lr"], "grad_norm": grad_norm,
                 "step_s": time.perf_counter() - start, **found, **({"slope": where.s} if j is not None and where.s is not None else {}),
                 **({"no_signal": 1} if where.no_signal else {})})
            bar.set_postfix(loss=f"{sums['total'].item():.3f}", r=f"{r:.2f}", refresh=False)
            agreed = bool(shared(stop)) if WORLD > 1 else False
        bar.update()
        if first and (step % cfg.eval_every == 0 or step == cfg.steps):
            run.step, by_t = step, validation_loss(ema, val_batches)
            quick = evaluate.preview(run, val_set)
            log({"step": step, "memory_mb": evaluate.memory_mb(cfg.device), "eval": {"val_loss": float(np.mean(by_t)), "val_loss_t": by_t, "seconds": seconds(), **quick}})
            checkpoint()  # after its line in the log: a kill in between then loses steps, which are made again, and never an evaluation
            evaluate.dashboard(out)
            bar.write(f"step {step}: validation loss {np.mean(by_t):.4f}" + "".join(f", {k.replace('_', ' ')} {v:.3f}" for k, v in quick.items() if v is not None and k != "order_n") + f", r {r:.2f}")
        laps("log and evaluation")
    bar.close()
    for s, handler in old.items():
        signal.signal(s, handler)
    if WORLD > 1:
        dist.destroy_process_group()
    if agreed if WORLD > 1 else stop:
        checkpoint()
        raise Stopped(f"stopped at step {step}; continue with: python train.py --resume {out}")
    if not first:
        return out
    if cfg.profile:
        print(laps.table())
    print(f"trained {step} steps; {prepared - began:.0f} s of preparation, {time.time() - prepared:.0f} s of training and previews")
    evaluate.score([run], clips=cfg.score_clips, out=out / "scores.json", clap=cfg.clap, audio_model=cfg.audio_model, trust=cfg.trust_remote_code,
                   pickles=cfg.allow_pickle, device=cfg.device, prepare_s=round(prepared - began), train_s=round(time.time() - prepared))
    evaluate.dashboard(out)
    print(f"total {time.time() - began:.0f} s. Sounds: {out / 'samples'}   dashboard: {out / 'dashboard.png'}")
    return out


def main() -> None:
    if RANK:
        sys.stdout = open(os.devnull, "w")  # one voice
    try:
        train(*config.parse(sys.argv[1:], __doc__))
    except RuntimeError as e:
        if WORLD == 1:
            raise
        raise UserError(f"process {RANK} lost the others ({str(e).splitlines()[0][:120]}); the last checkpoint of the run is intact, go on with the same command and --resume RUN") from None


if __name__ == "__main__":
    data.run_cli(main)
