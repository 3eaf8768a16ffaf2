"""How often the band limit of a recording is found, and how often one is named that is not there.

    python -m lab.score_cutoff --out cutoff.json                             # SoundWorld's test clips
    python -m lab.score_cutoff --data FOLDER --folds 4 5 --out cutoff.json   # and recordings, by fold

Super-resolution replaces everything above the band limit that parts/band_limit.find_cutoff names. A
limit that is too low destroys true treble; no limit costs the user a flag (--cutoff). So both errors are
counted apart, on clips whose truth is known because they were muffled here:

    original    as it is. Any limit named is a false alarm. Some recordings *are* limited, by a
                microphone or a codec; they count as false alarms all the same, so that their share is an
                upper bound.
    low-pass    by parts/band_limit.band_limit at 1, 2, 3, 4, 6 kHz, family and order drawn at random,
                stored in 16 bits. Its limit is the cutoff. It can be known where there was something to
                remove: from 1.15 to 1.6 times the cutoff the original's mean spectrum lies at least 10
                dB above that of the muffled clip (mean over bands). Other clips count as neither muffled
                nor full-band.
    mp3         written and read again. An encoder does not say where it stops, so the limit is measured
                against the original: the upper end of the highest band of 250 Hz whose mean power is
                within 10 dB of the original's. Up to 7 kHz the clip is muffled. Above, it counts as
                full-band, and a limit named more than half an octave below 8 kHz is a false alarm.
    own rate    resampled to 8 or 11.025 kHz, stored in 16 bits, and back; its limit is half of that
                rate.

A limit is right within half an octave; its error in octaves is log2(found / true). *Treble lost*: the
clip reaches further than the limit + 500 Hz, and holds more than -40 dB of its energy above that.

Comes in: clips (N,) at 16 kHz. Goes out: a row for each source and kind, as a table and as JSON.

Public: KINDS, muffle, true_limit, score_clips, cutoff_table.
"""
from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from parts.arguments import Parser, new_json, whole
from parts.audio import RATE, resample
from parts.audio_files import read_audio
from parts.band_limit import FILTERS, band_limit, find_cutoff
from parts.errors import UserError, run_cli
from parts.files import to_json, write_text
from parts.metrics import wilson
from parts.recordings import AudioFolder
from parts.soundworld import SoundWorld

LOW_PASS = (1_000, 2_000, 3_000, 4_000, 6_000)  # Hz
MP3 = ((16_000, 24), (16_000, 32), (22_050, 24), (22_050, 40), (24_000, 24), (44_100, 32),
       (44_100, 64))  # Hz, kbit/s
OWN_RATES = (8_000, 11_025)  # Hz
KINDS = ("original", *(f"low-pass {cutoff}" for cutoff in LOW_PASS),
         *(f"mp3 {kbit} at {rate}" for rate, kbit in MP3), *(f"own rate {rate}" for rate in OWN_RATES))
COUNTS = ("clips", "full_band", "false_alarms", "treble_lost", "muffled", "answered",
          "within_half_octave")
FULL_BAND_HZ = 7_000  # an mp3 that reaches further counts as full-band. ASSUMED


# --- muffling ------------------------------------------------------------------------------------------

def _stored(x: np.ndarray) -> np.ndarray:
    """As a 16-bit file holds it."""
    return (np.round(np.clip(x, -1, 1) * 32_767) / 32_767).astype(np.float32)


def _through_mp3(x: np.ndarray, rate: int, kbit: int) -> np.ndarray:
    """(N,) at 16 kHz -> (about N,): mp3 of constant bit rate and back. libsndfile turns a level from
    0 to 1 into a bit rate, linearly: 160 to 8 kbit/s up to 24 kHz, 320 to 32 above (1 it refuses)."""
    import soundfile  # lazily, as in parts/audio_files.py
    most, least = (160, 8) if rate <= 24_000 else (320, 32)
    level = min((most - kbit) / (most - least), 0.999)
    file = io.BytesIO()
    soundfile.write(file, resample(x, RATE, rate), rate, format="MP3", subtype="MPEG_LAYER_III",
                    bitrate_mode="CONSTANT", compression_level=level)
    file.seek(0)
    return resample(soundfile.read(file, dtype="float32")[0], rate, RATE)


def muffle(x: np.ndarray, kind: str, seed: int) -> tuple[np.ndarray, int]:
    """x (N,) muffled in one of KINDS -> (about N,), and the rate (Hz) that its file would have."""
    numbers = [int(word) for word in kind.split() if word.isdecimal()]
    if kind.startswith("low-pass"):
        rng = np.random.default_rng([seed, numbers[0]])
        family, order = str(rng.choice(FILTERS)), int(rng.integers(2, 11))
        return _stored(band_limit(x, numbers[0], family, order)), RATE
    if kind.startswith("mp3"):
        kbit, rate = numbers
        return _through_mp3(x, rate, kbit), rate
    if kind.startswith("own rate"):
        low = _stored(resample(x, RATE, numbers[0]))
        return resample(low, numbers[0], RATE), numbers[0]
    return x, RATE


# --- the truth -----------------------------------------------------------------------------------------

def _mean_spectrum(x: np.ndarray) -> np.ndarray:
    """Mean power over time in 128 bands of 62.5 Hz, (N,) -> (128,); Hann, 1024/512."""
    x = np.pad(np.asarray(x, np.float64), (0, max(0, 1_024 - len(x))))
    frames = np.lib.stride_tricks.sliding_window_view(x, 1_024)[::512]
    power = np.abs(np.fft.rfft(frames * np.hanning(1_024))[:, :512]) ** 2
    return power.reshape(len(power), 128, 4).mean((0, 2)) + 1e-14


def true_limit(x: np.ndarray, y: np.ndarray, kind: str) -> float | None:
    """Band limit in Hz of y, which is x (N,) muffled in one of KINDS: RATE / 2 where it is full-band,
    None where it can't be known (see the head of the file)."""
    number = int(kind.split()[-1]) if kind != "original" else RATE
    if kind == "original":
        return RATE / 2
    if kind.startswith("own rate"):
        return number / 2 if np.any(y) else None
    before, after = _mean_spectrum(x), _mean_spectrum(y)
    if kind.startswith("low-pass"):
        removed = slice(int(np.ceil(number / 62.5 * 1.15)), min(126, int(np.ceil(number / 62.5 * 1.6))))
        loss = 10 * np.log10(before[removed] / after[removed]).mean()
        return float(number) if loss >= 10 else None
    kept = after.reshape(32, 4).mean(1) > 0.1 * before.reshape(32, 4).mean(1)
    limit = 250.0 * float(np.flatnonzero(kept).max(initial=-1) + 1)
    if limit > FULL_BAND_HZ:
        return RATE / 2
    return limit or None


def _share_above(x: np.ndarray, limit: float) -> float:
    """Share of the energy of x (N,) above limit + 500 Hz."""
    spectrum = _mean_spectrum(x)
    return float(spectrum[int(np.ceil((limit + 500) / 62.5)) :].sum() / spectrum.sum())


# --- the table -----------------------------------------------------------------------------------------

def _outcome(x: np.ndarray, kind: str, seed: int) -> dict:
    """One clip, one kind -> true and found limit in Hz (or None), and whether treble would be lost."""
    y, rate = muffle(x, kind, seed)
    true, found = true_limit(x, y, kind), find_cutoff(y, rate)
    lost = found is not None and found + 500 < (true or 0) and _share_above(y, found) > 1e-4  # -40 dB
    return {"true": true, "found": found, "treble_lost": lost}


def _row(source: str, kind: str, outcomes: list[dict]) -> dict:
    """Counts of one source and kind. Errors in octaves are of muffled clips for which a limit is named;
    median_octaves is None where there is none."""
    full = [o for o in outcomes if o["true"] == RATE / 2]
    muffled = [o for o in outcomes if o["true"] is not None and o["true"] < RATE / 2]
    least = RATE if kind == "original" else RATE / 2 / np.sqrt(2)
    alarms = [o for o in full if o["found"] is not None and o["found"] < least]
    octaves = [np.log2(o["found"] / o["true"]) for o in muffled if o["found"] is not None]
    row = {"source": source, "kind": kind, "clips": len(outcomes), "full_band": len(full),
           "false_alarms": len(alarms), "treble_lost": sum(o["treble_lost"] for o in outcomes),
           "muffled": len(muffled), "answered": len(octaves),
           "within_half_octave": int(sum(abs(error) <= 0.5 for error in octaves)),
           "median_octaves": float(np.median(octaves)) if octaves else None}
    # Originals are of different clips; the other kinds are the same clips again and again.
    if kind == "original" and full:
        row["false_alarms_95"] = wilson(len(alarms), len(full))
    return row


def _total(source: str, name: str, rows: list[dict]) -> dict:
    """The sum of several rows of a source."""
    sums = {key: sum(row[key] for row in rows) for key in COUNTS}
    return {"source": source, "kind": f"all {name}", **sums, "median_octaves": None}


def score_clips(source: str, waves: Iterable[np.ndarray]) -> list[dict]:
    """A row for each of KINDS and two totals, of clips (N,) at 16 kHz from one source. Clips of nothing
    but zeros are left out; clip k is muffled with seed k."""
    outcomes = {kind: [] for kind in KINDS}
    for k, x in enumerate(waves):
        if np.any(x):
            for kind in KINDS:
                outcomes[kind].append(_outcome(x, kind, k))
    rows = [_row(source, kind, outcomes[kind]) for kind in KINDS]
    totals = [_total(source, name, [row for row in rows if row["kind"].startswith(name)])
              for name in ("low-pass", "mp3")]
    return rows + totals


def cutoff_table(rows: list[dict]) -> str:
    """Rows as a table of Markdown."""
    lines = ["| source | kind | full-band: false alarms | treble lost | muffled: answered | right | "
             "median error, octaves |",
             "|---|---|---|---|---|---|---|"]
    for row in rows:
        median = "" if row["median_octaves"] is None else f"{row['median_octaves']:+.2f}"
        alarms = f"{row['false_alarms']} of {row['full_band']}" if row["full_band"] else ""
        if "false_alarms_95" in row:
            low, high = row["false_alarms_95"]
            alarms += f", 95 %: {100 * low:.1f} to {100 * high:.1f} %"
        answered = f"{row['answered']} of {row['muffled']}" if row["muffled"] else ""
        right = f"{row['within_half_octave']} of {row['answered']}" if row["answered"] else ""
        cells = (row["source"], row["kind"], alarms, row["treble_lost"], answered, right, median)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _recordings(folder: str, folds: list[int]) -> Iterable[np.ndarray]:
    """The clips of some folds of a folder, or of its held-out tenth where no fold is named."""
    for fold in folds or [None]:
        for path in AudioFolder(folder, "test", fold).paths:
            yield read_audio(path)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--data", default="", metavar="FOLDER", help="recordings, beside SoundWorld")
    parser.add_argument("--folds", type=whole(1), nargs="+", default=[],
                        help="of --data; a held-out tenth where left out")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="of SoundWorld")
    parser.add_argument("--clips", type=whole(1), default=160, help="of SoundWorld")
    parser.add_argument("--out", type=new_json, required=True, help="JSON")
    args = parser.parse_args()
    if args.folds and not args.data:
        raise UserError("--folds: needs --data FOLDER")

    if args.data:                                                  # before SoundWorld's minutes
        for fold in args.folds or [None]:
            AudioFolder(args.data, "test", fold)

    world = SoundWorld(args.split, args.clips)
    rows = score_clips(f"SoundWorld {args.split}", (world.wave(i) for i in range(args.clips)))
    if args.data:
        folds = f" folds {' '.join(map(str, args.folds))}" if args.folds else ""
        rows += score_clips(Path(args.data).resolve().name + folds, _recordings(args.data, args.folds))
    print(cutoff_table(rows))
    write_text(args.out, to_json({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_cli(main)
