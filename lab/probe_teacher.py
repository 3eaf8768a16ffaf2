"""TODO"""
from __future__ import annotations
import argparse, contextlib, copy, csv, dataclasses, datetime, difflib, functools, hashlib, io, itertools, json, math, os, platform, re, shutil, signal, subprocess, sys, time, traceback, threading, zlib
import multiprocessing as mp
import multiprocessing.connection
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
import typing
import numpy as np
import scipy.fft
import scipy.signal
import scipy.optimize
import scipy.stats
import scipy.cluster.hierarchy
import scipy.spatial.distance
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchaudio.functional as TAF
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from parts.files import write_text
from parts.codec import log_mel
from parts.errors import UserError
from parts.metrics import mean_interval
from parts.recordings import find_metadata, read_audio, read_rows
from parts.soundworld import SoundWorld, factor_table
from parts.teacher import load_teacher, pool
import evaluate



def fit_linear(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Logistic regression (L-BFGS): x (n, d) standardized; y (n,) classes or (n, K) in {0, 1} -> weights (d, K), bias (K,)."""
    w = torch.zeros(x.shape[1], y.shape[1] if y.ndim == 2 else int(y.max()) + 1, requires_grad=True)
    b = torch.zeros(w.shape[1], requires_grad=True)
    opt = torch.optim.LBFGS([w, b], max_iter=80, line_search_fn="strong_wolfe")
    def closure():
        opt.zero_grad()
        loss = (F.binary_cross_entropy_with_logits if y.ndim == 2 else F.cross_entropy)(x @ w + b, y) + 0.5 * penalty * w.square().sum()
        loss.backward()
        return loss
    opt.step(closure)
    return w.detach(), b.detach()


def linear_probe(x: Tensor, y: Tensor, train: np.ndarray, inner: np.ndarray, test: np.ndarray, evaluate.score) -> np.ndarray:
    """Scores (n_test,) of a linear probe: its penalty chosen on `inner` after fitting on `train`, refitted on both. Boolean rows."""
    def scores(fit, on, penalty):
        mean, std = x[fit].mean(0), x[fit].std(0) + 1e-6
        w, b = fit_linear((x[fit] - mean) / std, y[fit], penalty)
        return evaluate.score((x[on] - mean) / std @ w + b, y[on])
    best = max((1e-3, 1e-2, 1e-1, 1.0), key=lambda penalty: scores(train, inner, penalty).mean())
    return scores(train | inner, test, best)


def correct(logits: Tensor, y: Tensor) -> np.ndarray:
    return (logits.argmax(1) == y).double().numpy()


def ranking(logits: Tensor, y: Tensor) -> np.ndarray:
    """Average precision of each clip's ranking of classes: 1 where all that are present rank above all that are not."""
    order = (-logits).argsort(1)
    hit = y.gather(1, order).double()
    precision = hit.cumsum(1) / torch.arange(1, hit.shape[1] + 1)
    return ((precision * hit).sum(1) / hit.sum(1)).numpy()


def probe_teacher(teacher: nn.Module, esc10: Path | None, clips: int = 3_000, inits: int = 3) -> dict:
    """Scores and paired gains over clips of the teacher against both controls (random: mean over `inits` initialisations).

    SoundWorld: which events (average precision of the ranking), fitted on train, scored on the last quarter of val. ESC-10: accuracy
    over the five official folds, the penalty chosen on the next fold."""
    worlds = [SoundWorld(s, n).prepare() for s, n in (("train", clips * 3 // 4), ("val", clips // 4))]
    sets = {"soundworld": ([torch.from_numpy(w.wave(i)) for w in worlds for i in range(len(w))],
                           torch.cat([torch.from_numpy(factor_table(w)["presence"]) for w in worlds]), np.r_[np.zeros(len(worlds[0])), np.ones(len(worlds[1]))], ranking)}
    if esc10:
        rows = read_rows(find_metadata(esc10, "train")[0])
        classes = sorted({r["category"] for r in rows})
        sets["esc10"] = ([torch.from_numpy(read_audio(esc10 / r["file_name"])) for r in tqdm(rows, desc="reading", unit="clip")],
                         torch.tensor([classes.index(r["category"]) for r in rows]), np.array([int(r["fold"]) for r in rows]), correct)
    def rows_of(x, y, part, evaluate.score):
        if evaluate.score is ranking:
            inner = (part == 0) & (np.arange(len(part)) >= 0.8 * (part == 0).sum())
            return linear_probe(x, y, (part == 0) & ~inner, inner, part == 1, evaluate.score)
        out = np.zeros(len(y))
        for fold in range(1, 6):
            inner = part == fold % 5 + 1
            out[part == fold] = linear_probe(x, y, (part != fold) & ~inner, inner, part == fold, evaluate.score)
        return out
    @torch.no_grad()
    def pooled(net, waves):
        mels = [log_mel(x[None]) for x in waves]
        return torch.cat([pool(m if net is None else net(m[:, : m.shape[1] // 2 * 2])) for m in mels])
    randoms, report = [], {}
    for seed in range(inits):
        torch.manual_seed(100 + seed)
        randoms.append(type(teacher)().eval())
    for name, (waves, y, part, evaluate.score) in sets.items():
        per_clip = {"mel statistics": rows_of(pooled(None, waves), y, part, evaluate.score),
                    "random initialisation": np.mean([rows_of(pooled(net, waves), y, part, evaluate.score) for net in randoms], axis=0),
                    "teacher": rows_of(pooled(teacher, waves), y, part, evaluate.score)}
        report[name] = {"n": len(per_clip["teacher"]), **{k: {"mean": float(v.mean()), "interval": mean_interval(v)} for k, v in per_clip.items()},
                        **{f"teacher - {k}": {"mean": float((per_clip["teacher"] - v).mean()), "interval": mean_interval(per_clip["teacher"] - v)}
                           for k, v in per_clip.items() if k != "teacher"}}
    return report


def cmd_probe_teacher(a) -> None:
    if not a.weights.is_file():
        raise UserError(f"--weights {a.weights}: no such file; make it with: python guidance.py pretrain")
    if a.esc10 and not a.esc10.is_dir():
        raise UserError(f"--esc10 {a.esc10}: no such folder")
    report = probe_teacher(load_teacher(a.weights), a.esc10)
    for name, rows in report.items():
        print(f"\n{name}, n {rows['n']}" + (" (accuracy, five folds)" if name == "esc10" else " (average precision of events)"))
        for k, v in rows.items():
            if k != "n":
                print(f"{k:34s} {v['mean']:+.3f}  [{v['interval'][0]:+.3f}, {v['interval'][1]:+.3f}]")
    if a.out:
        write_text(a.out, json.dumps(report, indent=1) + "\n")
