"""From settings to latents: which clips a run is trained on, and all of them encoded once.

    `--data` --open_data--> clips --codec--> latents of each, band-limited versions beside them for
    super-resolution
                                  --teacher--> features phi that guidance aligns with
                            captions --words--> token ids

A data set is any object with: `key` (a string that changes when the data changes or lies elsewhere),
`contents` (one that changes with the data alone), `files` (the set of its files, empty where there are none),
`len(d)`, `wave(i) -> (N,) float32`, `wordings(i)` (how many captions clip i has), `caption(i, k=0) -> str`,
`name(i)`, `lengths() -> list of N`, and `prepare()` (make its cache, with a progress bar); and, if there is
any, `p` (n,), the probability of each clip, and `bad` and `notes`, lines for bad.txt and to be printed.
SoundWorld, AudioFolder and Mixed are three of them.

Public: open_data, open_set, TrainingData, prepare.
"""
from __future__ import annotations

import itertools
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from parts.audio import ACTIVE_RMS, CLIP_S, RATE, at_level
from parts.cache import cache_dir
from parts.checkpoints import load_weights
from parts.components import beside_model, open_codec, open_teacher, open_text
from parts.config import NO_FOLD, Config, save_config
from parts.devices import RANK
from parts.errors import UserError, printable
from parts.files import write_text
from parts.latents import LatentCache
from parts.pretrained_judges import open_judges
from parts.recordings import AudioFolder, Mixed, folders_of
from parts.soundworld import SoundWorld
from parts.teacher import TeacherFeatures, feature_mean
from parts.text import Words

# --- clips ----------------------------------------------------------------------------------------------

def named_sets(data: str) -> list[tuple[str, ...]]:
    """The data sets of a setting: [(name,)] of one, which may have = in its name where it is a folder,
    [(name, weight as typed), ...] of a mixture."""
    if "=" not in data or Path(data).is_dir():
        return [(data,)]
    return [tuple(part.strip().rpartition("=")[::2]) for part in data.split(",")]


def open_data(data: str, split: str, n: int = 0, val_fold: int | None = None, seconds: float = CLIP_S,
              max_bad_share: float = 0.0):
    """`soundworld`, the path of a folder, or several of them as NAME=WEIGHT,NAME=WEIGHT -> a data set.
    UserError for a mixture or a folder that can't be read."""
    if data == "soundworld":
        return SoundWorld(split, n, seconds=seconds)
    if len(named_sets(data)[0]) == 1:
        return AudioFolder(data, split, None if val_fold == NO_FOLD else val_fold, max_bad_share)
    names, weights = zip(*named_sets(data))
    try:
        weights = [float(weight) for weight in weights]
        if not all(names) or not 0 < min(weights) <= max(weights) < float("inf"):
            raise ValueError
    except ValueError:
        raise UserError(f"--data {data}: a mixture reads NAME=WEIGHT,NAME=WEIGHT with positive "
                        "weights") from None
    folds = [None if name == "soundworld" else val_fold for name in names]
    sets = [open_data(name, split, n, fold, seconds, max_bad_share) for name, fold in zip(names, folds)]
    return Mixed(sets, weights)


def open_set(config: dict, split: str, n: int = 0):
    """A split of the data that a run was trained on (config: its settings), prepared."""
    bad_share = config.get("max_bad_share", 0.0)
    return open_data(config["data"], split, n, config["val_fold"], config["seconds"], bad_share).prepare()


# --- all that a run needs -------------------------------------------------------------------------------

@dataclass
class TrainingData:
    """The clips of a run, encoded."""
    train_set: object
    val_set: object
    codec: object
    words: object                      # text encoder; None for super-resolution
    T: int                             # tokens of a crop
    latents: LatentCache
    muffled: LatentCache | None        # band-limited versions, for super-resolution
    val_latents: LatentCache
    val_muffled: LatentCache | None
    token_ids: list                    # of each training clip's wordings
    val_token_ids: list
    extract: TeacherFeatures | None    # latents -> phi (B, T, F); None where no teacher is used
    phi_mean: Tensor | None            # (F,), its data-set mean
    phi: LatentCache | None            # phi of the training clips, where guidance may need it


def prepare(cfg: Config, probing: bool, checkpoint: dict | None, resume: str, claim) -> TrainingData:
    """Open codec, text encoder and teacher; open, encode and cache all clips.

    probing: D will be measured, in features of the teacher. checkpoint, resume: what to go on from.
    claim(folder): from now on no other process may train there. UserError where a part or the data can't be
    used; a folder just claimed is then removed."""
    # Parts that may be missing come first: that should cost nobody the minutes of preparation. (The judges of
    # the final table are opened again at its end.)
    options = cfg.device, cfg.trust_remote_code, cfg.allow_pickle
    open_judges(cfg.clap, cfg.audio_model, *options[1:])
    codec = open_codec(asdict(cfg), *options)
    cfg.channels = codec.channels                          # a neural codec may have fewer
    pretrained_text = cfg.task == "t2a" and cfg.text != "words"
    words = open_text(asdict(cfg), [], *options) if pretrained_text else None
    teacher = open_teacher(cfg) if cfg.guidance != "off" or probing else None
    print(f"cache: {cache_dir()} (safe to delete at any time)")
    sets = [open_data(cfg.data, split, n, cfg.val_fold, cfg.seconds, cfg.max_bad_share)
            for split, n in (("train", cfg.clips), ("val", 256))]
    _refuse_other_clips(cfg.data, *sets, checkpoint, resume)
    if not resume:
        _refuse_folders(cfg, sets)

    # The name is taken before the minutes of preparation, and what dies in them can be resumed.
    out, claimed = Path(cfg.out), RANK == 0 and not resume
    (out / "samples").mkdir(parents=True, exist_ok=True)
    if claimed:
        claim(out)
        save_config(out, cfg)
    try:
        return _encode(cfg, sets, codec, words, teacher, checkpoint, resume)
    except (UserError, OSError):  # too many files that can't be read, a few seconds of sound, a full disk
        if claimed:
            _remove(out)
        raise


def _refuse_other_clips(name: str, train_set, val_set, checkpoint: dict | None, resume: str) -> None:
    """UserError where a clip is in both splits, or where a run would go on with other clips than it began
    with."""
    both = sorted(train_set.files & val_set.files)
    if both:
        raise UserError(f"--data {name}: {len(both)} files are in the training and in the validation split, "
                        f"such as {both[0]}; what is trained on can't validate: list each in one of them")
    if checkpoint and checkpoint.get("data", train_set.contents) != train_set.contents:
        raise UserError(f"--resume {resume}: the training clips of {name} are not those that it was trained "
                        "on (names, sizes or captions differ); bring them back, or begin a new run")


def _refuse_folders(cfg: Config, sets: list) -> None:
    """UserError where captions are needed and there are none, or where the run's own files would come into a
    folder of recordings, which would then be another data set."""
    for folder in itertools.chain(*map(folders_of, sets)):
        bare = next((i for i, captions in enumerate(folder.captions) if not any(captions)), None)
        if cfg.task == "t2a" and bare is not None:
            raise UserError(f"{folder.name(bare)}: nothing says what it is; captions come from "
                            "metadata.csv or metadata.jsonl with columns file_name and caption, or from "
                            "folders that name classes (--task sr needs none)")
        if Path(cfg.out).resolve().is_relative_to(folder.folder.resolve()):
            raise UserError(f"--out {cfg.out}: lies in the folder of recordings {folder.folder}; name a "
                            "folder outside of it")


def _encode(cfg: Config, sets: list, codec, words, teacher, checkpoint: dict | None,
            resume: str) -> TrainingData:
    """sets: of training and of validation clips, which are rendered or read here."""
    workers = None if cfg.workers < 0 else cfg.workers
    for clips in sets:  # several processes wait for the one that fills a cache
        clips.prepare(workers)
    _say_what_is_left_out(sets, Path(cfg.out))
    train_set, val_set = sets

    # The latent space: that of the checkpoint, or a fitted one.
    if checkpoint:
        load_weights(resume, codec, checkpoint["codec"])
    else:
        fit_codec(codec, train_set, cfg)
        print(f"codec {cfg.codec}: {cfg.channels} components hold {100 * codec.explained:.1f} % of the "
              f"variance; {codec.rate:g} tokens a second")
    latents, val_latents = LatentCache(train_set, codec), LatentCache(val_set, codec)

    # The condition: band-limited versions, or captions.
    muffled = val_muffled = None
    token_ids, val_token_ids = [], []
    if cfg.task == "sr":
        muffled = LatentCache(train_set, codec, cfg.variants, workers)
        val_muffled = LatentCache(val_set, codec, cfg.variants, workers)
    else:
        if cfg.data == "soundworld":
            # Captions of one event are learned long before those of three: results/log.md.    # ASSUMED
            latents.p = train_set.p_by_events()
        captions = [[train_set.caption(i, k) for k in range(train_set.wordings(i))]
                    for i in range(len(train_set))]
        if words is None:
            words = Words(checkpoint["words"]) if checkpoint else Words.fit(itertools.chain(*captions))
            if not words.words:
                raise UserError(f"--data {cfg.data}: no training clip's caption holds a word, of letters or "
                                "digits; write what is heard")
        token_ids = words.cache(captions)
        val_token_ids = words.cache([[val_set.caption(i)] for i in range(len(val_set))])

    # What guidance aligns with, and what the regime is measured by.
    extract = phi = phi_mean = None
    if teacher is not None:
        extract = TeacherFeatures(codec, teacher)
        if cfg.device.startswith("cuda"):                          # seconds there, minutes on a CPU
            extract = extract.to(cfg.device)
        if cfg.guidance != "off":
            phi = LatentCache(train_set, extract)
        phi_mean = feature_mean(extract, latents, train_set, cfg.device)
        extract = extract.to(cfg.device)
    T = codec.tokens(round(cfg.seconds * RATE))
    codec = beside_model(codec, cfg.device)
    return TrainingData(train_set, val_set, codec, words, T, latents, muffled, val_latents, val_muffled,
                        token_ids, val_token_ids, extract, phi_mean, phi)


def _remove(out: Path) -> None:
    """A run folder that was just claimed; of a link, what it leads to is emptied."""
    if not out.is_symlink():
        shutil.rmtree(out)
        return
    for path in out.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def fit_codec(codec, train_set, cfg: Config) -> None:
    """Fit the codec on ten seconds of 500 random clips. UserError for too little sound."""
    some = np.random.default_rng(cfg.seed).permutation(len(train_set))[:500]
    clips = (train_set.wave(i)[: 10 * RATE] for i in some)
    # Super-resolution brings every recording to one level.
    codec.fit(at_level(x[None], ACTIVE_RMS)[0][0] if cfg.task == "sr" else x for x in clips)


def _say_what_is_left_out(sets: list, out: Path) -> None:
    """Print what each set left out or mended; list rows and files that can't be used in the run's bad.txt."""
    for clips in sets:
        for note in getattr(clips, "notes", []):
            print(f"note: {note}")
    bad = sorted({row for clips in sets for row in getattr(clips, "bad", [])})
    if bad and RANK == 0:
        write_text(out / "bad.txt", "\n".join(map(printable, bad)) + "\n")
        print(f"note: {len(bad)} rows or files can't be used and are left out; they are listed in "
              f"{out / 'bad.txt'}")
