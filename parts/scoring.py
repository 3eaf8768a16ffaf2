"""Scores: tables of unseen clips for both tasks, with the rows that make a number readable.

A number alone says little. So every table has a model's row between references: real clips and their round
trip through the codec (the ceiling of any model in its latent space), the muffled input and two baselines
(parts/baselines.py). Every proportion and mean comes with n and a 95 % interval.

    score_captions          SoundWorld: does a judge detect the events that each caption names?
    score_recordings        captioned recordings: no true factors, so distances between clouds of embeddings
    score_superresolution   energy score, LSD, SI-SDR against the true clip; paired differences to baselines
    score_codec             the round trip through a latent space, before a model is trained in it
    quick_...               rough numbers on a few validation clips: for curves, not for tables

Nothing here knows a network: `make` is a function that the caller hands in, captions or muffled clips and
seeds -> waves. Waves are (n, N) float32 in [-1, 1] at 16 kHz; `config` is the dict of a run's config.json;
rows are dicts with "row" (the name), values as {"mean", "interval"} or as documented where they are made.

Public: score_captions, score_recordings, score_superresolution, score_codec, pretrained_scores,
factor_scores, quick_caption_metrics, quick_superresolution_metric, preview_clips, UnseenClips,
cached_reference, score_protocol, protocol_line, print_table, codec_table, round_trip, take_request,
superresolution_references.
"""
from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import expit
from tqdm import tqdm

from parts.audio import ACTIVE_RMS, at_level, first_seconds, with_added
from parts.band_limit import CUTOFF, band_limit
from parts.baselines import SpectrumBaseline
from parts.config import NO_FOLD
from parts.errors import UserError
from parts.judges import Judge, judge_clips, load_judge
from parts.metrics import (
    bernoulli_kl,
    energy_score,
    event_match,
    frechet,
    high_band_mel,
    kid,
    log_power,
    lsd,
    mean_interval,
    si_sdr,
    texture,
    wilson,
)
from parts.soundworld import SoundWorld, factor_table

AT_ONCE = 50  # clips in one call of a codec

_REFERENCES: dict = {}  # see cached_reference


def cached_reference(key: tuple, make):
    """make(), or what it gave last time, if that was for the same key: what all runs of an experiment are
    scored against is computed once. Only the latest key is stored."""
    if key not in _REFERENCES:
        _REFERENCES.clear()
        _REFERENCES[key] = make()
    return _REFERENCES[key]


def preview_clips(config: dict, evals: list[dict] = ()) -> int:
    """How many validation clips a quick metric is measured on. evals: log lines of evaluations, of which
    the last says so (experiments take more clips); older logs do not."""
    otherwise = min(config["score_clips"], 16 if config["task"] == "sr" else 96)
    return evals[-1]["eval"].get("measured_on", otherwise) if evals else otherwise


def round_trip(codec, waves: np.ndarray, decode=None, at_once: int = AT_ONCE) -> np.ndarray:
    """(n, N) -> (n, N): what the latent space leaves of sounds, the ceiling of any model in it. decode: of
    latents, the codec's own by default."""
    decode, decoded = decode or codec.decode, []
    for i in range(0, len(waves), at_once):
        decoded.append(decode(codec.encode(torch.as_tensor(waves[i : i + at_once]))).numpy())
    return np.concatenate(decoded)[:, : waves.shape[1]]    # whole tokens may be longer


def summary(rows: list[dict], minus: list[dict] | None = None) -> dict:
    """{metric: {mean, interval}} over clips; with `minus`, of the paired differences, in which the clips'
    variety cancels."""
    result = {}
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        if minus is not None:
            values = values - np.array([row[name] for row in minus])
        result[name] = {"mean": float(values.mean()), "interval": mean_interval(values)}
    return result


# --- captions: the judge's answers against the true factors -------------------------------------------------


def order_right(world: SoundWorld, predicted: dict, hit: np.ndarray) -> np.ndarray:
    """Among clips 0..n-1 whose event set is right (hit (n,)) and whose caption orders events: is the
    predicted order of onsets the caption's? -> (as many,) bool"""
    right = []
    for i in range(len(hit)):
        scene = world.scene(i)
        if not hit[i] or scene.relation not in ("then", "then-while"):
            continue
        # The last event of "then-while" is the background, which has no place in the order.
        sequence = scene.events[:-1] if scene.relation == "then-while" else scene.events
        onsets = [predicted["onset"][i, event.sound] for event in sequence]
        right.append(all(a < b for a, b in itertools.pairwise(onsets)))
    return np.asarray(right, bool)


def _share(right: np.ndarray, asked: np.ndarray) -> float | None:
    """Share of True in `right` where it was asked, None where nothing was."""
    return float(right[asked].mean()) if asked.any() else None


def factor_scores(world: SoundWorld, truth: dict, predicted: dict, hit: np.ndarray) -> dict:
    """Is each factor right, taken alone? None where there was nothing to ask.

    recall: share of the caption's events that are detected (semantics). Of events that are detected and
    countable, or clearly pitched: count, pitch (its sign). order: see order_right, with order_n, the number
    of clips it was asked of (detail). truth: see factor_table, predicted: see judge_clips, hit (n,): is the
    event set right?"""
    asked = truth["presence"] > 0.5                                # (n, 24)
    detected = predicted["presence"] > 0
    countable = asked & detected & ~np.isnan(truth["count"])
    pitched = asked & detected & (np.abs(np.nan_to_num(truth["pitch"])) >= 0.5)
    order = order_right(world, predicted, hit)
    return {
        "recall": _share(detected, asked),
        "count": _share(predicted["count"].argmax(-1) + 1 == truth["count"], countable),
        "pitch": _share(np.sign(predicted["pitch"]) == np.sign(truth["pitch"]), pitched),
        "order": float(order.mean()) if len(order) else None,
        "order_n": len(order),
    }


def quick_caption_metrics(world: SoundWorld, made, clips: int, again, device="cpu", judge="dev") -> dict:
    """Clips 0..clips-1 of a split, generated as `made` -> {"event_accuracy", and what factor_scores gives},
    by a judge, on a device; and texture_score, the energy score of metrics.texture, of the first clips, of
    which `again` (m, N) is a second sample."""
    truth = factor_table(world, clips)
    predicted = judge_clips(load_judge(judge).to(device), made)
    hit = event_match(truth["presence"], predicted["presence"])
    scores = [energy_score(texture(world.wave(i)), [texture(made[i]), texture(second)])
              for i, second in enumerate(again)]
    return {"event_accuracy": float(hit.mean()), "texture_score": float(np.mean(scores)),
            **factor_scores(world, truth, predicted, hit)}


@dataclass
class UnseenClips:
    """Clips 0..n-1 of a SoundWorld split, and what a caption model's clips are compared with."""

    world: SoundWorld
    captions: list[str]
    waves: dict                # "real", "codec ceiling" -> (n, N)
    others: np.ndarray         # other real clips (n, N)
    judged: dict               # the judge's answers for the real clips
    reference: np.ndarray      # the judge's embeddings of `others`
    new: np.ndarray            # (n,) True for captions that training never saw word for word


def unseen_clips(codec, config: dict, clips: int, judge: Judge, split: str) -> UnseenClips:
    """The references of a split; the other real clips are those of `val`, or of `test` where val itself is
    scored."""
    seconds = config["seconds"]
    world = SoundWorld(split, clips, seconds=seconds).prepare()
    other = SoundWorld("val" if split != "val" else "test", clips, seconds=seconds).prepare()
    real = np.stack([world.wave(i) for i in range(clips)])         # (n, N)
    others = np.stack([other.wave(i) for i in range(clips)])

    # Scenes of other splits may still be worded as a training scene was: those captions are not new.
    trained = SoundWorld("train", config["clips"], seconds=seconds)
    seen = {trained.caption(i, k) for i in range(len(trained)) for k in range(trained.wordings(i))}
    captions = [world.caption(i) for i in range(clips)]
    return UnseenClips(
        world=world,
        captions=captions,
        waves={"real": real, "codec ceiling": round_trip(codec, real)},
        others=others,
        judged=judge_clips(judge, real),
        reference=judge_clips(judge, others)["embedding"],
        new=np.array([caption not in seen for caption in captions]),
    )


def text_scores(unseen: UnseenClips, waves, judge: Judge) -> dict:
    """Metrics of clips 0..n-1 of a SoundWorld split rendered as `waves`: exact match of the event set with
    its interval, by number of events and over captions in new wording, factor_scores, event_kl, kid."""
    predicted = judge_clips(judge, waves)
    n = len(waves)
    truth = factor_table(unseen.world, n)
    hit = event_match(truth["presence"], predicted["presence"])    # (n,)

    size = truth["presence"].sum(1)                                # (n,): events of each clip
    by_events = {}
    for k in np.unique(size):
        by_events[int(k)] = {"exact": float(hit[size == k].mean()), "n": int((size == k).sum())}

    new_wording = None
    if unseen.new.any():
        hit_new, n_new = hit[unseen.new], unseen.new.sum()
        new_wording = {
            "exact": float(hit_new.mean()),
            "interval": wilson(hit_new.sum(), n_new),
            "n": int(n_new),
        }
    return {
        "exact": float(hit.mean()),
        "interval": wilson(hit.sum(), n),
        "n": n,
        "by_events": by_events,
        "new_wording": new_wording,
        **factor_scores(unseen.world, truth, predicted, hit),
        "event_kl": bernoulli_kl(expit(unseen.judged["presence"]), expit(predicted["presence"])),
        "kid": kid(predicted["embedding"], unseen.reference),
    }


def pretrained_scores(rows: dict, captions: list[str], reference, clap=None, embedder=None) -> dict:
    """What pretrained models (Clap and Embedder of parts/pretrained_judges.py) say of rows {name: waves (n,
    N)}. -> {name: scores}: clap_score, mean cosine of clip and caption; kid_model and, where n allows,
    frechet_model, distances to the reference clips (m, N) in the embedder's space."""
    scores = {name: {} for name in rows}
    if clap:
        text = clap.text(captions)                                 # (n, E), unit length
        for name, waves in rows.items():
            cosine = (clap.audio(waves) * text).sum(1)
            scores[name]["clap_score"] = {"mean": float(cosine.mean()), "interval": mean_interval(cosine)}
    if embedder:
        y = embedder.audio(reference)                              # (m, E)
        for name, waves in rows.items():
            x = embedder.audio(waves)
            scores[name]["kid_model"] = kid(x, y)
            # With fewer clips its bias is larger than what it measures.
            if min(len(x), len(y)) >= max(1_000, 2 * x.shape[1]):
                scores[name]["frechet_model"] = frechet(x, y)
    return scores


def score_captions(
    codec, config: dict, make, clips: int, judge_kind: str, split: str, clap=None, embedder=None
) -> list[dict]:
    """Rows of the caption-to-sound table on unseen SoundWorld captions: real clips, their codec round trip
    (the ceiling), the model. make(captions, seeds) -> waves (n, N); clip i is made from seed i."""
    judge = load_judge(judge_kind).to(codec.mean.device)

    def references() -> UnseenClips:
        return unseen_clips(codec, config, clips, judge, split)

    key = ("t2a", codec.key, judge_kind, split, clips, config["clips"], config["seconds"])
    unseen = cached_reference(key, references)
    rows = unseen.waves | {"model": make(unseen.captions, list(range(clips)))}
    more = pretrained_scores(rows, unseen.captions, unseen.others, clap, embedder)
    return [{"row": name, **text_scores(unseen, waves, judge), **more[name]} for name, waves in rows.items()]


def score_recordings(
    codec, config: dict, make, test_set, train_set, clips: int, judge_kind: str, clap=None, embedder=None
) -> list[dict]:
    """Caption-to-sound on recordings: no true factors, so KID, in an embedding trained on other (synthetic)
    sounds, and what pretrained models say. The reference clips are of the training set. make: see
    score_captions."""
    judge = load_judge(judge_kind).to(codec.mean.device)
    seconds = config["seconds"]
    n = min(clips, len(test_set))
    real = np.stack([first_seconds(test_set.wave(i), seconds) for i in range(n)])  # (n, N)
    captions = [test_set.caption(i) for i in range(n)]
    chosen = np.random.default_rng(0).permutation(len(train_set))[: max(500, n)]
    others = np.stack([first_seconds(train_set.wave(i), seconds) for i in chosen])
    reference = judge_clips(judge, others)["embedding"]

    made = make(captions, list(range(n)))
    rows = {"real": real, "codec ceiling": round_trip(codec, real), "model": made}
    more = pretrained_scores(rows, captions, others, clap, embedder)
    table = []
    for name, waves in rows.items():
        distance = kid(judge_clips(judge, waves)["embedding"], reference)
        table.append({"row": name, "n": n, "kid": distance, **more[name]})
    return table


# --- super-resolution: restored clips against the true ones -------------------------------------------------


def sr_rows(reals, outputs: list, cutoff: int) -> list[dict]:
    """Metrics of each clip; outputs[s][i] is sample s of clip i. LSD and SI-SDR of the first sample, energy
    score of all."""
    rows = []
    for i, real in enumerate(reals):
        first = outputs[0][i]
        row = lsd(log_power(real), log_power(first), cutoff)
        samples = [high_band_mel(output[i], cutoff) for output in outputs]
        row["energy_score"] = energy_score(high_band_mel(real, cutoff), samples)
        row["si_sdr"] = si_sdr(real, first)
        rows.append(row)
    return rows


def quick_superresolution_metric(reals, samples: list, cutoff: int) -> dict:
    """Of two samples of restored clips against `reals`, above the cutoff: mean LSD of the first -> lsd_hf,
    and energy_score."""
    rows = sr_rows(reals, samples, cutoff)
    return {name: float(np.mean([row[name] for row in rows])) for name in ("lsd_hf", "energy_score")}


def superresolution_references(codec, config: dict, test_set, train_set, clips: int, cutoff: int) -> tuple:
    """(real clips [(N,)], muffled clips (n, N), {row: metrics of each clip}) of everything that is not the
    model."""
    seconds = config["seconds"]
    reals = [first_seconds(test_set.wave(i), seconds) for i in range(min(clips, len(test_set)))]
    muffled = [band_limit(x, cutoff) for x in reals]

    # Baselines: two samples a clip, seeds 2 i and 2 i + 1, as the model has.
    chosen = np.random.default_rng(0).permutation(len(train_set))[:400]
    baseline = SpectrumBaseline((first_seconds(train_set.wave(i), seconds) for i in chosen), cutoff)
    outputs = {"input": [muffled]}
    for name, kind in (("mean spectrum", "mean"), ("ridge", "ridge")):
        outputs[name] = [[baseline.render(x, kind, 2 * i + s) for i, x in enumerate(muffled)] for s in (0, 1)]

    # Ceiling: the true clip's latents, decoded as a model's would be.
    low, gains = at_level(np.stack(muffled), ACTIVE_RMS)           # (n, N), (n, 1)
    low = torch.as_tensor(low)
    z = codec.encode(torch.as_tensor((np.stack(reals) * gains).astype(np.float32)))        # (n, T, C)
    decoded = []
    for i in range(0, len(z), AT_ONCE):
        part = slice(i, i + AT_ONCE)
        decoded.append(codec.decode(z[part], low[part], cutoff)[:, : low.shape[1]])
    added = torch.cat(decoded).numpy() - low.numpy()
    outputs["codec ceiling"] = [with_added(np.stack(muffled), added, gains)]

    rows = {name: sr_rows(reals, samples, cutoff) for name, samples in outputs.items()}
    return reals, np.stack(muffled), rows


def score_superresolution(
    codec, config: dict, make, open_sets, clips: int, cutoff: int, split: str
) -> list[dict]:
    """Rows of the super-resolution table on unseen clips: Chebyshev order 8 at `cutoff` (Hz), two samples a
    clip where sampled; then the model's paired differences to both baselines.

    make(muffled (n, N), seeds) -> waves (n, N). open_sets() -> (test set, training set) is called only where
    the references are not cached."""

    def references() -> tuple:
        test_set, train_set = open_sets()
        return superresolution_references(codec, config, test_set, train_set, clips, cutoff)

    what = (config["data"], config["val_fold"], config["clips"], config["seconds"])
    reals, muffled, known = cached_reference(("sr", codec.key, *what, split, clips, cutoff), references)
    samples = [make(muffled, [2 * i + s for i in range(len(reals))]) for s in (0, 1)]
    made = sr_rows(reals, samples, cutoff)

    rows = {name: known[name] for name in ("input", "mean spectrum", "ridge")}
    rows |= {"model": made, "codec ceiling": known["codec ceiling"]}
    table = [{"row": name, **summary(of_clips), "n": len(reals)} for name, of_clips in rows.items()]
    for name in ("mean spectrum", "ridge"):
        table.append({"row": f"model - {name}", **summary(made, known[name]), "n": len(reals)})
    return table


# --- codecs -------------------------------------------------------------------------------------------------


def _through_all(codec, wav: torch.Tensor) -> torch.Tensor:
    """(B, N) -> (B, N) through all features of a pretrained codec, without the PCA."""
    return codec.wave(codec.native(wav))


def _through_channels(codec, wav: torch.Tensor) -> torch.Tensor:
    """(B, N) -> (B, N) through the channels that a model would work in."""
    return codec.decode(codec.encode(wav))


def score_codec(codec, config: dict, train_set, test_set, clips: int = 100) -> dict:
    """Fit a latent space of codec.channels on the training set, then send held-out clips through it and back
    -> {"protocol", "rows"}: LSD, its part from 4 kHz up, and SI-SDR, before and after the PCA. To be read
    before a model is trained in that space: it is the ceiling."""
    seconds = config["seconds"]
    chosen = np.random.default_rng(0).permutation(len(train_set))[:300]
    codec.fit(first_seconds(train_set.wave(i), seconds) for i in chosen)

    trips = {f"{codec.channels} channels": _through_channels}
    if hasattr(codec, "native") and codec.channels < codec.mean.shape[0]:
        trips = {f"all {codec.mean.shape[0]}": _through_all, **trips}
    n = min(clips, len(test_set))
    table = []
    for name, trip in trips.items():
        rows = []
        for i in tqdm(range(n), desc=name, unit="clip", dynamic_ncols=True):
            x = first_seconds(test_set.wave(i), seconds)
            y = trip(codec, torch.as_tensor(x)[None])[0, : len(x)].cpu().numpy()
            rows.append(lsd(log_power(x), log_power(y), 4_000) | {"si_sdr": si_sdr(x, y)})
        table.append({"row": name, **summary(rows), "n": n})

    protocol = {
        "codec": config["codec"],
        "data": config["data"],
        "n": n,
        "seconds": seconds,
        "tokens_per_s": codec.rate,
        "explained": codec.explained,
        "stft": "Hann 2048/512, power floor 1e-8",
    }
    return {"protocol": protocol, "rows": table}


# --- how a table was made -----------------------------------------------------------------------------------


def take_request(configs: list[dict], args) -> None:
    """What `evaluate.py score` was asked for, put into the settings of its runs, and defaults in place of
    what was not; UserError where a flag has no meaning for these runs."""
    for flag in ("val_fold", "max_bad_share"):
        value = getattr(args, flag)
        if value is not None and not args.data:
            raise UserError(f"--{flag.replace('_', '-')} {value}: belongs to --data; a run is scored on its "
                            "own")
    tasks = {config["task"] for config in configs}
    for flag in ("judge", "guidance_scale", "clap", "audio_model"):
        if tasks == {"sr"} and getattr(args, flag) not in (None, ""):
            raise UserError(f"--{flag.replace('_', '-')}: for captions; super-resolution has no such thing")
    if tasks == {"t2a"} and args.cutoff is not None:
        raise UserError(f"--cutoff {args.cutoff}: for super-resolution; captions have no such thing")
    args.judge, args.cutoff = args.judge or "dev", args.cutoff or CUTOFF
    if args.data:
        for config in configs:
            config.update(data=args.data, val_fold=NO_FOLD if args.val_fold is None else args.val_fold)
            if args.max_bad_share is not None:
                config["max_bad_share"] = args.max_bad_share


def score_protocol(config: dict, n: int, split: str, steps: int | None, cutoff: int, judge: str,
                   w: float | None, rescale: float, judges: dict) -> dict:
    """What every table is printed with, or its numbers can't be compared. judges: {"clap", "embedder":
    model}."""
    synthetic = config["data"] == "soundworld"
    # A folder that has no test split of its own is validated on the same clips.
    held_out = "held out (validation's clips, unless the data has a test split)"
    protocol = {"data": config["data"], "split": split if synthetic else held_out, "n": n,
                "sample_steps": steps or config["sample_steps"], "candidates": 1}
    if config["task"] == "sr":
        return {**protocol, "cutoff_hz": cutoff, "filter": "cheby1 order 8",
                "stft": "Hann 2048/512, power floor 1e-8"}
    protocol |= {"judge": judge, "w": config["guidance_scale"] if w is None else w, "rescale": rescale}
    for part, model in judges.items():
        protocol[part] = f"{model.name} ({model.key}, {model.rate_in} Hz)"
    return protocol


# --- rows as text -------------------------------------------------------------------------------------------


# How a protocol's entries and a table's columns are called where they do not explain themselves.
SAID = {"candidates": "candidates that a clip is chosen from", "w": "guidance scale w",
        "rescale": "guidance rescaling", "sample_steps": "integration steps", "n": "clips",
        "prepare_s": "seconds of preparation", "train_s": "seconds of training with its evaluations"}
CAPTION_NOTES = """real: true clips of the captions; codec ceiling: the same through the codec, the best
that any model can reach; they differ by chance where their intervals overlap. 1000 KID: kernel distance
x 1000 to other real clips in the judge's space; 0 is best, and chance may make it negative."""
SR_NOTES = """energy score, LSD: 0 is best; codec ceiling: true clips through the codec, their low band kept.
SI-SDR: higher is better, but phases above the cutoff are invented: a quiet guess scores above a true draw."""


def protocol_line(protocol: dict) -> str:
    """A protocol as one line of words."""
    return ", ".join(f"{SAID.get(key, key)} {value}" for key, value in protocol.items())


def print_table(protocol: dict, rows: list[dict]) -> None:
    """Protocol, table and its reading, of either task."""
    print("\n" + protocol_line(protocol))
    sr = "cutoff_hz" in protocol
    print(sr_table(rows) if sr else text_table(rows))
    if sr or "exact" in rows[0]:
        print(SR_NOTES if sr else CAPTION_NOTES)


def text_table(rows: list[dict]) -> str:
    """The table of score_captions or score_recordings."""
    if "exact" not in rows[0]:
        lines = [f"{'':14s}    KID (judge's space, trained on SoundWorld: out of domain here)"]
        lines += [f"{row['row']:14s} {_number(row['kid'], '8.4f')}" for row in rows]
        return "\n".join(lines) + pretrained_table(rows)
    lines = [
        f"{'':14s} event set  95 % interval   of ceiling   1 event  2 events  3 events"
        "  new wording (n)   order (n)    event KL   1000 KID"
    ]
    ceiling = next(row["exact"] for row in rows if row["row"] == "codec ceiling")
    lines += [_text_line(row, ceiling) for row in rows]
    return "\n".join(lines) + pretrained_table(rows)


def _number(x: float, form: str) -> str:
    """A number, or "-" as wide where it is not known (a single clip has no interval and no KID)."""
    return f"{x:{form}}" if np.isfinite(x) else f"{'-':>{form.split('.')[0].strip('+')}s}"


def _text_line(row: dict, ceiling: float) -> str:
    """One row of score_captions; `ceiling`: the exact match of the codec's round trip."""
    by_events = []
    for k in (1, 2, 3):
        known = k in row["by_events"]
        by_events.append(f"{row['by_events'][k]['exact']:7.3f}" if known else "      -")
    new, order = "-", "   -   "
    if row["new_wording"]:
        new = f"{row['new_wording']['exact']:.3f} ({row['new_wording']['n']})"
    if row["order"] is not None:
        order = f"{row['order']:.3f} ({row['order_n']})"
    low, high = row["interval"]
    return (
        f"{row['row']:14s}   {row['exact']:.3f}   [{low:.3f}, {high:.3f}]"
        f"    {row['exact'] / max(ceiling, 1e-9):6.3f}   {'  '.join(by_events)}"
        f"   {new:15s} {order:12s} {row['event_kl']:9.4f} {_number(1e3 * row['kid'], '9.3f')}"
    )


def _cell(value: dict, width: int) -> str:
    """A mean with its interval."""
    low, high = value["interval"]
    return f"{value['mean']:{width}.3f} [{_number(low, '6.3f')},{_number(high, '6.3f')}]"


def sr_table(rows: list[dict]) -> str:
    """The table of score_superresolution."""
    headings = ("energy score", "LSD", "LSD-LF", "LSD-HF", "SI-SDR dB")
    keys = ("energy_score", "lsd", "lsd_lf", "lsd_hf", "si_sdr")
    lines = [f"{'':21s}" + "".join(f"{heading:>24s}" for heading in headings)]
    lines += [f"{row['row']:21s}" + "".join(_cell(row[key], 8) for key in keys) for row in rows]
    return "\n".join(lines)


def codec_table(result: dict) -> str:
    """The protocol and the table of score_codec."""
    protocol = []
    for name, value in result["protocol"].items():
        protocol.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    headings = ("LSD", "LSD from 4 kHz up", "SI-SDR dB")
    keys = ("lsd", "lsd_hf", "si_sdr")
    lines = [", ".join(protocol), f"{'round trip':16s}" + "".join(f"{heading:>26s}" for heading in headings)]
    lines += [f"{row['row']:16s}" + "".join(_cell(row[key], 9) for key in keys) for row in result["rows"]]
    return "\n".join(lines)


PRETRAINED_HEADINGS = {
    "clap_score": "CLAP score, 95 %",
    "kid_model": "KID, audio model",
    "frechet_model": "Frechet, audio model",
}


def _pretrained_cell(name: str, value) -> str:
    if name == "clap_score":
        low, high = (_number(x, "+.3f") for x in value["interval"])
        return f"{value['mean']:+.3f} [{low}, {high}]"
    return _number(value, "6.4f" if name == "kid_model" else "6.3f")


def pretrained_table(rows: list[dict]) -> str:
    """The columns of pretrained_scores, to be put after another table; empty where there are none."""
    shown = [name for name in PRETRAINED_HEADINGS if name in rows[0]]
    if not shown:
        return ""
    lines = ["", f"{'':14s}" + "".join(f"{PRETRAINED_HEADINGS[name]:>26s}" for name in shown)]
    for row in rows:
        cells = [_pretrained_cell(name, row[name]) for name in shown]
        lines.append(f"{row['row']:14s}" + "".join(f"{cell:>26s}" for cell in cells))
    return "\n".join(lines)
