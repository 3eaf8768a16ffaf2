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
w: scale of classifier-free guidance when sampling (w = 1: none), nothing to do with the SSL guidance of training. B batch, T tokens, C latent channels, D width.
"""
from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
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
from learner import RANK, WORLD, Ahead, Learner, Probe, batch_to, circuits, culprits, parts, pick_precision, shared, validation_loss
from model import Words

SKIPS = 10  # steps in a row without a finite gradient, after which a run ends


class Stopped(UserError):
    """Ctrl-C or SIGTERM: the step was finished, all is saved, the run can be continued."""


# --- what drives the mechanisms ---------------------------------------------------------------------------------------------------

def drive(cfg: Config, r: float, k: int, latch: structure_reg.Structure) -> tuple[float, float, float, list[int] | None]:
    """The regime r at step k -> (lambda, m, mu, groups of blocks): where the three mechanisms meet what drives them."""
    lam = {"off": 0.0, "adaptive": guidance.weight(r, cfg.lambda0, cfg.gamma),
           "constant": 0.0 if cfg.stop_at and k > cfg.stop_at * cfg.steps else cfg.lambda0}[cfg.guidance]
    m = {"off": sampler.REFERENCE_M, "constant": cfg.m_late, "adaptive": sampler.centre(r, cfg.m_early, cfg.m_late)}[cfg.timesteps]
    mu = {"off": 0.0, "constant": cfg.mu0, "adaptive": structure_reg.weight(r, cfg.mu0, k, latch.latched, round(0.1 * cfg.steps))}[cfg.structure]
    return lam, m, mu, (latch.groups if cfg.structure == "adaptive" else None) or structure_reg.by_depth(cfg.depth, latch.G)


def phase(r: float, lam: float, m: float, mu: float) -> tuple[tuple, str]:
    """(what counts as one phase, the mechanisms in words): a line is printed where the first changes."""
    return (r >= 0.5, lam > 0, mu > 0), (f"r = {r:.2f} ({'refines' if r >= 0.5 else 'acquires'}), guidance {f'at {lam:.2f}' if lam else 'off'}, "
                                         f"sampler centre t = {1 / (1 + np.exp(-m)):.2f}, structure {f'at {mu:.3f}' if mu else 'off'}")


# --- several devices: torchrun starts this file once a device, and each process takes its rows of the same batch -----------------

def join(given: dict, resume: str) -> tuple[Config, dict | None]:
    """Meet the other processes; -> settings and checkpoint as process 0 has them, with the device of this one."""
    cuda = evaluate.pick_device(given.get("device", "auto")).startswith("cuda")
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():  # patience: the others wait while process 0 prepares and evaluates
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=2))
    try:
        box = config.settings(given, resume) if RANK == 0 else None
    except UserError as e:
        box = e
    box = shared(box)
    if isinstance(box, UserError):
        raise box if RANK == 0 else SystemExit(2)
    cfg, ckpt = box
    if cfg.batch % (WORLD * cfg.accumulate):
        raise UserError(f"--batch {cfg.batch}: must be a multiple of {WORLD} processes x {cfg.accumulate} parts (--accumulate)")
    return dataclasses.replace(cfg, device=f"cuda:{os.environ['LOCAL_RANK']}") if cuda else cfg, ckpt


# --- preparation ------------------------------------------------------------------------------------------------------------------

@dataclass
class Prepared:
    """A run before its first step (or the first after a resume)."""
    cfg: Config
    out: Path
    run: evaluate.Run            # the averaged network with codec and words, for previews and scores
    train_set: object
    val_set: object
    val_batches: list[dict]
    ids: list                    # token ids of each training clip's wordings
    ahead: Ahead                 # draws the clips of a step
    learner: Learner
    where: regime.Regime         # where training is: r
    latch: structure_reg.Structure
    probe: Probe | None
    step: int                    # steps done
    before: float                # seconds of training they took


def open_sets(cfg: Config, resume: str, hold) -> tuple:
    """-> training and validation clips, rendered or read. Claims the run folder first (hold, config.json): the name is taken before the
    minutes of preparation, and what dies in them can be resumed."""
    out, workers, claims = Path(cfg.out), None if cfg.workers < 0 else cfg.workers, RANK == 0 and not resume
    print(f"cache: {data.cache_dir()} (safe to delete at any time)")
    sets = [data.open_data(cfg.data, split, n, cfg.val_fold, cfg.seconds, cfg.max_bad_share) for split, n in (("train", cfg.clips), ("val", 256))]
    (out / "samples").mkdir(parents=True, exist_ok=True)
    if claims:
        hold(out)
        data.write_whole(out / "config.json", json.dumps(dataclasses.asdict(cfg), indent=1) + "\n")
    try:
        for clips in sets:  # several processes wait for the one that fills a cache
            clips.prepare(workers)
    except UserError:  # too many files that can't be read
        if claims:
            shutil.rmtree(out)
        raise
    for note in (n for clips in sets for n in getattr(clips, "notes", [])):
        print(f"note: {note}")
    bad = sorted({b for clips in sets for b in getattr(clips, "bad", [])})
    if bad and RANK == 0:
        data.write_whole(out / "bad.txt", "\n".join(map(data.printable, bad)) + "\n")
        print(f"note: {len(bad)} rows or files can't be used and are left out; they are listed in {out / 'bad.txt'}")
    return tuple(sets)


def prepare(cfg: Config, ckpt: dict | None, resume: str, hold) -> Prepared:
    """Open and cache all that a run needs. ckpt: where to go on from; hold(folder): no other process may train there from now on."""
    main_process, workers, out = RANK == 0, None if cfg.workers < 0 else cfg.workers, Path(cfg.out)

    # parts that may be missing come first: that should cost nobody the minutes of preparation
    foreign = (cfg.device, cfg.trust_remote_code, cfg.allow_pickle)
    codec = evaluate.open_codec(dataclasses.asdict(cfg), *foreign)
    cfg.channels = codec.channels  # a neural codec may have fewer
    words = evaluate.open_text(dataclasses.asdict(cfg), [], *foreign) if cfg.task == "t2a" and cfg.text != "words" else None
    where, latch = regime.Regime(cfg.regime, cfg.steps), structure_reg.Structure(cfg.depth, cfg.seed)
    probing = cfg.probe == "always" or cfg.probe == "auto" and where.source == "slope" and cfg.adaptive
    teacher = evaluate.open_teacher(cfg) if cfg.guidance != "off" or probing else None

    # clips -> codec -> latents; captions -> token ids
    train_set, val_set = open_sets(cfg, resume, hold)
    if ckpt:
        evaluate.load_weights(resume, codec, ckpt["codec"])
    else:
        try:
            codec.fit(train_set.wave(i)[: 10 * RATE] for i in np.random.default_rng(cfg.seed).permutation(len(train_set))[:500])
        except ValueError as e:  # a few seconds of sound
            if main_process and not resume:
                shutil.rmtree(out)
            raise UserError(f"--channels {cfg.channels}: {e}; give more sound, or fewer channels") from None
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
    phi, probe, phi_mean, features = None, None, None, 0
    if teacher is not None:
        ear = guidance.Ear(codec, teacher)
        if cfg.guidance != "off":
            phi, features = data.LatentCache(train_set, ear), ear.channels
        phi_mean = guidance.feature_mean(ear, latents, train_set, cfg.device)
        ear = ear.to(cfg.device)
        probe = Probe(val_batches[0], *((torch.nn.Identity(), None) if cfg.signal == "latent" else (ear, phi_mean)), cfg.signal) if probing else None
    learner, step, before = Learner(cfg, words, features, phi_mean), 0, 0.0
    if ckpt:
        learner.load(ckpt, resume)
        where.load_state_dict(ckpt["regime"])
        latch.load_state_dict(ckpt["structure"])
        step, before = ckpt["step"], ckpt["seconds"]
    if cfg.precision == "auto":
        cfg.precision = shared(pick_precision(learner, val_batches[0]) if main_process else None)
    if main_process:
        data.write_whole(out / "config.json", json.dumps(dataclasses.asdict(cfg), indent=1) + "\n")
        print(f"{cfg.task} on {cfg.data}: {len(train_set)} clips, {sum(p.numel() for p in learner.model.parameters()) / 1e6:.2f} M parameters, recipe {cfg.recipe}, {cfg.steps} steps of {cfg.batch} "
              f"on {f'{WORLD} x ' * (WORLD > 1)}{cfg.device}, run folder {out}")
    ahead = Ahead(cfg, latents, muffled, T, phi, slice(RANK * cfg.batch // WORLD, (RANK + 1) * cfg.batch // WORLD))
    return Prepared(cfg, out, evaluate.Run(out, dataclasses.asdict(cfg), learner.ema, codec, words, step), train_set, val_set, val_batches, ids, ahead, learner, where, latch, probe, step, before)


# --- the run ------------------------------------------------------------------------------------------------------------------------

def train(given: dict, resume: str = "") -> Path:
    """Run a configuration to its end and return its folder. `given` holds Config fields; with `resume`, of that folder's run."""
    began = time.time()
    with contextlib.ExitStack() as stack:
        hold = lambda folder: stack.enter_context(data.alone(folder, f"{folder}: another process is training this run; wait for it, or end it"))
        if RANK == 0 and resume and (Path(resume) / "config.json").is_file():
            hold(Path(resume))
        p = prepare(*(join(given, resume) if WORLD > 1 else config.settings(given, resume)), resume, hold)
        prepared = time.time()
        loop(p)
        cfg, times = p.cfg, {"prepare_s": round(prepared - began), "train_s": round(time.time() - prepared)}
        if RANK:
            return p.out
        print("trained {} steps; {prepare_s} s of preparation, {train_s} s of training and previews".format(p.step, **times))
        evaluate.score([p.run], clips=cfg.score_clips, judge=cfg.judge, split=cfg.score_split, out=p.out / "scores.json", clap=cfg.clap, audio_model=cfg.audio_model,
                       trust=cfg.trust_remote_code, pickles=cfg.allow_pickle, device=cfg.device, **times)
        evaluate.dashboard(p.out)
        print(f"total {time.time() - began:.0f} s. Sounds: {p.out / 'samples'}   dashboard: {p.out / 'dashboard.png'}")
        return p.out


def look(p: Prepared, j: int | None, step: int, laps) -> dict:
    """At the j-th probe step, before the step itself, so that a replay of the log drives each step as it was driven here: listen to the
    averaged network and tell the regime, look at the blocks and tell the latch. -> what the log should keep."""
    cfg, found = p.cfg, {}
    laps.start()
    if j is None:
        return found
    if p.where.source == "loss":
        p.where.update(step, shared(p.where.mean_loss()))
    if p.probe:
        with p.learner.autocast():
            found = shared(p.probe(p.learner.ema, full=j % regime.PER_DOUBLING == 0) if RANK == 0 else None)
        if p.where.source == "slope":
            p.where.update(step, found["D"])
    laps("probe")
    if j % 2 == 0 and (cfg.structure == "adaptive" or cfg.probe == "always"):
        seen = p.latch.check(step, circuits(p.learner.model))
        found |= {"structure": seen} if seen else {}
    laps("structure")
    return found


def save(p: Prepared, log, seconds: float) -> None:
    """All that the run needs to go on as if it had never stopped."""
    log.sync()
    evaluate.save_checkpoint(p.out / "checkpoint.pt", step=p.step, config=dataclasses.asdict(p.cfg), codec=p.run.codec.state_dict(), words=p.run.words.words if p.run.words is not None else [],
                             seconds=seconds, regime=p.where.state_dict(), structure=p.latch.state_dict(), **p.learner.state_dict())


def assess(p: Prepared, log, seconds: float) -> str:
    """Validation loss and previews of the averaged network, then the checkpoint; -> what there is to say."""
    p.run.step, by_t = p.step, validation_loss(p.learner.ema, p.val_batches)
    quick = evaluate.preview(p.run, p.val_set)
    log({"step": p.step, "memory_mb": evaluate.memory_mb(p.cfg.device), "eval": {"val_loss": float(np.mean(by_t)), "val_loss_t": by_t, "seconds": seconds, **quick}})
    save(p, log, seconds)  # after its line in the log: a kill in between then loses steps, which are made again, and never an evaluation
    evaluate.dashboard(p.out)
    return f"validation loss {np.mean(by_t):.4f}" + "".join(f", {k.replace('_', ' ')} {v:.3f}" for k, v in quick.items() if v is not None and k != "order_n")


def skip(p: Prepared, log, drawn: dict, row: dict, n: int) -> str:
    """The n-th step in a row whose gradient is not finite (the weights have not moved): name its clips in the log; -> what there is to
    say. UserError after SKIPS of them."""
    names = culprits(drawn, p.train_set)
    log({"step": p.step, "skipped": n, "clips": names, **row})
    if n == SKIPS:
        raise UserError(f"step {p.step}: no finite gradient in {SKIPS} steps; the clips are named in {p.out / 'log.jsonl'}. If they are sound, a smaller --lr usually "
                        f"helps. The last good checkpoint is {p.out / evaluate.CHECKPOINTS[0]}")
    return f"is skipped: its loss or gradient is not finite; clips {', '.join(names[:3])}{' ...' * (len(names) > 3)}"


def loop(p: Prepared) -> None:
    """All steps that are left: probe, r, batch, losses, update; log, evaluate, save."""
    cfg, learner, where, latch, main_process = p.cfg, p.learner, p.where, p.latch, RANK == 0
    log = evaluate.Log(p.out / "log.jsonl", p.step) if main_process else lambda row: None
    bar = tqdm(total=cfg.steps, initial=p.step, unit="step", dynamic_ncols=True, mininterval=0.5, disable=not main_process)
    stop, agreed, skips, printed = [], False, 0, None  # Ctrl-C or SIGTERM: finish the step, save, leave; several processes leave at the same step
    old = {s: signal.signal(s, lambda *a: stop.append(a[0])) for s in (signal.SIGINT, signal.SIGTERM)}
    laps = evaluate.Laps(cfg.device if cfg.profile else "")
    seconds = lambda: p.before + sum(v for k, v in laps.seconds.items() if k != "log and evaluation")  # what training itself took

    while p.step < cfg.steps and not (agreed if WORLD > 1 else stop):
        start, p.step = time.perf_counter(), p.step + 1
        step, j = p.step, where.probe_index(p.step)

        # where is training, and what follows from it?
        found = look(p, j, step, laps)
        r = where.r(step)
        lam, m, mu, groups = drive(cfg, r, step, latch)
        now, in_words = phase(r, lam, m, mu)
        if now != printed and j is not None and cfg.adaptive:
            printed = now
            bar.write(f"step {step}: {in_words}")

        # one step; all randomness comes from (seed, step): resuming needs no generator state, and any number of devices sees the same batch
        drawn, g = p.ahead(step, bool(lam)), torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
        b = batch_to(drawn, p.ids, cfg, g, m, cfg.batch, p.ahead.rows)
        laps("data")
        sums = {}
        for part in parts(b, cfg.accumulate):
            loss = learner.losses(part, step, lam, mu, groups, laps)
            if lam and j is not None and j % 4 == 0 and not sums and WORLD == 1 and not cfg.compile:  # a compiled backward pass runs once
                found["agreement"] = guidance.gradient_agreement(loss["fm"], loss["ssl"], list(learner.model.blocks[cfg.align - 1].parameters()))
                laps("guidance")
            (loss["total"] / cfg.accumulate if cfg.accumulate > 1 else loss["total"]).backward()
            laps("backward")
            sums = {k: sums.get(k, 0) + v.detach() / cfg.accumulate for k, v in loss.items()}
        grad_norm = float(learner.update(step, laps))
        skips = 0 if np.isfinite(grad_norm) else skips + 1
        if where.source == "loss" and not skips:
            where.observe(sums["fm"])

        # log, evaluate, save
        if skips:
            found.pop("agreement", None)
            bar.write(f"step {step} {skip(p, log, drawn, {'r': r, **found}, skips)}")
        elif step % 10 == 0 or step == cfg.steps or j is not None:
            log({"step": step, "loss": sums["total"].item(), "loss_fm": sums["fm"].item(), "loss_ssl": sums["ssl"].item(), "loss_struct": sums["struct"].item(), "lambda": lam,
                 "mu": mu, "m": m, "r": r, "struct_active": int(mu > 0), "t_drawn": float(b["t"].mean()), "lr": learner.model_opts[0].param_groups[0]["lr"], "grad_norm": grad_norm,
                 "step_s": time.perf_counter() - start, **found, **({"slope": where.s} if j is not None and where.s is not None else {}),
                 **({"no_signal": 1} if where.no_signal else {})})
            bar.set_postfix(loss=f"{sums['total'].item():.3f}", r=f"{r:.2f}", refresh=False)
            agreed = bool(shared(stop)) if WORLD > 1 else False
        bar.update()
        if main_process and (step % cfg.eval_every == 0 or step == cfg.steps):
            bar.write(f"step {step}: {assess(p, log, seconds())}, r {r:.2f}")
        laps("log and evaluation")

    bar.close()
    for s, handler in old.items():
        signal.signal(s, handler)
    if WORLD > 1:
        dist.destroy_process_group()
    if agreed if WORLD > 1 else stop:
        if main_process:
            save(p, log, seconds())
        raise Stopped(f"stopped at step {p.step}; continue with: python train.py --resume {p.out}")
    if cfg.profile and main_process:
        print(laps.table())


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
