"""Folders of recordings as data sets.

Data sets of captioned sound are published in half a dozen layouts. Each is turned into the same list of
entries (a file, its captions, whether it is held out); from there on there is one way for all, in stages:

    one file      audio_files.py: any wav, flac, ogg or mp3 -> (N,) float32, mono, 16 kHz
    layouts       VCTK | class folders | a table (caption_tables.py), its files found by name -> entries
    a data set    AudioFolder: entries -> the clips of a split, and `prepare`: all of them decoded
    decoding      16-bit samples of all clips in the cache, one after the other
    mixtures      Mixed: several data sets as one, drawn by weight

Files come from elsewhere, so nothing that a header, a table or a link says is believed: a UserError names the
file or the row, and no file outside of the folder is opened.

Public: LONGEST_CAPTION, AudioFolder, Mixed, folders_of.
"""
from __future__ import annotations

import collections
import functools
import os
import unicodedata
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parts.audio import RATE, without_rumble
from parts.audio_files import AUDIO_TYPES, open_sound, read_audio
from parts.cache import cache_dir, chunk_of, digest, fill_array
from parts.caption_tables import (
    FILE_COLUMNS,
    caption_columns,
    find_column,
    find_metadata,
    listed,
    read_rows,
    refuse_other_tables,
    rows_of_split,
    split_named,
)
from parts.errors import UserError, printable

LONGEST_CAPTION = 500  # characters
OTHER_AUDIO = (".m4a", ".aac", ".opus", ".oga", ".aif", ".aiff", ".aifc", ".au", ".w64", ".wv", ".ape",
               ".wma", ".mp2", ".mp4", ".mka", ".webm", ".caf", ".amr")


# --- layouts: a folder -> entries -----------------------------------------------------------------------

@dataclass
class _Entry:
    """One row of a data set: its file, how the row is called, its captions, whether it is held out (None: by
    hash), and why it can't be used."""
    path: Path | None
    name: str
    captions: list[str]
    held_out: bool | None = None
    bad: str = ""


def _clean(caption: str) -> str:
    """Fit for a line of the terminal; class names have underscores."""
    return " ".join(printable(caption.replace("_", " ")).split())


def _read_layout(folder: Path, split: str, val_fold: int | None) -> tuple[list[_Entry], Path]:
    """-> (all entries of a folder, the table or folder that they were read from), by the layout that is there
    (AudioFolder)."""
    root = _vctk_root(folder)
    meta, is_own = (None, False) if root is not None else find_metadata(folder, split)
    if meta is None and val_fold is not None:
        raise UserError(f"{folder}: --val-fold {val_fold} needs a table with a column 'fold' (metadata.csv)")
    if root is not None:
        return _vctk(folder, root), folder
    if meta is None:
        return _class_folders(folder), folder
    return _table_entries(folder, meta, split, is_own, val_fold), meta


def _visible(folder: Path) -> list[Path]:
    """All files and folders under a folder, in order, but for hidden ones; links are not followed."""
    found = []
    for path in listed(folder):
        found.append(path)
        if path.is_dir() and not path.is_symlink():
            found += _visible(path)
    return found


def _audio_files(paths: list[Path]) -> list[Path]:
    return [path for path in paths if path.suffix.lower() in AUDIO_TYPES and path.is_file()]


def _note_of_other_kinds(folder: Path) -> list[str]:
    """What to say of sound files that are not read, where the names of folders are the captions."""
    kinds = collections.Counter()
    for path in _visible(folder):
        if path.suffix.lower() in OTHER_AUDIO:
            kinds[path.suffix.lower()] += 1
        elif path.suffix.lower() in AUDIO_TYPES and path.is_symlink() and not path.exists():
            kinds["links that lead nowhere"] += 1
    if not kinds:
        return []
    named = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
    return [f"{folder}: left out: {named}; read are {', '.join(AUDIO_TYPES)}: convert them, or fetch them"]


def _vctk_root(folder: Path) -> Path | None:
    for name in ("wav48_silence_trimmed", "wav48"):
        if (folder / name).is_dir():
            return folder / name
    return None


def _vctk(folder: Path, root: Path) -> list[_Entry]:
    """VCTK: wav48_silence_trimmed/p225/p225_001_mic1.flac (or wav48/p225/p225_001.wav) and
    txt/p225/p225_001.txt. Held out: the last 8 of 108 speakers, without p280 and p315 (NU-Wave2's split); of
    fewer speakers, the same share."""
    speakers = [path for path in listed(root) if path.is_dir() and path.name not in ("p280", "p315")]
    if len(speakers) < 2:
        raise UserError(f"{root}: fewer than two speakers; one must be held out")
    held_out = set(speakers[-max(1, round(8 / 108 * len(speakers))):])

    entries = []
    for speaker in speakers:
        for path in _audio_files(_visible(speaker)):
            if path.stem.endswith("_mic2"):
                continue
            text = folder / "txt" / speaker.name / f"{path.stem.removesuffix('_mic1')}.txt"
            said = _clean(text.read_text(encoding="utf-8", errors="replace")) if text.is_file() else ""
            entries.append(_Entry(path, path.name, [said or "speech"], speaker in held_out))
    return entries


def _class_folders(folder: Path) -> list[_Entry]:
    """FOLDER/CLASS/FILE without metadata: the class is the caption. (train/CLASS/FILE, test/CLASS/FILE: with
    these splits.) Without classes, FOLDER/FILE or train/FILE and test/FILE, captions are empty. UserError
    where there is a table after all, or a folder is a link."""
    paths = _visible(folder)
    refuse_other_tables(paths)
    for path in paths:
        if path.is_symlink() and path.is_dir():
            raise UserError(f"{path}: a link to a folder, which is not followed; copy the folder here, or "
                            "take the link out")
    places = {path: path.relative_to(folder).parts[:-1] for path in _audio_files(paths)}   # folders of each
    without_class = not any(places.values())
    # A class may be called `train`: it is a split where a folder of another split is beside it.
    top = {folders[0].lower() for folders in places.values() if folders}
    are_splits = len(top) > 1 and all(split_named({name}) for name in top)

    entries = []
    for path, folders in places.items():
        if not folders and not without_class:
            why = "lies beside the folders that name the classes; move it into one"
            entries.append(_Entry(path, str(path), [], bad=why))
            continue
        split = split_named({folders[0].lower()}) if folders else None
        in_split = split is not None and (are_splits or len(folders) > 1)
        classes = folders[1:] if in_split else folders
        caption = (_clean(classes[-1]) or "sound") if classes else ""
        held_out = split != "train" if in_split else None
        entries.append(_Entry(path, str(path.relative_to(folder)), [caption], held_out))
    return entries


def _table_entries(folder: Path, meta: Path, split: str, is_own: bool, val_fold: int | None) -> list[_Entry]:
    """Rows of a metadata file -> entries; a column 'split' may drop some. is_own: the whole file is of this
    split; else it says what is held out by fold or by a column 'split', or not at all."""
    rows = read_rows(meta)
    wordings = caption_columns(meta, rows[0])
    file = find_column(meta, rows[0], FILE_COLUMNS)
    if val_fold is not None and "fold" not in rows[0]:
        raise UserError(f"{meta}: --val-fold needs a column 'fold'")
    if val_fold is not None:
        held_out = [_fold(meta, row) == str(val_fold) for row in rows]
    elif is_own:
        held_out = [split != "train"] * len(rows)
    elif "split" in rows[0]:
        rows, held_out = rows_of_split(meta, rows, split)
    else:
        held_out = [None] * len(rows)

    finder = _FileFinder(folder)
    entries = []
    for row, is_held_out in zip(rows, held_out):
        place = f"{meta}, row {row['#']}"
        captions = [_clean(text) for column in wordings for text in _texts(row.get(column))]
        captions = [caption for caption in captions if caption]
        name = str(row.get(file) or "").strip()
        path = finder.find(name, row, meta) if name else None

        bad = ""
        if not name:
            bad = f"empty {file}"
        elif not captions:
            bad = f"empty {wordings[0]}"
        elif path is None:
            bad = f"no audio file for {name!r} (looked in {folder} and its subfolders)"
            if Path(name).suffix.lower() in OTHER_AUDIO:
                bad = f"{name!r} is not of a kind that is read ({', '.join(AUDIO_TYPES)}); convert it"
        entries.append(_Entry(path, place, captions, is_held_out, bad))
    return entries


def _texts(cell) -> list[str]:
    """The texts of a cell; jsonl may hold a list of them."""
    return [text for text in (cell if isinstance(cell, list) else [cell]) if isinstance(text, str)]


def _fold(meta: Path, row: dict) -> str:
    """The fold that a row says; UserError where it says none."""
    value = row.get("fold")
    fold = "" if value is None else str(value).strip().removesuffix(".0")  # jsonl may hold 1.0
    if not fold:
        raise UserError(f"{meta}, row {row['#']}: empty fold; fill it in or remove the row")
    return fold


class _FileFinder:
    """Finds the audio file that a row of a table names: as written, beside the metadata, in the folder or in
    its audio/; else anywhere, if what the row says (its folders too, where it names some) ends the path of
    one file alone."""

    def __init__(self, folder: Path):
        self.folder = folder

    @functools.cached_property
    def by_name(self) -> dict[str, list[Path]]:
        """Every audio file of the folder by its name, with and without the extension: walked only where a row
        does not say where its file is."""
        files = {}
        for path in _audio_files(_visible(self.folder)):
            for name in (path.stem, path.name):
                files.setdefault(_composed(name), []).append(path)
        return files

    def find(self, name: str, row: dict, meta: Path) -> Path | None:
        """The file of a row, or None. UserError where several could be meant."""
        # As written; and with the other slashes, for a table from Windows.
        for spelling in dict.fromkeys((name, name.replace("\\", "/"))):
            for folder in (meta.parent, self.folder, self.folder / "audio"):
                path = folder / spelling
                try:
                    if path.is_file() and path.suffix.lower() in AUDIO_TYPES:
                        return path
                except (ValueError, OSError):  # a name with a zero byte, or of a thousand letters
                    continue
        name = name.replace("\\", "/")
        for known in _audiocaps_names(name, row, meta) if "youtube_id" in row else [name]:
            *folders, last = map(_composed, Path(known).parts or [""])
            found = [path for path in self.by_name.get(last, ())
                     if list(map(_composed, path.parts[-1 - len(folders) : -1])) == folders]
            if len(found) > 1:
                places = " and ".join(str(path.relative_to(self.folder)) for path in found[:2])
                raise UserError(f"{meta}, row {row['#']}: {name!r} may be {places}; write the folder too")
            if found:
                return found[0]
        return None


def _composed(name: str) -> str:
    """A name with its accents as parts of their letters (NFC): some systems write them apart (NFD)."""
    return unicodedata.normalize("NFC", name)


def _audiocaps_names(name: str, row: dict, meta: Path) -> list[str]:
    """What the clip of an AudioCaps row may be called. The table names no extension, and downloaders write
    ID, YID, ID_30, ID_30.000, ID_30000, ID_30_40 ... (start, or start and end ten seconds later, in s or
    ms)."""
    try:
        start = float(row.get("start_time") or 0)
    except (ValueError, TypeError):  # jsonl may hold a list
        raise UserError(f"{meta}, row {row['#']}: start_time {row['start_time']!r} is no number") from None
    end = start + 10
    times = [f"{start:g}", f"{start:.1f}", f"{start:.3f}", f"{1e3 * start:.0f}", f"{start:g}_{end:g}",
             f"{start:.3f}_{end:.3f}", f"{1e3 * start:.0f}_{1e3 * end:.0f}"]
    endings = [*(f"_{time}" for time in times), ""]
    names = [f"{prefix}{name}{ending}" for prefix in ("", "Y") for ending in endings]
    return [*names, str(row.get("audiocap_id") or name)]


# --- a data set: entries -> the clips of a split --------------------------------------------------------

class AudioFolder:
    """A folder of captioned recordings. Layouts, told apart by what is there:

    audiofolder   metadata.csv | metadata.jsonl with file_name and caption | text, for all (a column `split`
                  may say which are held out) or one a split; without, FOLDER/CLASS/FILE, or FOLDER/FILE,
                  whose captions are empty
    AudioCaps     csv with youtube_id, start_time, caption; clips named ID, YID, ID_START ..., any extension;
                  train.csv, val.csv, test.csv
    Clotho        csv with file_name, caption_1 ... caption_5, one a split
    ESC-50        csv with filename, category, fold; files in audio/
    VCTK          wav48_silence_trimmed/ or wav48/, txt/

    Several rows of one file, and columns caption_1 ..., are several wordings. val_fold: rows with that `fold`
    are the validation split; where nothing says which clips are held out, a tenth of the *files* is, by a
    hash of the name (where several files are cuts of one recording, as in ESC-50, use the fold: the hash
    would put siblings on both sides).

    Rows whose file is missing or whose caption is empty, and files that can't be decoded (known once
    `prepare` has tried), are left out and listed in `bad`, up to the share max_bad_share of the rows, or of
    the split's files; more are a UserError. `notes` says what else was mended. A path that leads out of the
    folder is always an error.

    It has the interface of every data set: see parts/preparation.py."""
    version = 4  # raise when decoding changes: the cache is keyed by it

    def __init__(self, folder: str | Path, split: str = "train", val_fold: int | None = None,
                 max_bad_share: float = 0.0):
        self.folder = Path(os.path.expanduser(folder))
        self.split = split
        self.max_bad_share = max_bad_share
        self.notes = []
        self._waves = None  # int16 memory map of all samples, once prepared
        self._spans = None  # (first, last + 1) of each clip in it
        if not self.folder.is_dir():
            raise UserError(f"--data {folder}: no such folder")
        entries, source = _read_layout(self.folder, split, val_fold)
        if not entries:
            raise UserError(f"{self.folder}: holds neither a table of captions nor a file that can be read "
                            f"({', '.join(AUDIO_TYPES)})")

        if source == self.folder and split == "train":
            self.notes += _note_of_other_kinds(self.folder)

        # No way out of the folder, and no more bad rows than are allowed.
        root = self.folder.resolve()
        written = {}  # a file's own place -> how it is written first: a/0.wav, a/../a/0.wav, a link to it
        for entry in entries:
            if entry.path is None:
                continue
            place = entry.path.resolve()
            if not place.is_relative_to(root):
                raise UserError(f"{entry.name}: leads to {place}, outside of {self.folder}; "
                                "copy the file into the folder")
            entry.path = written.setdefault(place, entry.path)     # one file is one clip
        places = {path: place for place, path in written.items()}
        bad = [f"{entry.name}: {entry.bad}" for entry in entries if entry.bad]
        self.bad = self._allowed(bad, len(entries))

        # The clips of this split, and the name of their cache: it changes with any of the files.
        clips = self._clips_of_split([entry for entry in entries if not entry.bad])
        if not clips:
            fold = f" (no row has fold {val_fold})" if val_fold is not None else ""
            raise UserError(f"{source}: no clips in the {split} split{fold}")
        self.paths = list(clips)
        self.captions = list(clips.values())
        stats = [(path, path.stat()) for path in self.paths]
        files = [(places[path], stat.st_size, stat.st_mtime_ns) for path, stat in stats]
        self.key = "folder-" + digest(self.version, root, split, *files)
        self.files = {path for path, _, _ in files}

        # What it is, wherever it lies: a run that goes on must find what it was trained on.
        inside = [(path.relative_to(root).as_posix(), size) for path, size, _ in files]
        self.contents = digest(*sorted(zip(inside, self.captions)))

    def _allowed(self, bad: list[str], of: int) -> list[str]:
        """`bad` again, or a UserError where it is more than is allowed."""
        if len(bad) > self.max_bad_share * of:
            share = ""
            if self.max_bad_share or len(bad) > 1:
                share = (f"; {len(bad)} of {of} can't be used, the share {self.max_bad_share:g} may be left "
                         "out (--max-bad-share)")
            raise UserError(bad[0] + share)
        return bad

    def _clips_of_split(self, entries: list[_Entry]) -> dict[Path, list[str]]:
        """{file: its wordings} of this split, in the order of the entries; adds to `notes`."""
        # Where nothing says which files are held out: a tenth of them, at least one. Files of one name in
        # several folders have one hash; their places decide, or each process would split differently.
        hashes = {entry.path: zlib.crc32(entry.path.name.encode(errors="replace")) for entry in entries}
        by_hash = sorted(hashes, key=lambda path: (hashes[path], os.path.relpath(path, self.folder)))
        tenth = set(by_hash[: max(1, len(by_hash) // 10)])

        clips: dict[Path, dict[str, None]] = {}  # captions as keys: each counts once, in their order
        double = long = 0
        for entry in entries:
            held_out = entry.path in tenth if entry.held_out is None else entry.held_out
            if held_out != (self.split != "train"):
                continue
            known = clips.setdefault(entry.path, {})
            for caption in entry.captions:
                cut = caption[:LONGEST_CAPTION]
                double += cut in known
                long += cut != caption
                known[cut] = None
        if double:
            self.notes.append(f"{self.split}: {double} captions stand twice beside the same file and count "
                              "once")
        if long:
            self.notes.append(f"{self.split}: {long} captions are longer than {LONGEST_CAPTION} characters "
                              "and are cut there")
        return {path: list(known) for path, known in clips.items()}

    def __len__(self) -> int:
        """Clips that can be used: before `prepare`, as far as the metadata tell."""
        return len(self.paths)

    def __getstate__(self):
        # Workers map the cache themselves: pickling would copy all the audio.
        return {**self.__dict__, "_waves": None}

    def name(self, i: int) -> str:
        return printable(str(self.paths[i]))

    def wordings(self, i: int) -> int:
        """How many captions clip i has."""
        return len(self.captions[i])

    def caption(self, i: int, k: int = 0) -> str:
        """Wording k of clip i, modulo the number that it has."""
        return self.captions[i][k % len(self.captions[i])]

    def lengths(self) -> list[int]:
        """Samples of each clip at 16 kHz."""
        self.prepare()
        return [stop - start for start, stop in self._spans]

    def wave(self, i: int) -> np.ndarray:
        """Clip i, (N,) float32 in [-1, 1]."""
        self.prepare()
        start, stop = self._spans[i]
        return self._waves[start:stop].astype(np.float32) / 32_767

    def prepare(self, workers: int | None = None) -> AudioFolder:
        """Decode every file once to 16 kHz mono 16-bit in the cache (32 kB a second of audio); leave out
        those that can't be. UserError where those are more than is allowed, or all."""
        if self._waves is None:  # wave() calls this too
            if self._spans is None:  # set where a worker process got this object
                self._decode(workers)
            self._waves = np.load(cache_dir() / self.key / "waves.npy", mmap_mode="r")
        return self

    def _decode(self, workers: int | None, again: bool = False) -> None:
        """Fill the cache, and drop the clips that could not be read. again: some of them can be, by now."""
        folder = cache_dir() / self.key
        n = len(self.paths)
        measured = fill_array(folder, "lengths", (n, 2), np.int64, _measure_chunk, n, (self.paths,),
                              workers=workers, desc="reading lengths")
        lengths, rates = measured.T
        where = np.concatenate([[0], np.cumsum(lengths)])          # clip i owns where[i]:where[i + 1]
        waves = fill_array(folder, "waves", (where[-1],), np.int16, _decode_chunk, n,
                           (self.paths, lengths.tolist()), chunk_of(lengths), workers,
                           f"decoding {self.split}", where)

        # What can be read by now (the system may have refused it) makes it another set, with its own cache.
        good = [i for i in range(n) if rates[i] and waves[where[i]] != UNREADABLE]
        why = {self.paths[i]: _why_unreadable(self.paths[i]) for i in sorted({*range(n)} - {*good})}
        mended = [path for path, reason in why.items() if not reason]
        if mended and not again:
            self.key = f"{self.key}-{digest(*mended)}"
            return self._decode(workers, again=True)
        once = f"could not be read when it was decoded; remove {folder} to try again"
        self.bad += self._allowed([reason or f"{path}: {once}" for path, reason in why.items()], n)
        if not good:
            raise UserError(f"{self.folder}: none of the {n} files of the {self.split} split can be read")
        low = [rates[i] for i in good if rates[i] < RATE]
        if low:
            self.notes.append(f"{self.split}: {len(low)} of {len(good)} files are sampled at less than "
                              f"{RATE // 1000} kHz (down to {min(low)} Hz) and hold nothing above half of "
                              "that")
        self.paths = [self.paths[i] for i in good]
        self.captions = [self.captions[i] for i in good]
        self._spans = [(int(where[i]), int(where[i + 1])) for i in good]


# --- decoding: what a worker process does for the cache -------------------------------------------------

UNREADABLE = -32_768  # in place of a clip's samples, which are from -32,767 to 32,767


def _measure_chunk(indices, paths) -> np.ndarray:
    """(n, 2): lengths of files at 16 kHz and their own rates (Hz), by their headers; an unreadable one gets
    the one sample that says so, and 0 Hz."""
    measured = []
    for i in indices:
        try:
            with open_sound(paths[i]) as sound:
                length = max(1, -(-sound.frames * RATE // sound.samplerate))       # rounded up
                measured.append((length, sound.samplerate))
        except UserError:
            measured.append((1, 0))
    return np.asarray(measured)


def _decode_chunk(indices, paths, lengths) -> np.ndarray:
    """Samples of files, int16, one after the other: exactly lengths[i] of file i. Louder sounds are scaled
    down, never clipped."""
    pieces = []
    for i in indices:
        try:
            x = without_rumble(read_audio(paths[i]))
        except UserError:
            pieces.append(np.full(lengths[i], UNREADABLE, np.int16))
            continue
        x = np.pad(x, (0, max(0, lengths[i] - len(x))))[: lengths[i]]  # mp3 headers may be off by a frame
        pieces.append(np.round(x / max(1, np.abs(x).max()) * 32_767).astype(np.int16))
    return np.concatenate(pieces)


def _why_unreadable(path: Path) -> str:
    """'' where it can be read now: changed meanwhile, without a new time of change."""
    try:
        read_audio(path)
    except UserError as e:
        return str(e)
    return ""


# --- mixtures -------------------------------------------------------------------------------------------

class Mixed:
    """Several data sets as one: part k gives the share weights[k] of the clips that training draws, whatever
    its size. Clips of the parts take turns, so that the first n of a validation set are of all kinds."""

    def __init__(self, parts: list, weights: list[float]):
        self.parts = parts
        self.weights = weights
        self.key = ""      # as all below: see _arrange
        self.files = set().union(*(part.files for part in parts))
        self.contents = digest(*(part.contents for part in parts))
        self.index = []    # clip i of the mixture -> (k, j): clip j of part k
        self.p = None      # (n,), draw_batch's probability of each clip
        self.bad = []
        self.notes = []
        self._arrange()

    def _arrange(self) -> None:
        """All that depends on which clips the parts have."""
        self.key = "mixed-" + digest(*(part.key for part in self.parts))

        # Clip j of n stands at j / n of the way, whatever its part.
        turns = [(j / len(part), k, j) for k, part in enumerate(self.parts) for j in range(len(part))]
        self.index = [(k, j) for _, k, j in sorted(turns)]

        # p of a clip: the share of its part, divided by the clips of the part.
        share = np.array(self.weights, float) / sum(self.weights)
        p = np.array([share[k] / len(self.parts[k]) for k, _ in self.index])
        self.p = p / p.sum()

        self.bad = [row for part in self.parts for row in getattr(part, "bad", [])]
        self.notes = [note for part in self.parts for note in getattr(part, "notes", [])]

    def __len__(self) -> int:
        return len(self.index)

    def name(self, i: int) -> str:
        k, j = self.index[i]
        return self.parts[k].name(j)

    def wave(self, i: int) -> np.ndarray:
        k, j = self.index[i]
        return self.parts[k].wave(j)

    def caption(self, i: int, wording: int = 0) -> str:
        k, j = self.index[i]
        return self.parts[k].caption(j, wording)

    def wordings(self, i: int) -> int:
        k, j = self.index[i]
        return self.parts[k].wordings(j)

    def lengths(self) -> list[int]:
        lengths = [part.lengths() for part in self.parts]
        return [lengths[k][j] for k, j in self.index]

    def prepare(self, workers: int | None = None) -> Mixed:
        for part in self.parts:
            part.prepare(workers)
        self._arrange()  # without what can't be read
        return self


def folders_of(clips) -> list[AudioFolder]:
    """The folders of recordings that a data set is made of: none of SoundWorld."""
    return [part for part in getattr(clips, "parts", [clips]) if isinstance(part, AudioFolder)]
