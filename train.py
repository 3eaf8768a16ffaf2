"""Train a latent diffusion transformer for captioned audio or super-resolution. To read it: `loop` first.

    python train.py                                     # captions to sound, preset `smoke`
    python train.py --task sr                           # band-limited to full band
    python train.py --recipe static                     # another row of RECIPES; or: --structure off
    python train.py --data path/to/folder --val-fold 5  # your own captioned recordings
    python train.py --resume runs/t2a [--steps N]       # continue, or extend

    data -> latents -> loop { measure r -> drive -> batch, noise, t -> losses -> update } -> table, sounds

The regime r (regime.py) says where training is; `drive` turns it into the weight lambda of guidance
(guidance.py), the density of timesteps (sampler.py) and the weight mu of the structure loss
(structure_reg.py). Everything random in a step is drawn from generators made of (seed, step), so a resumed
run sees the same batches, and so does a run on any number of devices. timer(name) books the time since its
last call. What is written: parts/runs.py. To add a mechanism: docs/teaching.md.

Conventions: t in [0, 1], t = 1 is pure noise, t = 0 is data; x_t = (1-t) x0 + t eps; v = eps - x0; the
network predicts v. B batch, T tokens, C latent channels, F teacher features, S words; k = step of K.
"""
from __future__ import annotations

import parts  # noqa: F401  # isort: skip  (before torch)
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data
import evaluate
import guidance
import regime
import sampler
import structure_reg
from model import block_weights, conditioned, flow_matching_loss, predict
from parts import config, devices, peers, runs
from parts.background import Background
from parts.checkpoints import save_run
from parts.config import Config
from parts.devices import RANK, WORLD, StopSignal, Timer, broadcast_from_rank0, from_all, ignore
from parts.errors import Stopped, UserError, quoted
from parts.moments import MOMENT_STEPS, moment_due, write_moment
from parts.networks import Networks
from parts.optim import rate_factor
from parts.page import draw_pages
from parts.progress import Phases, introduction, nonfinite_clips, skipped_line

STRUCT_LOSSES = {"grouped": structure_reg.grouped_loss, "dispersive": peers.dispersive_loss,
                 "diversity": peers.diversity_loss}


# --- what r drives --------------------------------------------------------------------------------------

class Driven(NamedTuple):
    """What a step is trained with."""
    lam: float                                 # weight lambda of guidance
    density: object                            # of timesteps: sampler.LogitNormal or peers.Binned
    share: float                               # of the flow-matching gradient that structure is to have
    mu: float                                  # the weight of the structure loss that gives it this share
    groups: list[int]                          # of blocks, that it keeps apart


def drive(cfg: Config, r: float, k: int, detector: structure_reg.GroupDetector, infonoise=None) -> Driven:
    """Settings and the regime r at step k -> weights, density and groups of this step."""
    # Guidance: weight lambda of the alignment loss.
    if cfg.guidance == "off":
        lam = 0.0
    elif cfg.guidance == "constant":
        stopped = cfg.stop_at and k > cfg.stop_at * cfg.steps      # all at once: HASTE (arXiv 2505.16792)
        lam = 0.0 if stopped else cfg.lambda0
    else:
        lam = guidance.ssl_weight(r, cfg.lambda0, cfg.gamma)

    # Timesteps: density p(t).
    if cfg.timesteps == "off":
        density = sampler.LogitNormal()
    elif cfg.timesteps == "constant":
        density = sampler.LogitNormal(cfg.m, cfg.s)
    elif cfg.timesteps == "adaptive":
        early = sampler.LogitNormal(cfg.m_early, cfg.s_early)
        density = sampler.between(r, early, sampler.LogitNormal(cfg.m_late, cfg.s_late))
    elif cfg.timesteps == "curriculum":
        density = sampler.LogitNormal(*peers.curriculum(k, cfg.steps, sampler.FLOOR))
    else:
        density = infonoise.density

    # Structure: share of the gradient, the weight that gives it, and the groups that it keeps apart.
    groups = structure_reg.depth_groups(cfg.depth, detector.G)
    if cfg.structure == "off":
        share = 0.0
    elif cfg.structure == "constant":
        share = cfg.struct_share
    else:
        share = structure_reg.share(r, cfg.struct_share, k, detector.activated_at, cfg.ramp)
        groups = detector.groups or groups
    mu = share / detector.ratio if detector.ratio else 0.0
    return Driven(lam, density, share, mu, groups)


# --- one step: losses, update ---------------------------------------------------------------------------

def losses(cfg: Config, networks: Networks, batch: dict, k: int, driven: Driven, timer=ignore) -> dict:
    """Losses of a batch at step k -> {"total": fm + lambda ssl + mu struct (ASSUMED), "fm", "ssl", "struct":
    scalars, 0 where a mechanism is off, "each": (B,) flow-matching loss of each clip}."""
    mask = batch.get("mask")
    with networks.autocast():
        v_hat, hs, v = predict(networks.model, batch, networks.net)
    each = flow_matching_loss(v_hat, v, mask)
    total = fm = each.mean()
    ssl, struct = torch.zeros(()), torch.zeros(())
    timer("forward")

    # Guidance: align a block with the teacher. Tokens take turns: the projector on all costs 10 % of a step.
    if driven.lam:
        every = min(cfg.guide_every, batch["x0"].shape[1])
        tokens = slice(k % every, None, every)
        with networks.autocast():
            z = networks.project(hs[cfg.align_block][:, tokens])                   # (B, T / guide_every, F)
        phi = batch["phi"].roll(1, 0) if cfg.teacher == "shuffled" else batch["phi"]   # the control
        phi_mask = mask[:, tokens] if mask is not None else None
        ssl = guidance.alignment_loss(z, phi[:, tokens] - networks.phi_mean, phi_mask)
        total = total + driven.lam * ssl
    timer("guidance")

    # Structure: keep apart what different groups of blocks add. (mu = 0 until its ratio is measured.)
    if driven.share:
        struct = STRUCT_LOSSES[cfg.struct_loss](hs, driven.groups, mask)
        total = total + driven.mu * struct
    timer("structure")
    return {"total": total, "fm": fm, "ssl": ssl, "struct": struct, "each": each}


def update(cfg: Config, networks: Networks, k: int, timer=ignore) -> float:
    """Clip the network's gradients (not the projector's), move weights and EMA -> norm before clipping, the
    one number of a step that waits for a GPU. Where it is not finite nothing moves."""
    # The projector keeps its rate, without warm-up or cooling: its loss is bounded.
    for optimizer, lr in zip(networks.model_optimizers, (cfg.lr, cfg.muon_lr)):
        optimizer.param_groups[0]["lr"] = lr * rate_factor(k, cfg.steps, cfg.warmup, cfg.cool)
    norm = float(torch.nn.utils.clip_grad_norm_(networks.model.parameters(), cfg.grad_clip))
    finite = np.isfinite(norm)
    for optimizer in networks.optimizers:
        if finite:
            optimizer.step()                               # without guidance the projector has no gradients
        optimizer.zero_grad(set_to_none=True)
    if not finite:
        return norm
    timer("optimizer")
    # EMA, ramped: of a fixed .9999 half would be the initial weights after 6,000 steps.
    decay = min(cfg.ema, (1 + k) / (10 + k))
    with torch.no_grad():
        torch._foreach_lerp_(list(networks.ema.parameters()), list(networks.model.parameters()), 1 - decay)
    timer("EMA")
    return norm


# --- between steps: where is training? ------------------------------------------------------------------

def measure(run: Training, j: int | None, timer) -> dict:
    """At the j-th probe step: probe the averaged network for the regime, check the blocks for groups. -> what
    the log keeps. Before the step, so that the log has each r at the step it drives."""
    if j is None:
        return {}
    cfg, found = run.cfg, {}
    if run.regime.source == "loss":
        loss = float(from_all(torch.tensor([run.regime.mean_loss()])).mean())
        if np.isfinite(loss):                              # not where all steps since the last were skipped
            run.regime.update(run.step, loss)
    if run.probe:
        if RANK == 0:
            with run.networks.autocast():
                predict_v = conditioned(run.networks.ema, run.probe.batch)
                found = run.probe(predict_v, full=cfg.probe == "always")
        found = broadcast_from_rank0(found)
        if run.regime.source == "slope":
            if not np.isfinite(found["D"]):
                raise UserError(f"step {run.step}: D is {found['D']}: a validation clip, or what the network "
                                "makes of it, is not finite")
            run.regime.update(run.step, found["D"])
    timer("probe")
    testable = cfg.structure == "adaptive" and cfg.depth >= structure_reg.TESTABLE
    if testable or cfg.probe == "always":
        checked = run.detector.check(run.step, block_weights(run.networks.model), run.regime.r(run.step))
        if checked:
            found["structure"] = checked
    timer("structure")
    return found


def measure_gradients(run: Training, j: int | None, driven: Driven, batch: dict, loss: dict) -> dict:
    """At the j-th probe step, from a batch and its losses: the cosine of the gradients of guidance and flow
    matching on the aligned block (every second time), and the ratio of those of the structure loss and flow
    matching on all blocks (at every step until a first ratio is known)."""
    cfg, networks, found = run.cfg, run.networks, {}
    agreement_due = driven.lam > 0 and j is not None and j % 2 == 0
    share_due = (driven.share > 0 and run.step >= regime.FIRST
                 and (j is not None or run.detector.ratio is None))
    if (agreement_due or share_due) and (WORLD > 1 or cfg.compile):
        # The graph of a compiled or distributed network can be traversed once only.
        loss = losses(cfg, networks.plain(), batch, run.step, driven)

    if agreement_due:
        aligned = list(networks.model.blocks[cfg.align_block - 1].parameters())
        found["agreement"] = guidance.gradient_agreement(loss["fm"], loss["ssl"], aligned)
        found["agreement"] = broadcast_from_rank0(found["agreement"])
        if run.regime.source == "agreement" and np.isfinite(found["agreement"]):
            run.regime.update(run.step, found["agreement"])
    if agreement_due and run.probe and cfg.probe == "always":
        # By noise level, on the clips and the noise of the probe.
        found["agreement_t"] = {}
        full = {**run.probe.batch, "phi": run.data.extract(run.probe.batch["x0"])}
        for t in guidance.AGREEMENT_LEVELS:
            at_t = {**full, "t": torch.full_like(full["t"], t)}
            loss_t = losses(cfg, networks.plain(), at_t, run.step, driven)
            found["agreement_t"][str(t)] = guidance.gradient_agreement(loss_t["fm"], loss_t["ssl"], aligned)

    if share_due:
        blocks = list(networks.model.blocks.parameters())
        ratio = broadcast_from_rank0(structure_reg.gradient_ratio(loss["fm"], loss["struct"], blocks))
        found["struct_share"] = driven.mu * ratio
        # The ratio is averaged while the loss ramps in (--structure constant: from step 32), then held: as
        # the loss falls its gradient vanishes, and mu = share / ratio would grow without bound. A ratio that
        # is not finite comes from a batch that is skipped.
        since = (run.detector.activated_at or 0) if cfg.structure == "adaptive" else 0
        settling = run.step <= since + max(cfg.ramp, 2 * regime.FIRST)
        if settling and np.isfinite(ratio) and ratio > 0:
            run.detector.take_ratio(ratio)
    return found


# --- a run ----------------------------------------------------------------------------------------------

@dataclass
class Training:
    """A run: all that the loop needs, as it is at step `step`."""
    cfg: Config
    out: Path
    data: data.TrainingData
    networks: Networks
    regime: regime.Regime                      # where training is: r
    detector: structure_reg.GroupDetector
    infonoise: peers.InfoNoise | None          # a peer's density of timesteps
    probe: regime.Probe | None
    val_batches: list[dict]
    draw: data.Prefetcher                      # of the clips of a step
    averaged: evaluate.Run                     # the averaged network, for previews and scores
    background: Background                     # draws pictures
    step: int = 0                              # under way, or the last one done
    seconds_before: float = 0.0                # of training, before it was resumed
    wall_before: float = 0.0                   # the same with previews and logs
    quick: object = None                       # in place of evaluate.preview: the experiments' measurements

    def seconds(self, timer: Timer) -> float:
        """What training itself took so far, without previews and logs."""
        return self.seconds_before + timer.total(without="log and evaluation")

    def wall(self, timer: Timer) -> float:
        """What it took with them."""
        return self.wall_before + timer.total()


def open_regime(cfg: Config) -> regime.Regime:
    """The Regime of the settings; UserError where its source is unknown or its file can't be read."""
    try:
        return regime.Regime(cfg.regime, cfg.steps)
    except (ValueError, OSError) as e:
        raise UserError(f"--regime {cfg.regime}: {e}") from None


def prepare(cfg: Config, checkpoint: dict | None, resume: str, claim) -> Training:
    """Open and cache all that a run needs. checkpoint: to go on from; claim(folder): lock it for this run."""
    tracker, detector = open_regime(cfg), structure_reg.GroupDetector(cfg.depth, cfg.seed)
    infonoise = peers.InfoNoise(sampler.LogitNormal(cfg.m, cfg.s)) if cfg.timesteps == "infonoise" else None
    latent = cfg.regime_signal == "latent"                 # the proxy: D of the latents themselves
    clips = data.prepare(cfg, cfg.probed and not latent, checkpoint, resume, claim)

    # The regime is measured on validation clips.
    val_batches = data.validation_batches(clips, cfg, sampler.LogitNormal())
    extract, mean = (torch.nn.Identity(), None) if latent else (clips.extract, clips.phi_mean)
    probe = regime.Probe(val_batches[0], extract, mean, cfg.regime_signal) if cfg.probed else None

    # What learns, as it was left.
    features = clips.phi.channels if clips.phi else 0
    networks = build_networks(cfg, clips.words, features, clips.phi_mean)
    if checkpoint:
        networks.load(checkpoint, resume)
        tracker.load_state_dict(checkpoint["regime"])
        detector.load_state_dict(checkpoint["structure"])
        if infonoise:
            infonoise.load_state_dict(checkpoint["infonoise"])

    out = Path(cfg.out)
    if RANK == 0:
        config.save_config(out, cfg)
        print(introduction(cfg, len(clips.train_set), networks.model, structure_reg.TESTABLE))
    past = checkpoint or {"step": 0, "seconds": 0.0, "wall": 0.0}
    averaged = evaluate.Run(out, asdict(cfg), networks.ema, clips.codec, clips.words, past["step"])
    draw, background = data.Prefetcher(cfg, clips, data.choose_crops, data.read_crops), Background(cfg.device)
    return Training(cfg, out, clips, networks, tracker, detector, infonoise, probe, val_batches, draw,
                    averaged, background, past["step"], past["seconds"], past["wall"])


def build_networks(cfg: Config, words, features: int = 0, phi_mean: torch.Tensor | None = None) -> Networks:
    """What learns, at its initial weights. words: text encoder or None; features: F, 0 without guidance."""
    torch.manual_seed(cfg.seed)
    model = evaluate.build_model(asdict(cfg), words).to(cfg.device)
    projector = guidance.Projector(cfg.width, features, cfg.seed).to(cfg.device) if features else None
    return Networks(cfg, model, projector, phi_mean)


def loop(run: Training) -> Timer:
    """All steps that are left: measure r, drive, draw, losses, update; log, evaluate, save. -> its times."""
    cfg, networks, tracker = run.cfg, run.networks, run.regime
    log = runs.Log(run.out / "log.jsonl", run.step) if RANK == 0 else ignore
    timer, skipped, phases = Timer(cfg.device if cfg.profile else ""), 0, Phases(cfg, run.step > 0)
    bar = tqdm(total=cfg.steps, initial=run.step, unit="step", dynamic_ncols=True, mininterval=0.5,
               disable=RANK > 0)
    with bar, StopSignal() as stop:
        while run.step < cfg.steps and not stop.now:
            began = time.perf_counter()
            run.step += 1
            k, j = run.step, tracker.probe_index(run.step)

            # Where is training, and what follows from it?
            found = measure(run, j, timer)
            r = tracker.r(k)
            driven = drive(cfg, r, k, run.detector, run.infonoise)
            for line in phases.new(k, r, driven.lam, driven.share):
                bar.write(line)

            # Clips, noise and dropped conditions are functions of (seed, step) alone; t follows r besides.
            drawn, generator = run.draw(k, bool(driven.lam))
            batch = data.add_noise(drawn, run.data.token_ids, cfg, generator, driven.density, cfg.batch,
                                   run.draw.rows)
            timer("data")

            # Losses and gradients; then the weights move.
            means, each, of_gradients = gradients(run, j, driven, batch, timer)
            grad_norm = update(cfg, networks, k, timer)
            skipped = 0 if np.isfinite(grad_norm) else skipped + 1
            if not skipped and tracker.source == "loss":
                # Weighted to the reference density: p(t) follows r, and would move the loss r is read from.
                weight = sampler.LogitNormal().pdf(batch["t"]) / driven.density.pdf(batch["t"])
                tracker.observe((weight * each).mean())
            if not skipped and run.infonoise:
                run.infonoise.observe(from_all(batch["t"]), from_all(each), k)

            # Log, evaluate, save.
            if skipped:
                names = nonfinite_clips(drawn, run.data.train_set)
                log({"step": k, "skipped": skipped, "clips": names, "r": r, **found})
                bar.write(skipped_line(run.out, k, names, skipped))
            elif k % 10 == 0 or k == cfg.steps or tracker.logged_at(k):
                means = {name: from_all(x[None]).mean() for name, x in means.items()}
                log({"step": k, "loss": means["total"].item(),
                     **{f"loss_{name}": means[name].item() for name in ("fm", "ssl", "struct")},
                     "lambda": driven.lam, "mu": driven.mu, "r": r, "density": asdict(driven.density),
                     "t_drawn": float(from_all(batch["t"]).mean()), "lr": networks.lr, "grad_norm": grad_norm,
                     "step_s": time.perf_counter() - began, **found, **of_gradients, **tracker.notes(k)})
                bar.set_postfix(loss=f"{means['total'].item():.3f}", r=f"{r:.2f}", refresh=False)
                stop.agree()
            bar.update()
            if RANK == 0 and moment_due(k, cfg.steps):
                write_moment(run.averaged, k, run.data.val_set, evaluate.maker(run.averaged, MOMENT_STEPS))
            if RANK == 0 and runs.evaluation_due(cfg, k, j):
                bar.write(f"step {k}: {evaluate_and_save(run, log, timer)}, r {r:.2f}")
            timer("log and evaluation")
        if stop.now and RANK == 0:
            save_run(run, log, timer)                      # in here a second signal does not end it
    devices.leave_processes()
    if stop.now:
        raise Stopped(f"stopped at step {run.step}; continue with: python train.py --resume "
                      f"{quoted(run.out)}")
    if cfg.profile and RANK == 0:
        print(timer.table())
    return timer


def gradients(run: Training, j: int | None, driven: Driven, batch: dict, timer) -> tuple:
    """Backward through a batch, part by part -> losses, fm of each clip (B,), measure_gradients' findings."""
    cfg, means, each, found = run.cfg, {}, [], {}
    for part in data.split_batch(batch, cfg.accumulate):
        loss = losses(cfg, run.networks, part, run.step, driven, timer)
        if not means:
            found = measure_gradients(run, j, driven, part, loss)
            timer("probe")
        (loss["total"] / cfg.accumulate).backward()
        timer("backward")
        each.append(loss.pop("each").detach())
        means = {name: means.get(name, 0) + x.detach() / cfg.accumulate for name, x in loss.items()}
    return means, torch.cat(each), found


def evaluate_and_save(run: Training, log, timer: Timer) -> str:
    """Validation loss and previews of the averaged network, then the checkpoint; -> what there is to say."""
    run.averaged.step = run.step
    by_t = evaluate.validation_loss(run.networks.ema, run.val_batches)
    quick = (run.quick or evaluate.preview)(run.averaged, run.data.val_set, run.background)
    found = {"val_loss": float(np.mean(by_t)), "val_loss_t": by_t, "seconds": run.seconds(timer), **quick}
    log({"step": run.step, "memory_mb": devices.memory_mb(run.cfg.device), "eval": found})
    save_run(run, log, timer)  # after its line in the log: a kill in between loses steps, never an evaluation
    run.background(draw_pages, run.out, sampler.LogitNormal)
    said = [f"{name.replace('_', ' ')} {x:.3f}" for name, x in quick.items() if isinstance(x, float)]
    return ", ".join([f"validation loss {np.mean(by_t):.4f}", *said])


def train(given: dict, resume: str = "", quick=None) -> Path:
    """Train -> the run's folder. given: the settings typed; resume: the run to go on with, whose own settings
    hold otherwise; quick: in place of evaluate.preview."""
    began = time.time()
    with runs.RunLock() as lock:
        if RANK == 0 and resume and (Path(resume) / "config.json").is_file():
            lock.claim(Path(resume))
        run = prepare(*runs.open_settings(given, resume), resume, lock.claim)
        run.quick, prepared = quick, time.time()
        timer = loop(run)
        if RANK > 0:
            return run.out
        cfg, out = run.cfg, run.out
        run.background.finish()
        times = {"prepare_s": round(prepared - began), "train_s": round(run.wall(timer))}
        print(f"trained {run.step} steps; {times['prepare_s']} s of preparation, {times['train_s']} s of "
              "training and previews")
        evaluate.score([run.averaged], cfg.score_clips, cfg.judge, cfg.score_split, out=out / "scores.json",
                       clap=cfg.clap, audio_model=cfg.audio_model, trust=cfg.trust_remote_code,
                       pickles=cfg.allow_pickle, device=cfg.device, protocol=times)
        draw_pages(out, sampler.LogitNormal)
        print(f"total {time.time() - began:.0f} s{' since it was resumed' * (run.wall_before > 0)}. "
              f"Sounds, curves: {out / 'index.html'}")
        return out


def main() -> None:
    train(*config.parse(sys.argv[1:], __doc__))


if __name__ == "__main__":
    devices.run_on_all(main)
