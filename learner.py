"""One step of training: a batch on the device, the losses, the update; and what is measured between steps.

    draw clips -> batch_to: noise, t, dropped conditions -> Learner.losses: fm + lambda ssl + mu struct -> Learner.update: clip, step, EMA

train.py says when and with which weights; this file says how. Everything random in a step is drawn from a generator that is made of
(seed, step), so a resumed run sees the same batches, and any number of devices shares one.

Conventions: t in [0, 1], t = 1 is pure noise, t = 0 is data; x_t = (1-t) x0 + t eps; v = eps - x0; the network predicts v.
B batch, T tokens, C latent channels, F teacher features, S words.
"""
from __future__ import annotations

import copy
import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist

import data
import evaluate
import guidance
import regime
import sampler
import structure_reg
from config import Config
from model import DiT, flow_matching_loss, interpolate, make_optimizers

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's: one process a device


def shared(x):
    """x of process 0, on all of them."""
    box = [x]
    if WORLD > 1:
        dist.broadcast_object_list(box)
    return box[0]


# --- the batch ----------------------------------------------------------------------------------------------------------------

class Ahead:
    """Draws the clips of a step; on a GPU a thread draws those of the next one meanwhile. What is drawn depends on (seed, step) alone."""

    def __init__(self, cfg: Config, latents, muffled, T: int, phi, rows: slice):
        self.rows, self.args = rows, (cfg, latents, muffled, T, phi)
        self.pool, self.next = ThreadPoolExecutor(1) if cfg.device.startswith("cuda") else None, None

    def draw(self, step: int, with_phi: bool) -> dict:
        cfg, latents, muffled, T, phi = self.args
        return data.draw_batch(latents, muffled, cfg.batch, T, np.random.default_rng([cfg.seed, 1, step]), phi if with_phi else None, self.rows)

    def __call__(self, step: int, with_phi: bool) -> dict:
        known, job = self.next or (None, None)
        b = job.result() if known == (step, with_phi) else self.draw(step, with_phi)
        if self.pool:
            self.next = (step + 1, with_phi), self.pool.submit(self.draw, step + 1, with_phi)
        return b


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


def parts(b: dict, n: int) -> list[dict]:
    """A batch cut into n equal parts (gradient accumulation)."""
    return [b] if n == 1 else [dict(zip(b, part)) for part in zip(*(v.chunk(n) for v in b.values()))]


def culprits(drawn: dict, train_set) -> list[str]:
    """Names of the clips of a batch that are not finite themselves, or of all of them; of all devices."""
    finite = np.all([np.isfinite(drawn[k]).all((1, 2)) for k in ("x0", "cond", "phi") if k in drawn], 0)
    names = [train_set.name(int(i)) for i in drawn["i"][~finite]]
    found = [(names, [train_set.name(int(i)) for i in drawn["i"]])] * WORLD
    if WORLD > 1:
        dist.all_gather_object(found, found[0])
    return sorted({n for bad, _ in found for n in bad} or {n for _, every in found for n in every})


# --- the step ------------------------------------------------------------------------------------------------------------------

def predict(model: DiT, b: dict, drop: bool = True, return_blocks: bool = False, net=None):
    """-> v_hat [, hs], v (B, T, C) of a batch. net: the model as it is called where that is not the model itself (compiled, distributed)."""
    x_t, v = interpolate(b["x0"], b["eps"], b["t"])
    gone = b["drop"] if drop else None
    text = model.encode_text(b["ids"], gone) if "ids" in b else None
    out = (model if net is None else net)(x_t, b["t"], text, b.get("cond"), b.get("mask"), gone if "cond" in b else None, return_blocks)
    return (*out, v) if return_blocks else (out, v)


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


# --- between steps ---------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def validation_loss(model: DiT, batches: list[dict], bins: int = 10) -> list[float]:
    """Loss on held-out clips at t = .05, .15 ... .95, the same noise each time; one bin a number."""
    out = []
    for k in range(bins):
        loss = [flow_matching_loss(*predict(model, {**b, "t": torch.full_like(b["t"], (k + 0.5) / bins)}, drop=False), b.get("mask")) for b in batches]
        out.append(float(torch.cat(loss).mean()))
    return out


class Probe:
    """Where r gets its D: what the averaged network makes of 48 held-out clips and fixed noise. Nothing is drawn."""

    def __init__(self, b: dict, hear, mean: torch.Tensor | None, kind: str):
        """b: a batch (batch_to); hear (B, T, C) -> (B, T, F) and mean (F,): phi, or the identity for the latent proxy; kind: regime.SIGNALS."""
        self.b, self.hear, self.mean, self.kind = {k: v[:48] for k, v in b.items()}, hear, mean, kind
        self.target = hear(self.b["x0"])

    @torch.no_grad()
    def __call__(self, model: DiT, full: bool = False) -> dict:
        """-> D (the number whose slope is taken), D_t {t: D}, and where it was measured D_shuffled: D at t = 1 under the neighbour's
        condition. full: at all levels, shuffled too; else what the signal needs."""
        b, (levels, shuffled) = self.b, (regime.LEVELS, True) if full else regime.needs(self.kind)
        def with_condition(shift):
            text = model.encode_text(b["ids"].roll(shift, 0)) if "ids" in b else None
            cond = b["cond"].roll(shift, 0) if "cond" in b else None
            return lambda x_t, t: model(x_t, t, text, cond, b.get("mask"))
        D_at = lambda shift, levels: regime.probe(with_condition(shift), self.hear, b["x0"], b["eps"], levels, self.mean, self.target, b.get("mask"))
        D, other = D_at(0, levels), D_at(1, (1.0,))[1.0] if shuffled else None
        return {"D": regime.signal(self.kind, D, other), "D_t": {str(t): d for t, d in D.items()}, **({} if other is None else {"D_shuffled": other})}


def circuits(model: DiT) -> list[tuple]:
    """(W_O, W_V, W_1, W_2, C) of each block: what structure_reg.py compares."""
    return [(b.out.weight, b.qkv.weight.chunk(3)[2], b.mlp[0].weight, b.mlp[2].weight, b.ada.weight) for b in model.blocks]
