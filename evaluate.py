"""What a user does with a trained model: generate, upsample, score, list sounds, export.

    python evaluate.py generate RUN --prompt "a low bell, then rain" --out bell.wav [--n --seed ...]
    python evaluate.py upsample RUN --input muffled.wav --out clear.wav [--cutoff HZ --seed --steps]
    python evaluate.py score RUN [RUN ...] [--clips N --judge dev|final --data FOLDER --out scores.json]
    python evaluate.py sounds RUN                         # what can be asked for
    python evaluate.py export RUN FOLDER                  # averaged weights, settings, model card: to publish
    python evaluate.py dashboard RUN; python evaluate.py page RUN     # dashboard.png, index.html again

RUN is a run folder of train.py (or assets/demo, assets/demo-sr). Metrics, tables: parts/scoring.py.

Conventions: t = 1 is noise, t = 0 is data; guidance scale w = 1 is plain conditional. B batch, N samples, T
tokens, C channels. Waveforms are (N,) or (B, N) float32 in [-1, 1] at 16 kHz.
"""
from __future__ import annotations

import parts  # noqa: F401  # isort: skip  (before torch)
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import sampler
from model import DiT, VelocityField, flow_matching_loss, integrate, predict
from parts import checkpoints, previews, scoring
from parts.arguments import numbered
from parts.audio import RATE, at_level, first_seconds, in_segments, scaled_note, with_added, write_wav
from parts.audio_files import file_rate, read_channels, refuse_overwriting
from parts.background import at_once
from parts.band_limit import CUTOFF, choose_cutoffs
from parts.commands import evaluate_parser
from parts.components import beside_model, open_codec, open_text
from parts.dashboard import draw_dashboard
from parts.devices import pick_device, tf32
from parts.errors import UserError, printable, quoted, run_cli
from parts.files import to_json, write_text
from parts.judges import judged_events, load_judge
from parts.metrics import added_above, describe
from parts.model_card import export_with_card
from parts.page import write_page
from parts.pretrained_judges import open_judges
from parts.prompts import check_prompt
from parts.soundworld import list_sounds

RESCALE = 1.0  # model.VelocityField's; without it guided clips peak twice as high (results/log.md) # ASSUMED
BATCH = 16     # clips at a time: larger batches are slower on a CPU (results/log.md)


# --- a trained model ------------------------------------------------------------------------------------

@dataclass
class Run:
    """A trained model ready to use: EMA weights in eval mode, and what they were made with."""
    path: Path
    config: dict
    model: DiT
    codec: object
    words: object                      # text encoder; None for super-resolution
    step: int

    @property
    def tokens(self) -> int:
        """Of a training crop."""
        return self.codec.tokens(round(self.config["seconds"] * RATE))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def build_model(config: dict, words) -> DiT:
    """The network of a configuration. words: text encoder, or None for super-resolution."""
    features = getattr(words, "features", 0)                       # of a frozen encoder
    vocabulary = len(words) if words is not None and not features else 0
    return DiT(config["channels"], config["width"], config["depth"], config["heads"], vocabulary,
               config["task"] == "sr", features)


def load_run(path: str | Path, device: str = "cpu", trust: bool = False, pickles: bool = False) -> Run:
    """Open a run folder for use; UserError where it can't be. Whether code or pickles of its pretrained parts
    may be loaded is the caller's to say, never the folder's."""
    device = pick_device(device)
    config, checkpoint = checkpoints.load_checkpoint(Path(path))
    try:
        ema = {name: weight.float() for name, weight in checkpoint["ema"].items()}
        codec_state, vocabulary = checkpoint["codec"], [printable(word) for word in checkpoint["words"]]
    except (KeyError, AttributeError, TypeError) as e:
        raise UserError(f"{path}: its checkpoint lacks a part, or holds something else there "
                        f"({type(e).__name__}: {e})") from None
    words = open_text(config, vocabulary, device, trust, pickles) if config["task"] == "t2a" else None
    # On meta, without memory: a false size in config.json fails against the weights before it takes any.
    with torch.device("meta"):
        model = build_model(config, words)
    checkpoints.load_weights(path, model, ema, assign=True)
    codec = open_codec(config, device, trust, pickles)
    checkpoints.load_weights(path, codec, codec_state)
    model = model.to(device).eval().requires_grad_(False)
    return Run(Path(path), config, model, beside_model(codec, device), words, checkpoint["step"])


# --- generation -----------------------------------------------------------------------------------------

def noise(run: Run, seeds: list[int], tokens: int) -> Tensor:
    """(B, T, C) standard normal, row j from seeds[j] alone: a clip is the same in any batch."""
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    return torch.stack([torch.randn(tokens, run.codec.channels, generator=g) for g in generators])


@torch.no_grad()
def generate_latents(run: Run, captions: list[str], seeds: list[int], tokens: int | None = None,
                     w: float | None = None, steps: int | None = None, method: str = "euler") -> Tensor:
    """Captions -> z (B, T, C) on the CPU. w: guidance scale (that of the run by default); tokens beyond the
    training length are covered by overlapping windows."""
    w = run.config["guidance_scale"] if w is None else w
    text = run.model.encode_text(run.words.encode(captions).to(run.device))
    null = run.model.encode_text(run.words.encode([""] * len(captions)).to(run.device))
    field = VelocityField(run.model, text, null, w=w, window=run.tokens, rescale=RESCALE)
    x1 = noise(run, seeds, tokens or run.tokens).to(run.device)
    return integrate(field, x1, steps or run.config["sample_steps"], method).cpu()


def generate(run: Run, captions: list[str], seeds: list[int], progress: str = "", **how) -> np.ndarray:
    """Captions -> waveforms (B, N) float32. `how`: see generate_latents. The longer the clips, the fewer
    are made at a time, so that memory does not grow with their length."""
    batch = max(1, BATCH * run.tokens // max(run.tokens, how.get("tokens") or 0))
    waves = []
    starts = range(0, len(captions), batch)
    for i in tqdm(starts, desc=progress, disable=not progress, unit="batch", dynamic_ncols=True):
        z = generate_latents(run, captions[i : i + batch], seeds[i : i + batch], **how)
        waves.append(run.codec.decode(z, seeds=seeds[i : i + batch]).numpy())
    return np.concatenate(waves)


def upsample(run: Run, muffled: np.ndarray, cutoff: float, seeds: list[int],
             steps: int | None = None) -> np.ndarray:
    """Band-limited waves (B, N), one cutoff (Hz) -> full band (B, N); below 0.96 cutoff the input's.
    See upsample_long, which does the same for one recording of any length."""
    # To one level, as in training: how loud a recording is must not matter.
    x, gains = at_level(muffled)
    waves = []
    for i in range(0, len(x), BATCH):
        part = torch.from_numpy(x[i : i + BATCH])
        some = seeds[i : i + BATCH]
        z = restore_latents(run, run.codec.encode(part), some, steps)
        waves.append(run.codec.decode(z, part, cutoff, some)[:, : x.shape[1]].numpy())
    return with_added(muffled, np.concatenate(waves) - x, gains)


@torch.no_grad()
def restore_latents(run: Run, cond: Tensor, seeds: list[int], steps: int | None = None) -> Tensor:
    """Latents of band-limited sound (B, T, C), any T -> of full-band sound, on the CPU."""
    field = VelocityField(run.model, cond=cond.to(run.device), window=run.tokens)
    x1 = noise(run, seeds, cond.shape[1]).to(run.device)
    return integrate(field, x1, steps or run.config["sample_steps"]).cpu()


def upsample_long(run: Run, x: np.ndarray, cutoff: float, seed: int = 0, steps: int | None = None,
                  segment_s: float = 30.0, progress: bool = True) -> np.ndarray:
    """One recording of any length (N,) -> (N,). Latents are integrated as one sequence; sound is encoded and
    decoded in segments of 30 s, and decoded segments are cross-faded over half a second."""
    (loud,), gains = at_level(x[None], rumble=False)
    segment, fade = round(segment_s * run.codec.rate), round(0.5 * run.codec.rate)         # tokens
    T = max(run.tokens, run.codec.tokens(len(x)))

    def samples(token: int) -> int:
        return round(token / run.codec.rate * RATE)
    padded = torch.from_numpy(np.pad(loud, (0, samples(T) - len(x))))

    # Tokens near the edge of a segment are taken from the neighbour that has them further inside.
    pieces = []
    for start in range(0, max(1, T - fade), segment - fade):
        z = run.codec.encode(padded[None, samples(start) : samples(start + segment)])
        first = fade // 2 if start else 0
        last = segment - fade + fade // 2 if start + segment < T else None
        pieces.append(z[:, first:last])
    z = restore_latents(run, torch.cat(pieces, 1)[:, :T], [seed], steps)

    def added(start: int, stop: int) -> np.ndarray:
        first, last = round(start / RATE * run.codec.rate), round(stop / RATE * run.codec.rate)
        part = padded[None, start:stop]
        y = run.codec.decode(z[:, first:last], part, cutoff, [seed])[0, : stop - start]
        return first_seconds(y.numpy(), (stop - start) / RATE) - part[0].numpy()
    made = in_segments(added, samples(T), samples(segment), samples(fade), "upsampling" if progress else "")
    return with_added(x[None], made[None, : len(x)], gains)[0]


# --- evaluation -----------------------------------------------------------------------------------------

@torch.no_grad()
def validation_loss(model: DiT, batches: list[dict], bins: int = 10) -> list[float]:
    """Loss on held-out clips at t = .05, .15 ... .95, the same noise each time; one number a bin."""
    by_t = []
    for k in range(bins):
        each = []
        for batch in batches:
            at_t = {**batch, "t": torch.full_like(batch["t"], (k + 0.5) / bins)}
            v_hat, _, v = predict(model, at_t, drop=False)
            each.append(flow_matching_loss(v_hat, v, batch.get("mask")))
        by_t.append(float(torch.cat(each).mean()))
    return by_t


def maker(run: Run, steps: int | None = None, w: float | None = None, cutoff: int = CUTOFF,
          progress: str = ""):
    """-> make(inputs, seeds) of parts/previews.py. steps: of Euler; w: guidance scale; cutoff: of
    band-limited inputs, Hz; progress: label of a bar."""
    assert not run.model.training, "sounds come from EMA weights in eval mode"

    def make(inputs, seeds: list[int]) -> np.ndarray:
        if run.config["task"] == "sr":
            return upsample(run, inputs, cutoff, seeds, steps)
        return generate(run, inputs, seeds, progress=progress, steps=steps, w=w)
    return make


def preview(run: Run, val_set, background=at_once) -> dict:
    """Write four previews (wav, spectrograms); -> quick metrics on validation clips: event sets and texture
    score, or LSD-HF and energy score. Rough: for curves, not for tables."""
    previews.write_previews(run, val_set, maker(run), background)
    return previews.quick_metrics(run.config, val_set, maker(run, previews.QUICK_STEPS),
                                  scoring.preview_clips(run.config), previews.SAMPLED_TWICE,
                                  run.codec.mean.device)


def score(trained: list[Run], clips: int = 500, judge: str = "dev", split: str = "test", cutoff: int = 2_000,
          w: float | None = None, steps: int | None = None, out: Path | None = None, clap: str = "",
          audio_model: str = "", trust: bool = False, pickles: bool = False, device: str = "cpu",
          protocol: dict | None = None) -> dict:
    """Score runs, print their tables, write JSON to `out`. Every number comes with the protocol it was made
    under, to which `protocol` is added. clap, audio_model: pretrained models (hub id or folder) as judges."""
    tf32(False)
    judges, result = open_judges(clap, audio_model, trust, pickles, device), {}
    for run in trained:
        name, config = str(run.path), run.config
        if split == "combos" and config["data"] != "soundworld":
            raise UserError(f"{name}: --split combos is SoundWorld's, this run's data is {config['data']}")
        rows = rows_of(run, clips, judge, split, cutoff, w, steps, **judges)
        how = scoring.score_protocol(config, rows[0]["n"], split, steps, cutoff, judge, w, RESCALE, judges)
        result[name] = {"protocol": {"run": name, "step": run.step, **how, **(protocol or {})}, "rows": rows}
        scoring.print_table(**result[name])
        if out:
            write_text(Path(out), to_json(result, indent=1) + "\n")
    return result


def rows_of(run: Run, clips: int, judge: str, split: str, cutoff: int, w: float | None, steps: int | None,
            clap=None, embedder=None) -> list[dict]:
    """Rows of a run's table (parts/scoring.py): references, the model, the codec's ceiling."""
    codec, config, make = run.codec, run.config, maker(run, steps, w, cutoff, "generating")

    def open_sets() -> tuple:
        return data.open_set(config, split, clips), data.open_set(config, "train", config["clips"])
    if config["task"] == "sr":
        return scoring.score_superresolution(codec, config, make, open_sets, clips, cutoff, split)
    if config["data"] == "soundworld":
        return scoring.score_captions(codec, config, make, clips, judge, split, clap, embedder)
    return scoring.score_recordings(codec, config, make, *open_sets(), clips, judge, clap, embedder)


# --- commands -------------------------------------------------------------------------------------------

def open_for(args, task: str, other: str) -> Run:
    """The run of a command that is about one task; UserError names the command of the other one."""
    run = load_run(args.run, args.device, args.trust_remote_code, args.allow_pickle)
    if run.config["task"] != task:
        trained_for = "super-resolution" if task == "t2a" else "captions"
        raise UserError(f"{args.run}: trained for {trained_for}; use: python evaluate.py "
                        f"{other.format(quoted(args.run))}")
    return run


def cmd_generate(args) -> None:
    paths = numbered(args.out, args.n)
    run = open_for(args, "t2a", "upsample {} --input FILE")
    in_soundworld = run.config["data"] == "soundworld"
    caption, notes = check_prompt(args.prompt, run.words, args.run, in_soundworld)
    for note in notes:
        print(printable(note))
    n = round((args.seconds or run.config["seconds"]) * RATE)
    judge = load_judge("dev") if in_soundworld else None
    for first in range(0, args.n, BATCH):                          # a few at a time; then they are written
        seeds = list(range(args.seed + first, args.seed + min(first + BATCH, args.n)))
        waves = generate(run, [caption] * len(seeds), seeds, w=args.guidance_scale, steps=args.steps,
                         tokens=max(run.tokens, run.codec.tokens(n)), method=args.method)[:, :n]
        for path, x in zip(paths[first:], waves):
            factor = write_wav(path, x)
            level = "peak {peak:.2f}, RMS {rms:.3f}, centroid {centroid_hz:.0f} Hz".format(**describe(x))
            if judge:
                found = ", ".join(f"{name} at {onset_s:.1f} s" for name, onset_s in judged_events(judge, x))
                level += f"; the judge finds, in order of onset: {found or 'no sound that it knows'}"
            print(f"{path}: {len(x) / RATE:.2f} s, {level}{scaled_note(factor)}")


def cmd_upsample(args) -> None:
    refuse_overwriting(args.input, args.out)
    run = open_for(args, "sr", "generate {} --prompt ...")
    channels = read_channels(args.input)                           # (C, N)
    limits = choose_cutoffs(args.input, channels, file_rate(args.input), args.cutoff)
    y = np.stack([upsample_long(run, x, cutoff, args.seed, args.steps) if cutoff else x
                  for x, (cutoff, _) in zip(channels, limits)])
    factor = write_wav(args.out, y.T, bits=24)
    print(f"{args.out}: {y.shape[1] / RATE:.2f} s at 16 kHz, channels: {len(y)}{scaled_note(factor)}")
    for k, (x, made, (cutoff, said)) in enumerate(zip(channels, y, limits), start=1):
        print(f"channel {k}: {said}{added_above(x, made, cutoff) if cutoff else ''}")


def cmd_sounds(args) -> None:
    run = load_run(args.run, args.device, args.trust_remote_code, args.allow_pickle)
    if run.words is None:
        raise UserError(f"{args.run}: trained for super-resolution; it takes no captions")
    if run.config["data"] == "soundworld":
        print("\n".join(list_sounds()))
    if not getattr(run.words, "features", 0):
        print(f"all {len(run.words.words)} words: {' '.join(run.words.words)}")
    else:
        print(f"any words: captions are read by {run.config['text']}")


def cmd_score(args) -> None:
    options = args.trust_remote_code, args.allow_pickle
    trained = [load_run(run, args.device, *options) for run in args.runs]
    scoring.take_request([run.config for run in trained], args)
    score(trained, args.clips, args.judge, args.split, args.cutoff, args.guidance_scale, args.steps, args.out,
          args.clap, args.audio_model, *options, pick_device(args.device))


COMMANDS = {"generate": cmd_generate, "upsample": cmd_upsample, "score": cmd_score, "sounds": cmd_sounds,
            "export": lambda args: export_with_card(args.run, args.folder),
            "dashboard": lambda args: draw_dashboard(args.run, sampler.LogitNormal),
            "page": lambda args: write_page(args.run, sampler.LogitNormal)}


def main() -> None:
    args = evaluate_parser(__doc__).parse_args()
    COMMANDS[args.command](args)


if __name__ == "__main__":
    run_cli(main)
