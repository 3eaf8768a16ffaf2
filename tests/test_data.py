"""Claims about SoundWorld, folders of recordings, band-limiting and the latent cache."""
import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.io.wavfile
import scipy.signal
import soundfile

import data
from data import NAMES, RATE, SOUNDS, AudioFolder, Event, Scene, SoundWorld, UserError
from model import Codec

# --- SoundWorld

def test_there_are_24_sounds_in_eight_families():
    assert len(SOUNDS) >= 24 and len(data.FAMILIES) == 8 and len(set(NAMES)) == len(SOUNDS)


def test_a_clip_depends_on_its_index_alone():
    """Not on the number of clips, the order of asking, or the object asked."""
    a, b = SoundWorld("train", 10), SoundWorld("train", 5_000)
    last = [a.wave(i) for i in (7, 3)]
    assert np.array_equal(last[1], b.wave(3)) and np.array_equal(last[0], b.wave(7))
    assert a.caption(3) == b.caption(3) and a.scene(3) == b.scene(3)
    assert not np.array_equal(a.wave(3), SoundWorld("val", 10).wave(3)), "splits are streams of their own"
    assert not np.array_equal(a.wave(3), SoundWorld("train", 10, seed=1).wave(3))


def test_prepared_by_two_workers_or_by_none_it_is_the_same_clip():
    world = SoundWorld("test", 200)
    before = [world.wave(i) for i in (0, 70, 199)]
    world.prepare(workers=2)
    assert world._waves is not None and all(np.array_equal(world.wave(i), x) for i, x in zip((0, 70, 199), before))


def test_interrupted_generation_continues_where_it_stopped(tmp_path):
    """Only chunks not marked done are made again; a finished cache is not touched."""
    calls = []
    def fn(indices):
        calls.append(indices)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return np.asarray(indices, np.int64)
    with pytest.raises(KeyboardInterrupt):
        data.fill_array(tmp_path, "x", (256,), np.int64, fn, 256, workers=0)
    out = data.fill_array(tmp_path, "x", (256,), np.int64, fn, 256, workers=0)
    assert np.array_equal(out, np.arange(256)) and len(calls) == 5
    data.fill_array(tmp_path, "x", (256,), np.int64, fn, 256, workers=0)
    assert len(calls) == 5


@pytest.mark.parametrize("sound", range(len(SOUNDS)), ids=NAMES)
def test_every_sound_is_audible_finite_and_unclipped(sound):
    for pitch, distance in ((-1.0, 0.0), (1.0, 1.0)):
        e = Event(sound, 0.1, 1.2, 2 if SOUNDS[sound].kind == "hit" else 1, pitch, 0.5, -0.5, distance, 3)
        x = data.render_scene(Scene("one", (e,)), np.random.default_rng(0))
        assert np.isfinite(x).all() and np.abs(x).max() <= 0.951
        level = 20 * np.log10(data._loudness(x))
        if np.abs(x).max() < 0.949:  # else the peak limiter turned a near sound down
            assert abs(level - (20 * np.log10(0.17) - 9 * distance)) < 1.5, "near events are 9 dB louder than far ones"


@pytest.mark.parametrize("name, hz", [("beep", lambda p: 2_000 * 2 ** (0.6 * p)), ("flute", lambda p: 700 * 2 ** (0.7 * p)), ("drum", lambda p: 85 * 2 ** (0.6 * p))])
def test_pitch_is_where_the_factor_says(name, hz):
    for p in (-0.8, 0.0, 0.8):
        e = Event(NAMES.index(name), 0.1, 1.5, 1, p, 0.0, 0.0, 0.0, 3)
        x = data.render_scene(Scene("one", (e,)), np.random.default_rng(0))
        f, power = scipy.signal.welch(x, RATE, nperseg=8_192)
        assert abs(np.log2(f[power.argmax()] / hz(p))) < 0.12


def test_counts_are_heard():
    """k knocks make k onsets in the envelope."""
    for count in (1, 2, 3, 4):
        e = Event(NAMES.index("knock"), 0.2, 2.0, count, 0.0, 0.0, 0.0, 0.0, 3)
        x = data.render_scene(Scene("one", (e,)), np.random.default_rng(0))
        env = np.sqrt(scipy.signal.oaconvolve(x**2, np.ones(480) / 480, "same"))
        assert len(scipy.signal.find_peaks(env, 0.3 * env.max(), distance=1_600)[0]) == count


def test_far_is_duller_than_near():
    def centroid(distance):
        x = data.render_scene(Scene("one", (Event(NAMES.index("rain"), 0.1, 2.3, 1, 0.0, 0.0, 0.0, distance, 3),)), np.random.default_rng(0))
        f, power = scipy.signal.welch(x, RATE)
        return (f * power).sum() / power.sum()
    assert centroid(1.0) < 0.9 * centroid(0.0)


def test_captions_say_only_what_is_true():
    """low/high, near/far and numbers appear only where the factors say so; every event is named."""
    low, high = set(data._ADJ["low"]), set(data._ADJ["high"])
    world = SoundWorld("train", 400)
    for i in range(400):
        scene, text = world.scene(i), world.caption(i, i)
        words = set(text.replace(",", "").split())
        facts = [data.factor_words(e) for e in scene.events]
        for group, fact in ((low, "low"), (high, "high")):
            assert not words & group or any(f["pitch"] == fact for f in facts), text
        for key in ("near", "far"):
            assert not words & set(data._ADJ[key]) or any(f["distance"] == key for f in facts), text
        for number, names in data._NUMBERS.items():
            assert not words & set(names) or any(e.count == number for e in scene.events), text
        for e in scene.events:
            s = SOUNDS[e.sound]
            assert any(p.replace("a ~", "").replace("~", "").strip() in text for p in s.one + s.many), (s.name, text)
        assert "~" not in text and "  " not in text and " a a" not in text


def test_wordings_differ_and_the_sound_does_not():
    world = SoundWorld("train", 50)
    assert sum(world.caption(i, 0) != world.caption(i, 1) for i in range(50)) > 25


def test_held_out_pairs_never_sound_together_in_training_and_always_in_combos():
    pairs = lambda s: {(a, b) for a in s for b in s if a < b}
    for split in ("train", "val", "test"):
        world = SoundWorld(split, 600)
        assert not any(pairs([e.sound for e in world.scene(i).events]) & data.HELD_OUT_PAIRS for i in range(600))
    world = SoundWorld("combos", 100)
    assert all(pairs([e.sound for e in world.scene(i).events]) & data.HELD_OUT_PAIRS for i in range(100))
    heard = {e.sound for i in range(600) for e in SoundWorld("train", 600).scene(i).events}
    assert heard == set(range(len(SOUNDS))), "each single sound is trained on"


def test_factors_agree_with_the_scene():
    world = SoundWorld("val", 50)
    for i in range(50):
        f, scene = world.factors(i), world.scene(i)
        assert f["presence"].sum() == len(scene.events)
        for e in scene.events:
            assert f["onset"][e.sound] == np.float32(e.start) and f["presence"][e.sound] == 1
        assert np.isnan(f["onset"][f["presence"] == 0]).all()


def test_sequences_do_not_start_together():
    world = SoundWorld("train", 300)
    for i in range(300):
        scene = world.scene(i)
        if scene.relation == "then":
            starts = [e.start for e in scene.events]
            assert all(b - a > 0.5 for a, b in itertools.pairwise(starts))


def test_unknown_split_is_refused():
    with pytest.raises(UserError, match="train, val, test, combos"):
        SoundWorld("tset")


# --- folders

def tone(seconds=0.5, rate=RATE, hz=440.0):
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.mark.parametrize("ext", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_any_format_rate_and_channel_count_becomes_16k_mono(tmp_path, ext, rate):
    x = tone(1.0, rate)
    soundfile.write(tmp_path / f"x.{ext}", np.stack([x, x], 1), rate)
    y = data.read_audio(tmp_path / f"x.{ext}")
    f = np.fft.rfftfreq(len(y), 1 / RATE)
    assert y.dtype == np.float32 and y.ndim == 1 and abs(len(y) - RATE) < 0.15 * RATE
    assert abs(f[np.abs(np.fft.rfft(y)).argmax()] - 440) < 3 and abs(np.std(y[2_000:14_000]) - 0.3 / np.sqrt(2)) < 0.02


@pytest.mark.parametrize("content", [b"", b"not audio at all", b"RIFF\x00\x00\x00\x00WAVEfmt "])
def test_broken_audio_is_refused_by_name(tmp_path, content):
    (tmp_path / "bad.wav").write_bytes(content)
    with pytest.raises(UserError, match="bad.wav"):
        data.read_audio(tmp_path / "bad.wav")
    with pytest.raises(UserError, match="no such file"):
        data.read_audio(tmp_path / "none.wav")


def make_folder(root, names, rows, header, meta="metadata.csv"):
    root.mkdir(exist_ok=True)
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / name, tone(0.2 + 0.1 * k), RATE)
    with open(root / meta, "w", newline="") as f:
        csv.writer(f).writerows([header, *rows])
    return root


def test_audiofolder_csv_and_jsonl_read_alike(tmp_path):
    names = [f"audio/{k}.flac" for k in range(12)]
    a = make_folder(tmp_path / "a", names, [(n, f"sound, number {k}") for k, n in enumerate(names)], ("file_name", "caption"))
    b = make_folder(tmp_path / "b", names, [], ("file_name", "text"))
    (b / "metadata.csv").unlink()
    (b / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": n, "text": f"sound, number {k}"}) for k, n in enumerate(names)))
    one, two = AudioFolder(a), AudioFolder(b)
    assert one.captions == two.captions and one.caption(0).startswith("sound, number")
    assert len(one) + len(AudioFolder(a, "val")) == 12
    one.prepare(workers=0)
    for i, path in enumerate(one.paths):
        ref = soundfile.read(path)[0]
        assert one.lengths()[i] == len(ref) and np.abs(one.wave(i) - ref).max() < 1e-4


def test_esc50_and_audiocaps_layouts(tmp_path):
    esc = make_folder(tmp_path / "esc", [f"audio/1-{k}.wav" for k in range(6)],
                      [(f"1-{k}.wav", 1 + k % 3, "sea_waves") for k in range(6)], ("filename", "fold", "category"), "esc50.csv")
    held = AudioFolder(esc, "val", val_fold=2)
    assert len(held) == 2 and len(AudioFolder(esc, "train", val_fold=2)) == 4 and held.caption(0) == "sea waves"
    caps = make_folder(tmp_path / "caps", ["abc_30.wav", "def.wav"], [(1, "abc", 30, "a dog, barking"), (2, "def", 0, "rain"), (3, "def", 0, "heavy rain")],
                       ("audiocap_id", "youtube_id", "start_time", "caption"))
    sets = [AudioFolder(caps, s) for s in ("train", "val") if _nonempty(caps, s)]
    assert sorted(c for d in sets for cs in d.captions for c in cs) == ["a dog, barking", "heavy rain", "rain"]


def captions_of(folder, split, **how):
    d = AudioFolder(folder, split, **how)
    return {p.name: c for p, c in zip(d.paths, d.captions)}


def test_audiocaps_splits_and_the_names_that_downloaders_give(tmp_path):
    """train.csv, val.csv, test.csv; ID, YID, ID_START and ID_START_END in ms; several captions of one clip; missing clips only as allowed."""
    names = ["abc.wav", "Yd-_f.flac", "ghi_30.wav", "jkl_30000_40000.wav", "Ymno_30.000.wav", "v1.wav", "t1.wav"]
    head, row = "audiocap_id,youtube_id,start_time,caption\n", "{},{},30,{}\n".format
    make_folder(tmp_path, names, [], ("x",), "train.csv")
    (tmp_path / "train.csv").write_text(head + "".join(row(k, i, f"sound {i}") for k, i in enumerate(("abc", "d-_f", "ghi", "jkl", "mno", "gone"))))
    (tmp_path / "val.csv").write_text(head + row(7, "v1", "one") + row(8, "v1", "two"))
    (tmp_path / "test.csv").write_text(head + row(9, "t1", "three"))
    with pytest.raises(UserError, match="train.csv, row 7: no audio file for 'gone'"):
        AudioFolder(tmp_path)
    d = AudioFolder(tmp_path, max_bad_share=0.2)
    assert sorted(p.name for p in d.paths) == sorted(names[:5]) and len(d.bad) == 1 and "'gone'" in d.bad[0]
    with pytest.raises(UserError, match="1 of 6 can't be used, the share 0.1 may be left out"):
        AudioFolder(tmp_path, max_bad_share=0.1)
    assert captions_of(tmp_path, "val") == {"v1.wav": ["one", "two"]} and captions_of(tmp_path, "test") == {"t1.wav": ["three"]}


def test_a_csv_of_something_else_beside_train_csv_leaves_no_clip_in_two_splits(tmp_path):
    make_folder(tmp_path, [f"{k}.wav" for k in range(20)], [(f"{k}.wav", f"sound {k}") for k in range(20)], ("file_name", "caption"), "train.csv")
    alone = {split: set(captions_of(tmp_path, split)) for split in ("train", "val")}
    (tmp_path / "class_labels.csv").write_text("index,name\n0,rain\n")
    both = {split: set(captions_of(tmp_path, split)) for split in ("train", "val")}
    assert both == alone and not both["train"] & both["val"] and len(both["train"] | both["val"]) == 20


def test_clotho_has_five_wordings_and_its_own_splits(tmp_path):
    head = "file_name," + ",".join(f"caption_{k}" for k in range(1, 6)) + "\n"
    for split, name in (("development", "Rain 1.wav"), ("validation", "Dog.wav")):
        make_folder(tmp_path, [f"{split}/{name}"], [], ("x",), f"clotho_captions_{split}.csv")
        (tmp_path / f"clotho_captions_{split}.csv").write_text(head + name + ",a,b,c,d,e\n")
    assert captions_of(tmp_path, "train") == {"Rain 1.wav": list("abcde")}
    assert captions_of(tmp_path, "val") == captions_of(tmp_path, "test") == {"Dog.wav": list("abcde")}, "no test file: validation stands in"


def test_vctk_holds_out_the_last_speakers_and_two_are_left_out(tmp_path):
    root = tmp_path / "wav48_silence_trimmed"
    for k in [*range(225, 245), 280, 315]:
        (root / f"p{k}").mkdir(parents=True)
        for mic in (1, 2):
            soundfile.write(root / f"p{k}" / f"p{k}_001_mic{mic}.flac", tone(0.2), 48_000)
    (tmp_path / "txt" / "p225").mkdir(parents=True)
    (tmp_path / "txt" / "p225" / "p225_001.txt").write_text("Please call Stella.\n")
    train, test = captions_of(tmp_path, "train"), captions_of(tmp_path, "test")
    assert len(train) == 19 and list(test) == ["p244_001_mic1.flac"] and not any("mic2" in n or "p280" in n or "p315" in n for n in [*train, *test])
    assert train["p225_001_mic1.flac"] == ["Please call Stella."] and train["p226_001_mic1.flac"] == ["speech"]


def test_audiofolders_with_one_metadata_file_a_split_or_none_at_all(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / "a").mkdir(exist_ok=True)
        make_folder(tmp_path / "a" / split, ["x.wav"], [("x.wav", f"of {split}")], ("file_name", "text"))
    assert captions_of(tmp_path / "a", "train") == {"x.wav": ["of train"]} and captions_of(tmp_path / "a", "val") == {"x.wav": ["of validation"]}
    for name in ("train/sea_waves/1.wav", "train/dog/2.wav", "test/dog/3.wav"):
        (tmp_path / "b" / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "b" / name, tone(), RATE)
    assert captions_of(tmp_path / "b", "train") == {"1.wav": ["sea waves"], "2.wav": ["dog"]} and captions_of(tmp_path / "b", "val") == {"3.wav": ["dog"]}
    make_folder(tmp_path / "c", ["x.wav"], [("x.wav", "a")], ("file_name", "text"), "one.csv")
    (tmp_path / "c" / "two.csv").write_text("file_name,text\nx.wav,b\n")
    with pytest.raises(UserError, match="several metadata files .one.csv, two.csv."):
        AudioFolder(tmp_path / "c")


def test_a_mixture_draws_its_parts_by_weight_whatever_their_size(tmp_path):
    """3 of 4 draws from 20 clips, 1 of 4 from 100; validation clips take turns; a single data set draws exactly as before."""
    names = [f"{k}.wav" for k in range(22)]
    folder = make_folder(tmp_path / "own", names, [(n, "a tone") for n in names], ("file_name", "caption"))
    mix = data.open_data(f"{folder}=3, soundworld=1", "train", 100)
    own = len(AudioFolder(folder))
    assert isinstance(mix, data.Mixed) and len(mix) == own + 100 and len(mix.lengths()) == len(mix)
    codec = Codec(8).fit(SoundWorld("val", 4).wave(i) for i in range(4))
    z = data.LatentCache(mix.prepare(0), codec)
    i = np.concatenate([data.draw_batch(z, None, 64, 16, np.random.default_rng(k))["i"] for k in range(40)])
    assert abs(np.mean([mix.index[j][0] == 0 for j in i]) - 0.75) < 0.03
    assert np.array_equal(mix.wave(5), mix.parts[mix.index[5][0]].wave(mix.index[5][1])) and mix.caption(0) in ("a tone", SoundWorld("train", 100).caption(0))
    assert {mix.index[j][0] for j in range(12)} == {0, 1}
    for bad in ("soundworld=0", f"{folder}=x", "=1", "soundworld=1,"):
        with pytest.raises(UserError, match="NAME=WEIGHT"):
            data.open_data(bad, "train", 100)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        data.open_data("nowhere=1,soundworld=1", "train", 100)


def _nonempty(folder, split):
    try:
        return len(AudioFolder(folder, split)) > 0
    except UserError:
        return False


@pytest.mark.parametrize("write, message", [
    (lambda d: None, "no metadata"),
    (lambda d: (d / "metadata.csv").write_text("file_name,caption\nx.wav,a,b\n"), "row 2: more fields"),
    (lambda d: (d / "metadata.csv").write_text("file_name,caption\nx.wav\n"), "row 2: fewer fields"),
    (lambda d: (d / "metadata.csv").write_text("file_name,words\nx.wav,hello\n"), "no column caption"),
    (lambda d: (d / "metadata.csv").write_text("file_name,caption\nx.wav,hello\n"), "row 2: no audio file for 'x.wav'"),
    (lambda d: (d / "metadata.csv").write_bytes("file_name,caption\nx,y".encode("utf-16")), "not UTF-8"),
    (lambda d: (d / "metadata.jsonl").write_text('{"file_name": "x"\n'), "row 1: not valid JSON"),
    (lambda d: (d / "metadata.csv").write_text("file_name,caption\n"), "no rows"),
    (lambda d: (d / "metadata.csv").write_text("file_name,caption\nx.wav,\n"), "row 2: empty caption"),
    (lambda d: (d / "metadata.jsonl").write_text('{"file_name": "x.wav", "caption": "a"}\n{"file_name": "y.wav"}\n'), "row 1: no audio file.*2 of 2 can't be used"),
])
def test_bad_folders_are_refused_with_the_row_and_the_fix(tmp_path, write, message):
    write(tmp_path)
    with pytest.raises(UserError, match=message):
        AudioFolder(tmp_path)


def test_byte_order_mark_and_crlf_are_read(tmp_path):
    make_folder(tmp_path, ["x.wav"], [], ("file_name", "caption"))
    (tmp_path / "metadata.csv").write_bytes(b"\xef\xbb\xbffile_name,caption\r\nx.wav,\"a dog,\r\nthen rain\"\r\n")
    sets = [s for s in ("train", "val") if _nonempty(tmp_path, s)]
    assert "a dog" in AudioFolder(tmp_path, sets[0]).caption(0)


# --- band-limiting

@pytest.mark.parametrize("family", data.FILTERS)
@pytest.mark.parametrize("cutoff", [1_000, 2_000, 4_250])
def test_band_limit_keeps_below_and_removes_above(family, cutoff):
    x = np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    y = data.band_limit(x, cutoff, family, 8)
    assert len(y) == len(x) and y.dtype == np.float32
    f, px = scipy.signal.welch(x, RATE, nperseg=2_048)
    _, py = scipy.signal.welch(y, RATE, nperseg=2_048)
    gain = 10 * np.log10(py / px)
    assert np.abs(gain[(f > 100) & (f < 0.5 * cutoff)]).max() < 3.5
    assert gain[f > 1.25 * cutoff].max() < -40


def test_band_limit_gain_is_the_filters_squared():
    """sosfiltfilt passes twice: |H|^2, checked against scipy's own frequency response at half the cutoff."""
    x = np.sin(2 * np.pi * 900 * np.arange(RATE) / RATE)
    sos = scipy.signal.bessel(4, 2_000 / 8_000, norm="mag", output="sos")
    _, h = scipy.signal.sosfreqz(sos, [900], fs=RATE)
    y = data.band_limit(x, 2_000, "bessel", 4)
    assert abs(y[4_000:12_000].std() / x[4_000:12_000].std() - abs(h[0]) ** 2) < 0.01


def test_random_band_limit_covers_families_orders_and_cutoffs():
    rng, x = np.random.default_rng(0), np.zeros(4_000, np.float32)
    cutoffs = [data.random_band_limit(x, rng)[1] for _ in range(200)]
    assert min(cutoffs) == 1_000 and max(cutoffs) == 6_000 and all(c % 250 == 0 for c in cutoffs)


# --- latent cache and batches

@pytest.fixture(scope="module")
def cached():
    world = SoundWorld("val", 90)
    codec = Codec(16).fit(world.wave(i) for i in range(20))
    return world, codec, data.LatentCache(world, codec, workers=0), data.LatentCache(world, codec, 2, workers=0)


def test_cached_latents_are_the_codecs(cached):
    import torch
    world, codec, z, _ = cached
    for i in (0, 40, 89):
        assert np.allclose(z.crop(i, 0, 64), codec.encode(torch.from_numpy(world.wave(i))[None])[0].numpy(), atol=0.01)


def test_muffled_latents_belong_to_the_same_moment(cached):
    """Version r of clip i is the clip after random_band_limit seeded by (i, r), crop by crop."""
    import torch
    world, codec, _, muffled = cached
    y, _ = data.random_band_limit(world.wave(40), np.random.default_rng([77, 40, 1]))
    assert np.allclose(muffled.crop(40, 10, 20, variant=1), codec.encode(torch.from_numpy(y)[None])[0, 10:30].numpy(), atol=0.01)


def test_batches_pad_short_clips_with_a_mask_and_crop_long_ones(tmp_path):
    names = [f"{k}.wav" for k in range(10)]  # 0.2 to 1.1 s: 5 to 28 tokens
    folder = AudioFolder(make_folder(tmp_path, names, [(n, "a tone") for n in names], ("file_name", "caption"))).prepare(workers=0)
    codec = Codec(8).fit(SoundWorld("val", 4).wave(i) for i in range(4))
    z = data.LatentCache(folder, codec, workers=0)
    b = data.draw_batch(z, z, 64, 16, np.random.default_rng(0))
    assert b["x0"].shape == (64, 16, 8) and not b["mask"].all() and b["mask"].all(1).any()
    for j, i in enumerate(b["i"]):
        n = min(16, codec.tokens(folder.lengths()[i]))
        assert b["mask"][j].sum() == n and (b["x0"][j, n:] == 0).all()
        assert np.array_equal(b["x0"][j], b["cond"][j]), "condition and target are cut at the same place"


def test_a_batch_depends_on_its_generator_alone(cached):
    a, b = (data.draw_batch(cached[2], cached[3], 8, 32, np.random.default_rng(5)) for _ in range(2))
    assert all(np.array_equal(a[k], b[k]) for k in a)


def test_wav_files_never_clip(tmp_path):
    data.write_wav(tmp_path / "x.wav", 10 * tone())
    rate, x = scipy.io.wavfile.read(tmp_path / "x.wav")
    assert rate == RATE and x.dtype == np.int16 and 32_000 < np.abs(x).max() <= 32_767


def _row_once(indices, folder):
    """Rows i * 2; a chunk that is computed a second time is an error (its marker exists)."""
    import time
    (Path(folder) / f"made-{indices[0]}").open("x").close()
    time.sleep(0.01)
    return np.array([[i, i] for i in indices], np.float32) * 2


def _fill(folder):
    return float(data.fill_array(Path(folder), "x", (200, 2), np.float32, _row_once, 200, (folder,), chunk=10, workers=0).sum())


def test_two_processes_that_start_together_fill_a_cache_once(tmp_path):
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        sums = list(pool.map(_fill, [str(tmp_path)] * 2))
    assert sums == [2 * 2 * sum(range(200))] * 2
