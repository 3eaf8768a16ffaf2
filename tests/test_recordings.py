"""Claims about recordings: reading files, the layouts of known data sets, and mixtures."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from conftest import ROOT
from folders import captions_of, make_folder, nonempty, run_unprivileged, sine, write_tone

from data import draw_batch
from parts.audio import RATE
from parts.audio_files import read_audio
from parts.codec import Codec
from parts.errors import UserError
from parts.latents import LatentCache
from parts.preparation import open_data
from parts.recordings import AudioFolder, Mixed
from parts.soundworld import SoundWorld

# --- one file

@pytest.mark.parametrize("ext", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_any_format_rate_and_channel_count_becomes_16k_mono(tmp_path, ext, rate):
    x = sine(1.0, rate)
    soundfile.write(tmp_path / f"x.{ext}", np.stack([x, x], 1), rate)
    y = read_audio(tmp_path / f"x.{ext}")
    f = np.fft.rfftfreq(len(y), 1 / RATE)
    assert y.dtype == np.float32 and y.ndim == 1 and abs(len(y) - RATE) < 0.15 * RATE
    assert abs(f[np.abs(np.fft.rfft(y)).argmax()] - 440) < 3
    assert abs(np.std(y[2_000:14_000]) - 0.3 / np.sqrt(2)) < 0.02


@pytest.mark.parametrize("content", [b"", b"not audio at all", b"RIFF\x00\x00\x00\x00WAVEfmt "])
def test_broken_audio_is_refused_by_name(tmp_path, content):
    (tmp_path / "bad.wav").write_bytes(content)
    with pytest.raises(UserError, match="bad.wav"):
        read_audio(tmp_path / "bad.wav")
    with pytest.raises(UserError, match="no such file"):
        read_audio(tmp_path / "none.wav")


# --- layouts

def test_audiofolder_csv_and_jsonl_read_alike(tmp_path):
    names = [f"audio/{k}.flac" for k in range(12)]
    rows = [(name, f"sound, number {k}") for k, name in enumerate(names)]
    a = make_folder(tmp_path / "a", names, rows, ("file_name", "caption"))
    b = make_folder(tmp_path / "b", names, [], ("file_name", "text"))
    (b / "metadata.csv").unlink()
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (b / "metadata.jsonl").write_text("\n".join(lines))
    one, two = AudioFolder(a), AudioFolder(b)
    assert one.captions == two.captions and one.caption(0).startswith("sound, number")
    assert len(one) + len(AudioFolder(a, "val")) == 12
    one.prepare(workers=0)
    for i, path in enumerate(one.paths):
        reference = soundfile.read(path)[0]
        assert one.lengths()[i] == len(reference) and np.abs(one.wave(i) - reference).max() < 1e-4


def test_esc50_and_audiocaps_layouts_are_read_as_they_are_published(tmp_path):
    names = [f"audio/1-{k}.wav" for k in range(6)]
    rows = [(f"1-{k}.wav", 1 + k % 3, "sea_waves") for k in range(6)]
    esc = make_folder(tmp_path / "esc", names, rows, ("filename", "fold", "category"), "esc50.csv")
    held_out = AudioFolder(esc, "val", val_fold=2)
    assert len(held_out) == 2 and held_out.caption(0) == "sea waves"
    assert len(AudioFolder(esc, "train", val_fold=2)) == 4

    rows = [(1, "abc", 30, "a dog, barking"), (2, "def", 0, "rain"), (3, "def", 0, "heavy rain")]
    caps = make_folder(tmp_path / "caps", ["abc_30.wav", "def.wav"], rows,
                       ("audiocap_id", "youtube_id", "start_time", "caption"))
    sets = [AudioFolder(caps, split) for split in ("train", "val") if nonempty(caps, split)]
    found = sorted(caption for clips in sets for captions in clips.captions for caption in captions)
    assert found == ["a dog, barking", "heavy rain", "rain"]


@pytest.mark.parametrize("fold", [1, 1.0, "1", " 1", "1.0"])
def test_a_fold_is_a_number_however_it_is_written(tmp_path, fold):
    """And fold 0 is one of them."""
    names = [f"{k}.wav" for k in range(4)]
    folder = make_folder(tmp_path / "set", names, [], ("x",))
    (folder / "metadata.csv").unlink()
    rows = [{"file_name": name, "text": name, "fold": fold if k < 2 else 0} for k, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert list(captions_of(folder, "val", val_fold=1)) == names[:2]
    assert list(captions_of(folder, "val", val_fold=0)) == names[2:]
    with pytest.raises(UserError, match="no row has fold 2"):
        AudioFolder(folder, "val", val_fold=2)


def test_audiocaps_splits_and_the_names_that_downloaders_give(tmp_path):
    """train.csv, val.csv, test.csv; ID, YID, ID_START and ID_START_END in ms; several captions of one clip;
    missing clips only as allowed."""
    names = ["abc.wav", "Yd-_f.flac", "ghi_30.wav", "jkl_30000_40000.wav", "Ymno_30.000.wav", "v1.wav",
             "t1.wav"]
    make_folder(tmp_path, names, [], ("x",), "train.csv")

    def write_table(split, *rows):
        lines = [f"{k},{clip},30,{caption}" for k, clip, caption in rows]
        head = "audiocap_id,youtube_id,start_time,caption"
        (tmp_path / f"{split}.csv").write_text("\n".join([head, *lines]) + "\n")
    clips = ("abc", "d-_f", "ghi", "jkl", "mno", "gone")
    write_table("train", *((k, clip, f"sound {clip}") for k, clip in enumerate(clips)))
    write_table("val", (7, "v1", "one"), (8, "v1", "two"))
    write_table("test", (9, "t1", "three"))

    with pytest.raises(UserError, match="train.csv, row 7: no audio file for 'gone'"):
        AudioFolder(tmp_path)
    train = AudioFolder(tmp_path, max_bad_share=0.2)
    assert sorted(path.name for path in train.paths) == sorted(names[:5])
    assert len(train.bad) == 1 and "'gone'" in train.bad[0]
    with pytest.raises(UserError, match="1 of 6 can't be used, the share 0.1 may be left out"):
        AudioFolder(tmp_path, max_bad_share=0.1)
    assert captions_of(tmp_path, "val") == {"v1.wav": ["one", "two"]}
    assert captions_of(tmp_path, "test") == {"t1.wav": ["three"]}


def test_clotho_has_five_wordings_and_its_own_splits(tmp_path):
    head = "file_name," + ",".join(f"caption_{k}" for k in range(1, 6)) + "\n"
    for split, name in (("development", "Rain 1.wav"), ("validation", "Dog.wav")):
        make_folder(tmp_path, [f"{split}/{name}"], [], ("x",), f"clotho_captions_{split}.csv")
        (tmp_path / f"clotho_captions_{split}.csv").write_text(head + name + ",a,b,c,d,e\n")
    assert captions_of(tmp_path, "train") == {"Rain 1.wav": list("abcde")}
    val, test = captions_of(tmp_path, "val"), captions_of(tmp_path, "test")
    assert val == test == {"Dog.wav": list("abcde")}, "no test file: validation stands in"


def test_vctk_holds_out_the_last_speakers_and_two_are_left_out(tmp_path):
    root = tmp_path / "wav48_silence_trimmed"
    for k in [*range(225, 245), 280, 315]:
        for mic in (1, 2):
            write_tone(root / f"p{k}" / f"p{k}_001_mic{mic}.flac", 0.2, 48_000)
    (tmp_path / "txt" / "p225").mkdir(parents=True)
    (tmp_path / "txt" / "p225" / "p225_001.txt").write_text("Please call Stella.\n")
    train, test = captions_of(tmp_path, "train"), captions_of(tmp_path, "test")
    assert len(train) == 19 and list(test) == ["p244_001_mic1.flac"]
    assert not any(part in name for name in [*train, *test] for part in ("mic2", "p280", "p315"))
    assert train["p225_001_mic1.flac"] == ["Please call Stella."]
    assert train["p226_001_mic1.flac"] == ["speech"]


def test_audiofolders_with_one_metadata_file_a_split_or_none_at_all(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / "a").mkdir(exist_ok=True)
        make_folder(tmp_path / "a" / split, ["x.wav"], [("x.wav", f"of {split}")], ("file_name", "text"))
    assert captions_of(tmp_path / "a", "train") == {"x.wav": ["of train"]}
    assert captions_of(tmp_path / "a", "val") == {"x.wav": ["of validation"]}
    for name in ("train/sea_waves/1.wav", "train/dog/2.wav", "test/dog/3.wav"):
        write_tone(tmp_path / "b" / name)
    assert captions_of(tmp_path / "b", "train") == {"1.wav": ["sea waves"], "2.wav": ["dog"]}
    assert captions_of(tmp_path / "b", "val") == {"3.wav": ["dog"]}


# --- mixtures

def test_a_mixture_draws_its_parts_by_weight_whatever_their_size(tmp_path):
    """3 of 4 draws from 20 clips, 1 of 4 from 100; validation clips take turns; a single data set draws
    exactly as before."""
    names = [f"{k}.wav" for k in range(22)]
    rows = [(name, "a tone") for name in names]
    folder = make_folder(tmp_path / "own", names, rows, ("file_name", "caption"))
    mix = open_data(f"{folder}=3, soundworld=1", "train", 100)
    own = len(AudioFolder(folder))
    assert isinstance(mix, Mixed) and len(mix) == own + 100 and len(mix.lengths()) == len(mix)

    codec = Codec(8).fit(SoundWorld("val", 4).wave(i) for i in range(4))
    latents = LatentCache(mix.prepare(0), codec)
    batches = [draw_batch(latents, None, 64, 16, np.random.default_rng(k)) for k in range(40)]
    drawn = np.concatenate([batch["i"] for batch in batches])
    assert abs(np.mean([mix.index[i][0] == 0 for i in drawn]) - 0.75) < 0.03
    part, clip = mix.index[5]
    assert np.array_equal(mix.wave(5), mix.parts[part].wave(clip))
    assert mix.caption(0) in ("a tone", SoundWorld("train", 100).caption(0))
    assert {mix.index[i][0] for i in range(12)} == {0, 1}


SPLIT = """
import sys
from parts.recordings import AudioFolder
print(sorted(str(path) for path in AudioFolder(sys.argv[1], "val").paths))
"""


def test_the_held_out_tenth_is_the_same_in_every_process(tmp_path):
    """Files of one name in many folders: the order of a set, which Python draws anew for each process, does
    not decide."""
    for k in range(20):
        (tmp_path / f"class{k}").mkdir()
        (tmp_path / f"class{k}" / "1.wav").touch()
    splits = set()
    for seed in ("1", "2", "3"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", SPLIT, str(tmp_path)], env=env, cwd=ROOT, text=True,
                              capture_output=True, check=True)
        splits.add(done.stdout)
    assert len(splits) == 1 and splits.pop().count("1.wav") == 2


def test_a_row_that_names_a_folder_matches_in_no_other(tmp_path):
    """cats/k.wav exist, dogs/ does not: rows of dogs have no file, and no clip gets their captions."""
    names = [f"cats/{k}.wav" for k in range(20)]
    rows = [(f"{kind}/{k}.wav", f"a {kind} number {k}") for kind in ("cats", "dogs") for k in range(20)]
    folder = make_folder(tmp_path / "set", names, rows, ("file_name", "caption"))
    with pytest.raises(UserError, match="no audio file for 'dogs/0.wav'.*20 of 40"):
        AudioFolder(folder)
    clips = AudioFolder(folder, max_bad_share=0.5)
    assert len(clips.bad) == 20
    assert all(len(captions) == 1 and captions[0].startswith("a cats") for captions in clips.captions)


def test_a_name_of_two_files_is_refused_with_both_places(tmp_path):
    names = [f"{kind}/{k}.wav" for kind in ("cats", "dogs") for k in range(10)]
    folder = make_folder(tmp_path / "set", names, [("0.wav", "who?")], ("file_name", "caption"))
    with pytest.raises(UserError, match=r"row 2: '0.wav' may be cats/0.wav and dogs/0.wav"):
        AudioFolder(folder)
    # Without its extension, and with the folder: another file's, or clear.
    rows = [("1", "no extension")]
    with pytest.raises(UserError, match="'1' may be"):
        AudioFolder(make_folder(tmp_path / "two", names, rows, ("file_name", "caption")))
    rows = [(f"dogs\\{k}.wav", "a dog") for k in range(10)]  # written on Windows
    clips = AudioFolder(make_folder(tmp_path / "three", names, rows, ("file_name", "caption")))
    assert {path.parent.name for path in clips.paths} == {"dogs"}


@pytest.mark.parametrize("layout", ["classes", "table", "vctk"])
def test_names_that_begin_with_a_dot_are_other_programs(tmp_path, layout):
    folder = tmp_path / "set"
    for k in range(12):
        kind = "dog" if k % 2 else "cat"
        place = {"classes": kind, "table": kind, "vctk": f"wav48/p{k % 3}"}[layout]
        write_tone(folder / place / f"{k}.wav")
        write_tone(folder / place / f"._{k}.wav")
        write_tone(folder / place / ".ipynb_checkpoints" / f"{k}.wav")
    write_tone(folder / ".Trash-1000" / "files" / "old.wav")
    write_tone(folder / "wav48" / ".cache" / "1.wav") if layout == "vctk" else None
    if layout == "table":
        lines = ["file_name,caption", *(f"{k}.wav,x" for k in range(12))]
        (folder / "metadata.csv").write_text("\n".join(lines))
        (folder / "._metadata.csv").write_bytes(b"\0\5\7")
    clips = [AudioFolder(folder, split) for split in ("train", "val")]
    paths = [path for one in clips for path in one.paths]
    assert len(paths) == 12
    assert not any(part.startswith(".") for path in paths for part in path.relative_to(folder).parts)


def test_a_start_time_that_is_no_number_is_refused_with_its_row(tmp_path):
    write_tone(tmp_path / "x.wav")
    for start in ('"soon"', "[1]"):
        row = '{"youtube_id": "x", "start_time": %s, "caption": "a tone"}' % start
        (tmp_path / "metadata.jsonl").write_text(row + "\n")
        with pytest.raises(UserError, match="row 1: start_time .* is no number"):
            AudioFolder(tmp_path, "train")


def test_a_table_that_is_not_read_is_refused_before_names_of_folders_become_captions(tmp_path):
    for k in range(3):
        write_tone(tmp_path / "audio" / f"{k}.wav", 0.3)
    (tmp_path / "metadata.tsv").write_text("file\tcaption\n")
    with pytest.raises(UserError, match="metadata.tsv: not where a table of captions is looked for"):
        AudioFolder(tmp_path)


def test_files_beside_class_folders_count_as_bad_and_a_fold_needs_a_table(tmp_path):
    for k in range(3):
        write_tone(tmp_path / "dog" / f"{k}.wav", 0.3)
    write_tone(tmp_path / "loose.wav", 0.3)
    with pytest.raises(UserError, match="loose.wav: lies beside the folders"):
        AudioFolder(tmp_path)
    assert len(AudioFolder(tmp_path, max_bad_share=0.5).bad) == 1
    with pytest.raises(UserError, match="--val-fold 5 needs a table"):
        AudioFolder(tmp_path, "val", 5, max_bad_share=0.5)


# --- what can't be read

@pytest.mark.parametrize("layout", ["classes", "table", "tables"])
def test_a_folder_that_cannot_be_listed_is_named_and_does_not_vanish(tmp_path, layout):
    folder = tmp_path / "set"
    for kind in ("test", "train", "rain"):
        for k in range(4):
            write_tone(folder / kind / f"{k} of {kind}.wav")
        if layout == "tables":
            lines = ["file_name,caption", *(f"{k} of {kind}.wav,x" for k in range(4))]
            (folder / kind / "metadata.csv").write_text("\n".join(lines))
    if layout == "table":
        (folder / "metadata.csv").write_text("file_name,caption\n3 of train.wav,x\n3 of rain.wav,x\n")
    else:
        (folder / ".Trash").mkdir(mode=0)                          # nobody's recordings
    if layout == "tables":
        shutil.rmtree(folder / "rain")
    (folder / "train").chmod(0)
    said = run_unprivileged(PREPARE, folder)
    assert f"error: {folder / 'train'}: can't be listed (Permission denied); allow it" in said
    (folder / "train").chmod(0o755)
    assert "error" not in run_unprivileged(PREPARE, folder), "negative control"


PREPARE = """
import sys
from parts.errors import run_cli
from parts.recordings import AudioFolder
run_cli(lambda: AudioFolder(sys.argv[1]).prepare(0))
"""


def test_a_file_that_was_unreadable_once_is_tried_again(tmp_path):
    """Though neither its size nor its time of change says that it is another."""
    rows = [(f"{k}.wav", f"tone {k}") for k in range(12)]
    folder = make_folder(tmp_path / "set", [name for name, _ in rows], rows, ("file_name", "caption"))
    path = AudioFolder(folder).paths[0]
    sound, stat = path.read_bytes(), path.stat()

    def prepared(content):
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        return AudioFolder(folder, max_bad_share=0.1).prepare(0)
    broken = prepared(bytes(len(sound)))
    assert path not in broken.paths and len(broken.bad) == 1, "negative control"
    assert prepared(bytes(len(sound))).key == broken.key, "what is broken still is another set of no clips"
    mended = prepared(sound)
    assert path in mended.paths and not mended.bad and mended.key != broken.key
    assert np.abs(mended.wave(0) - soundfile.read(path)[0]).max() < 1e-4
    assert all(np.array_equal(mended.wave(1 + i), broken.wave(i)) for i in range(len(broken)))

    mix = Mixed([AudioFolder(folder)], [1])
    before = mix.key
    assert mix.prepare(0).key != before, "its latents are those of other clips"


def test_a_file_that_the_system_refuses_is_refused_for_the_systems_reason(tmp_path):
    rows = [(f"{k}.wav", f"tone {k}") for k in range(12)]
    folder = make_folder(tmp_path / "set", [name for name, _ in rows], rows, ("file_name", "caption"))
    path = AudioFolder(folder).paths[0]
    path.chmod(0)
    assert f"error: {path}: can't be read (Permission denied)\n" in run_unprivileged(PREPARE, folder)
    path.chmod(0o644)
    assert "error" not in run_unprivileged(PREPARE, folder), "chmod changes no time of change"


def test_an_offset_or_rumble_of_a_recording_is_no_part_of_its_training_clip(tmp_path):
    """Negative control: a hum at 100 Hz is."""
    t = np.arange(RATE) / RATE
    for name, low in (("clean", 0 * t), ("offset", 0.3 + 0 * t), ("hum", 0.3 * np.cos(2 * np.pi * 100 * t))):
        root = tmp_path / name
        root.mkdir()
        soundfile.write(root / "x.wav", 0.05 * sine(1.0) + low, RATE)
    waves = {}
    for name in ("clean", "offset", "hum"):
        split = "train" if nonempty(tmp_path / name, "train") else "val"
        waves[name] = AudioFolder(tmp_path / name, split).prepare(0).wave(0)
    middle = slice(RATE // 4, -RATE // 4)
    assert np.abs(waves["offset"] - waves["clean"])[middle].max() < 1e-3
    assert np.abs(waves["hum"] - waves["clean"])[middle].max() > 0.1


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_table_parted_by_something_else_than_commas_is_refused_with_the_fix(tmp_path, mark):
    write_tone(tmp_path / "a.wav")
    (tmp_path / "metadata.csv").write_text(f"file_name{mark}caption\na.wav{mark}a bell\n")
    with pytest.raises(UserError, match="metadata.csv: its columns are parted by .*; save it with commas"):
        AudioFolder(tmp_path)

