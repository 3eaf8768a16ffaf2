"""Nothing is lost in a crash, and nothing from elsewhere hurts the machine or the result."""
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, in_process
from folders import write_tone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_files import clips_of_step, log_of

import evaluate
import guidance
import regime
import train
from parts import checkpoints, metrics, runs
from parts.audio import RATE
from parts.audio_files import LONGEST_S, read_audio
from parts.band_limit import band_limit
from parts.cache import fill_array
from parts.codec import Codec
from parts.config import validate_config
from parts.errors import UserError, printable, run_cli
from parts.judges import ASSETS, judge_clips, load_judge
from parts.latents import LatentCache
from parts.preparation import open_data
from parts.progress import MAX_SKIPPED
from parts.recordings import LONGEST_CAPTION, AudioFolder, _decode_chunk
from parts.teacher import TeacherFeatures, load_teacher

EXAMPLES = pytest.mark.parametrize("examples", [50, pytest.param(500, marks=pytest.mark.slow)])
SEARCH = dict(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)


def copy_of(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


def write_table(folder: Path, rows: list[tuple[str, str]]) -> Path:
    """metadata.csv of a folder; returns the folder."""
    lines = ["file_name,caption", *(f"{name},{caption}" for name, caption in rows)]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_tones(folder: Path, n: int = 10) -> list[tuple[str, str]]:
    """Tones of 200 Hz, 250 Hz ... and their rows, for write_table."""
    names = [write_tone(folder / f"{k}.wav", hz=200 + 50 * k).name for k in range(n)]
    return [(name, f"a tone of {k}") for k, name in enumerate(names)]


def peak_memory() -> int:
    """Of this process until now, in kB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --- crashes ------------------------------------------------------------------------------------------------

def final(run: Path) -> dict:
    """A run's checkpoint without what a clock or a path wrote."""
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    return {name: part for name, part in checkpoint.items() if name not in ("seconds", "wall", "config")}


def unclocked_log(run: Path) -> list[dict]:
    """A run's log without what depends on the machine."""
    rows = log_of(run)
    for row in rows:
        for clocked in ("step_s", "memory_mb"):
            row.pop(clocked, None)
        row.get("eval", {}).pop("seconds", None)
    return rows


def same(a, b) -> bool:
    """Equal to the last bit, NaN included."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a and b != b  # noqa: PLR0124 NaN is not itself


def spoil(path: Path, how: str) -> None:
    raw = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    elif how == "flipped":
        path.write_bytes(raw[:3_000] + bytes(200) + raw[3_200:])
    elif how == "empty":
        path.write_bytes(b"")


def test_a_damaged_newest_checkpoint_falls_back_with_a_warning_and_training_ends_the_same(
        t2a_run, tmp_path, capsys, bare):
    run = copy_of(t2a_run, tmp_path / "run")
    for how in ("gone", "empty", "flipped", "cut"):
        shutil.copy(t2a_run / "checkpoint.pt", run / "checkpoint.pt")
        spoil(run / "checkpoint.pt", how)
        assert checkpoints.load_checkpoint(run)[1]["step"] == 6
        err = capsys.readouterr().err
        assert "warning" in err and ("is missing" if how == "gone" else "is damaged") in err
        assert "checkpoint-previous.pt, step 6" in err
    train.train({}, str(run))
    assert same(final(run), final(t2a_run))
    assert [row["step"] for row in log_of(run)] == [row["step"] for row in log_of(t2a_run)]
    for name in checkpoints.CHECKPOINTS:
        spoil(run / name, "cut")
    with pytest.raises(UserError, match="can't be read"):
        checkpoints.load_checkpoint(run)


def test_a_run_that_died_before_its_first_checkpoint_starts_again_by_resume(t2a_run, tmp_path, bare):
    run = tmp_path / "run"
    run.mkdir()
    fields = {**json.loads((t2a_run / "config.json").read_text()), "out": str(run)}
    (run / "config.json").write_text(json.dumps(fields))
    (run / "log.jsonl").write_text('{"step": 1, "loss": 9}\n{"step": 2, "lo')
    train.train({}, str(run))
    assert same(final(run), final(t2a_run))
    assert '"loss": 9' not in (run / "log.jsonl").read_text()


def test_a_disk_that_fills_up_ends_in_one_line_and_leaves_the_last_checkpoint(t2a_run, tmp_path, bare):
    """By the system's limit on the size of a file, which fails as a full disk does: in the middle of a
    write."""
    run = copy_of(t2a_run, tmp_path / "run")
    _, before = checkpoints.load_checkpoint(run)
    size = (run / "checkpoint.pt").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        full = r"checkpoint\.pt: can't be written \(File too large\).*--resume"
        with pytest.raises(UserError, match=full) as e:
            train.train({"steps": 14}, str(run))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(str(e.value).splitlines()) == 1 and not list(run.glob("*.tmp"))
    assert checkpoints.load_checkpoint(run)[1]["step"] == before["step"] == 12
    train.train({}, str(run))
    assert checkpoints.load_checkpoint(run)[1]["step"] == 14
    log = runs.Log(run / "log.jsonl", 14)
    log.file = open("/dev/full", "a", buffering=1)
    with pytest.raises(UserError, match=r"log\.jsonl: can't be written \(No space left on device\)"):
        log({"step": 15})


def test_caches_take_their_room_before_they_are_filled(tmp_path):
    def zeros(indices):
        return np.zeros((len(indices), 1_000), np.float32)
    full = fill_array(tmp_path, "x", (1_000, 1_000), np.float32, zeros, 1_000, workers=0, desc="zeros")
    on_disk = (tmp_path / "x.npy").stat().st_blocks * 512
    assert on_disk >= full.nbytes, "not a sparse file: a disk that fills up later can't kill the process"
    with pytest.raises(UserError, match="make room"):
        fill_array(tmp_path, "y", (10, 10**13), np.float32, None, 10, desc="too much")
    assert not list(tmp_path.glob("y*.npy")) and not list(tmp_path.glob("*.tmp*"))


LOCK_AND_WAIT = """
import pathlib, sys, time
from parts.runs import RunLock
with RunLock() as lock:
    lock.claim(pathlib.Path(sys.argv[1]))
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_killed_ones_lock_is_not_in_the_way(t2a_run, tmp_path, bare):
    run = copy_of(t2a_run, tmp_path / "run")
    command = [sys.executable, "-c", LOCK_AND_WAIT, str(run)]
    other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match="another process is training this run"):
        train.train({"steps": 14}, str(run))
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    train.train({"steps": 14}, str(run))
    assert checkpoints.load_checkpoint(run)[1]["step"] == 14


FLAGS = ("--recipe stage --width 32 --depth 4 --heads 2 --channels 16 --batch 8 --clips 400 --warmup 4 "
         "--steps 400 --eval-every 40 --score-clips 8 --sample-steps 3 --precision fp32 --device cpu "
         "--workers 1 --variants 1")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["t2a", "sr"])
def test_killed_at_random_moments_and_resumed_it_is_the_run_that_never_stopped(tmp_path, task):
    """kill -9 at least five times, in preparation, steps, evaluation, checkpoint and table: parameters,
    optimizer, losses, regime and structure bitwise equal; no step of the log missing or double."""
    command, new = [sys.executable, "train.py"], ["--task", task, *FLAGS.split()]
    whole, run = tmp_path / "whole", tmp_path / "run"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "STAGE_AUDIO_CACHE": str(tmp_path / "cache-a")}
    began = time.time()
    subprocess.run([*command, *new, "--out", str(whole)], cwd=ROOT, env=env, check=True, capture_output=True)
    whole_s = time.time() - began

    rng, kills, ended = random.Random(7), [], False
    env["STAGE_AUDIO_CACHE"] = str(tmp_path / "cache-b")
    while not ended:
        known = (run / "config.json").exists()
        if run.exists() and not known:  # died while it made the folder
            shutil.rmtree(run)
        flags = ["--resume", str(run)] if known else [*new, "--out", str(run)]
        process = subprocess.Popen([*command, *flags], cwd=ROOT, env=env, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True)
        try:
            out, _ = process.communicate(timeout=3 + rng.random() * whole_s / 3 if len(kills) < 25 else None)
            assert process.returncode == 0, out[-2_000:]
            ended = True
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            log = run / "log.jsonl"
            lines = log.read_text().split("\n")[:-1] if log.exists() else []
            kills.append(json.loads(lines[-1])["step"] if lines else None)
    print("killed after steps", kills)
    assert len(kills) >= 5
    assert same(final(run), final(whole)) and same(unclocked_log(run), unclocked_log(whole))
    earlier = torch.load(whole / "checkpoint-previous.pt", weights_only=True)
    assert not same(final(run), earlier), "negative control"


# --- numbers ------------------------------------------------------------------------------------------------

def poison(monkeypatch, clips) -> None:
    """Latents of these training clips read as NaN."""
    crop = LatentCache.crop

    def poisoned_crop(self, i, *a):
        z = crop(self, i, *a)
        return z * np.nan if i in clips and len(self) == 100 else z
    monkeypatch.setattr(LatentCache, "crop", poisoned_crop)


def test_a_clip_of_nan_costs_its_steps_and_is_named(tiny, t2a_run, tmp_path, monkeypatch, bare):
    poison(monkeypatch, {17})
    run = train.train({**tiny, "steps": 24, "eval_every": 24, "out": str(tmp_path / "run")})
    rows = log_of(run)
    skipped = [row for row in rows if "skipped" in row]
    assert [row["step"] for row in skipped] == [k for k in range(1, 25) if 17 in clips_of_step(k)]
    assert 0 < len(skipped) < 12
    assert all(row["clips"] == ["SoundWorld train clip 17"] for row in skipped)
    assert all(torch.isfinite(v).all() for v in checkpoints.load_checkpoint(run)[1]["ema"].values())
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)


@pytest.mark.parametrize("how", [
    {"recipe": "stage"},
    {"recipe": "infonoise"},
    {"recipe": "static", "structure": "constant"},
    {"regime": "agreement"},
])
def test_a_clip_of_nan_at_a_probe_step_costs_that_step_and_none_after_it(
        tiny, tmp_path, monkeypatch, how, bare):
    """What is measured of its gradients must not drive the steps to come."""
    drawn = {k: clips_of_step(k) for k in range(1, 41)}
    clip = min(drawn[regime.FIRST])
    poison(monkeypatch, {clip})
    run = train.train({**tiny, **how, "steps": 40, "eval_every": 40, "out": str(tmp_path / "run")})
    skipped = [row["step"] for row in log_of(run) if "skipped" in row]
    assert regime.FIRST in skipped and skipped == [k for k in drawn if clip in drawn[k]]


def test_ten_bad_steps_in_a_row_end_the_run_with_the_last_good_checkpoint(
        tiny, t2a_run, tmp_path, monkeypatch, bare):
    run = copy_of(t2a_run, tmp_path / "run")
    poison(monkeypatch, set(range(100)))
    assert MAX_SKIPPED == 10
    with pytest.raises(UserError, match="step 22: no finite gradient in 10 steps"):
        train.train({"steps": 60}, str(run))
    ours, before = (torch.load(p / "checkpoint.pt", weights_only=True) for p in (run, t2a_run))
    assert ours["step"] == 18
    unmoved = same(ours["model"], before["model"])
    assert unmoved, "an evaluation on the way saved the weights that did not move"


@pytest.mark.parametrize("name, x", [
    ("silence", np.zeros(RATE)),
    ("clipped", np.sign(np.sin(np.arange(RATE) * 0.3))),
    ("DC", np.full(RATE, 0.5)),
    ("denormals", np.full(RATE, 1e-40)),
    ("one click", np.eye(1, RATE)[0]),
])
def test_degenerate_sound_stays_finite_from_codec_to_metrics(name, x, waves):
    x = x.astype(np.float32)

    # Latents, and teacher features of a codec that was fitted on such sounds too.
    codec = Codec(16).fit([*waves[:8], *[x] * 3])
    z = codec.encode(torch.from_numpy(x)[None])
    assert torch.isfinite(z).all() and torch.isfinite(codec.decode(z)).all()
    phi = TeacherFeatures(codec, load_teacher())(z)
    assert torch.isfinite(phi).all()

    # The three mechanisms: a projector whose output is constant, blocks that add nothing, a dead network.
    dead = torch.zeros_like(phi, requires_grad=True)
    guidance.alignment_loss(dead, phi - phi.mean((0, 1)), None).backward()
    assert torch.isfinite(dead.grad).all()
    hs = [torch.zeros(2, 5, 8, requires_grad=True) for _ in range(5)]
    for loss in train.STRUCT_LOSSES.values():
        loss(hs, [0, 0, 1, 1], None).backward()
    assert all(h.grad is None or torch.isfinite(h.grad).all() for h in hs)
    D = regime.probe(lambda x_t, t: torch.zeros_like(x_t), torch.nn.Identity(), z.detach(),
                     torch.randn(z.shape), regime.PREDICTIONS)
    assert len(D) == 2 * len(regime.PREDICTIONS) and np.isfinite(list(D.values())).all()

    # Judges and metrics.
    predicted = judge_clips(load_judge("dev"), [x, x])
    assert all(np.isfinite(v).all() for v in predicted.values())
    for ref, est in ((x, x), (waves[0][:RATE], x), (x, waves[0][:RATE])):
        high_ref, high_est = (metrics.high_band_mel(a, 2_000) for a in (ref, est))
        lsd = metrics.lsd(metrics.log_power(ref), metrics.log_power(est), 2_000)
        numbers = [metrics.si_sdr(ref, est), *lsd.values(), metrics.energy_score(high_ref, [high_est] * 2)]
        assert np.isfinite(numbers).all(), numbers
    ones = np.ones((9, 4))
    for other in (np.zeros((9, 4)), ones):
        distances = [metrics.kid(ones, other), metrics.kid(other, ones), metrics.frechet(ones, other)]
        assert np.isfinite(distances).all()
    assert all(v is None or np.isfinite(v) for v in metrics.describe(x).values())
    assert np.isfinite(band_limit(x, 2_000)).all()


# --- what comes from elsewhere: recordings ------------------------------------------------------------------

def test_paths_in_metadata_may_not_leave_the_folder(tmp_path):
    secret, home = write_tone(tmp_path / "secret" / "own.wav"), tmp_path / "set"
    rows = write_tones(home)
    (home / "link.wav").symlink_to(secret)
    (home / "inside.wav").symlink_to(home / "3.wav")
    (home / "loop.wav").symlink_to(home / "loop.wav")
    (home / "dir").symlink_to(home)  # a loop of folders
    (home / "away").symlink_to(secret.parent)
    inside = AudioFolder(write_table(home, rows + [("inside.wav", "x")]), "train")
    assert len(inside) == 9, "a link within the folder is fine, and no clip of its own"
    for bad in ("../secret/own.wav", str(secret), "link.wav", "away/own.wav"):
        with pytest.raises(UserError, match="row 12: leads to .*outside of"):
            AudioFolder(write_table(home, rows + [(bad, "x")]), "train", max_bad_share=0.5)
    for bad in ("loop.wav", "/dev/zero", "/dev/stdin", "http://example.com/own.wav", "file:///etc/passwd",
                "a" * 5_000 + ".wav", "dir"):
        with pytest.raises(UserError, match="row 12: no audio file"):
            AudioFolder(write_table(home, rows + [(bad, "x")]), "train")

    # The same where no table says what to open.
    for path in home.glob("*.*"):
        path.unlink()
    (home / "class").mkdir()
    (home / "class" / "link.wav").symlink_to(secret)
    for folder in ("away", "dir"):
        with pytest.raises(UserError, match=f"{folder}: a link to a folder, which is not followed"):
            AudioFolder(home)
        (home / folder).unlink()
    with pytest.raises(UserError, match="outside of"):
        AudioFolder(home)
    os.mkfifo(home / "class" / "pipe.wav")
    (home / "class" / "link.wav").unlink()
    write_tone(home / "class" / "ok.wav")
    found = [path.name for path in AudioFolder(home, "val").paths]
    assert found == ["ok.wav"], "a pipe is not opened, a loop of folders not followed for ever"


def write_liar(kind: str, path: Path) -> Path:
    """A short tone whose header claims something else."""
    raw = bytearray(write_tone(path, 0.5).read_bytes())
    if path.suffix == ".flac":
        # STREAMINFO, from byte 18: 20 bits of rate, 3 of channels, 5 of depth, 36 of samples.
        word = int.from_bytes(raw[18:26], "big")
        rate, rest, samples = word >> 44, (word >> 36) & 0xFF, word & (1 << 36) - 1
        if kind == "length":
            samples = 3_500 * RATE
        elif kind == "long":
            samples = (1 << 36) - 1
        elif kind == "rate":
            rate = 655_350
        elif kind == "slow":
            rate = 1
        raw[18:26] = (rate << 44 | rest << 36 | samples).to_bytes(8, "big")
    elif kind in ("length", "long"):
        at = raw.index(b"data")
        raw[at + 4 : at + 8] = struct.pack("<I", 0xFFFFFFF0)
        raw[4:8] = struct.pack("<I", 0xFFFFFFFF)
    else:
        raw[24:28] = struct.pack("<I", 4_000_000_000 if kind == "rate" else 1)
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("ext", ["wav", "flac"])
@pytest.mark.parametrize("kind", ["length", "long", "rate", "slow"])
def test_headers_that_state_false_lengths_cost_no_memory(tmp_path, kind, ext):
    path = write_liar(kind, tmp_path / f"liar.{ext}")
    before = peak_memory()
    try:
        x = read_audio(path)
        assert 0 < len(x) <= RATE and np.isfinite(x).all()  # what is there
    except UserError as e:
        assert "liar" in str(e)
    rows = write_tones(tmp_path, 20) + [(path.name, "x")]
    clips = AudioFolder(write_table(tmp_path, rows), max_bad_share=0.1).prepare(0)
    assert peak_memory() - before < 1e6
    assert all(len(clips.wave(i)) < 2 * RATE for i in range(len(clips)))


def test_unreadable_files_among_good_ones_are_left_out_and_listed_up_to_the_share(tiny, tmp_path, bare):
    folder = tmp_path / "set"
    rows = write_tones(folder, 40)
    (folder / "3.wav").write_bytes(b"RIFF")
    cut = write_tone(folder / "20.flac")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    rows[20] = ("20.flac", "cut")
    write_table(folder, rows + [("5.wav", ""), ("6.wav", "a tone of 6"), ("none.wav", "x")])
    too_many = "2 of 43 can't be used, the share 0.01 may be left out"
    with pytest.raises(UserError, match=rf"row 42: empty caption; {too_many} \(--max-bad-share\)"):
        open_data(str(folder), "train", max_bad_share=0.01)

    # Up to the share they are listed.
    options = {**tiny, "task": "sr", "data": str(folder), "seconds": 0.5}
    run = train.train({**options, "max_bad_share": 0.1, "out": str(tmp_path / "run")})
    listed = (run / "bad.txt").read_text()
    assert len(listed.splitlines()) == 4
    for reason in ("3.wav: can't be read", "20.flac: ", "row 42: empty caption", "row 44: no audio file"):
        assert reason in listed
    sets = [open_data(str(folder), split, max_bad_share=0.1).prepare(0) for split in ("train", "val")]
    assert sum(map(len, sets)) == 38
    assert not {"3.wav", "20.flac"} & {path.name for clips in sets for path in clips.paths}
    assert any("count once" in note for clips in sets for note in clips.notes)

    for clips in sets:
        for i in range(len(clips)):
            spectrum = np.abs(np.fft.rfft(clips.wave(i)))
            peak_hz = np.argmax(spectrum) / len(clips.wave(i)) * RATE
            assert abs(peak_hz - (200 + 50 * int(Path(clips.name(i)).stem))) < 5
    with pytest.raises(UserError, match="3.wav: can't be read|20.flac: "):
        train.train({**options, "max_bad_share": 0.05, "out": str(tmp_path / "none")})
    assert not (tmp_path / "none").exists()


def test_captions_are_made_safe_for_the_terminal_and_cut(tmp_path, capsys):
    text = "file_name,caption\n"
    for name, caption in write_tones(tmp_path):
        text += f'{name},"\x1b]0;owned\x07 {caption}\r\n\u202eback\u2028 {"long " * 300}"\n'
    (tmp_path / "metadata.csv").write_text(text, encoding="utf-8", newline="")
    clips = AudioFolder(tmp_path)
    for caption in (caption for captions in clips.captions for caption in captions):
        assert caption.isprintable() and len(caption) <= LONGEST_CAPTION
        assert caption.startswith("]0;owned a tone of")
    assert any("longer than 500" in note for note in clips.notes)

    def fail():
        raise UserError("file \x1b[2Jname\nnext")
    with pytest.raises(SystemExit):
        run_cli(fail)
    assert capsys.readouterr().err == "error: file  [2Jname next\n"


@pytest.mark.parametrize("raw", [
    "\ufefffile_name,caption\r\n0.wav,a\r\n1.wav,b\r\n".encode(),
    b'file_name,caption\n0.wav,"a\nb"\n"1.wav",b\n',
    '\ufeff{"file_name": "0.wav", "caption": "a"}\r\n\r\n{"file_name": "1.wav", "caption": "b"}'.encode(),
])
def test_marks_line_ends_and_quoted_newlines_of_other_systems_are_read(tmp_path, raw):
    write_tones(tmp_path, 2)
    (tmp_path / ("metadata.jsonl" if b"{" in raw else "metadata.csv")).write_bytes(raw)
    sets = [AudioFolder(tmp_path, split) for split in ("train", "val")]
    found = {caption for clips in sets for captions in clips.captions for caption in captions}
    assert found in ({"a", "b"}, {"a b", "b"})


@pytest.mark.parametrize("name, raw, message", [
    ("metadata.csv", "file_name,caption\n0.wav,a".encode("utf-16"), "save it as UTF-8"),
    ("metadata.csv", "file_name,caption\n0.wav,a".encode("utf-16-le"), "save it as UTF-8"),
    ("metadata.csv", b"file_name,caption\n0.wav,caf\xe9\n", "save it as UTF-8"),
    ("metadata.csv", b"file_name,caption,caption\n0.wav,a,b\n", "two columns are named 'caption'"),
    ("metadata.csv", b'file_name,caption\n0.wav,"' + b"x" * 200_000 + b"\n", "after row 1.*quote left open"),
    ("metadata.csv", b"file_name;caption\n0.wav;a\n", "its columns are parted by"),
    ("metadata.csv", b"file_name,caption\n0.wav,a\n1.wav,b,c\n", "row 3: more fields"),
    ("metadata.jsonl", b'{"file_name": "0.wav", "caption": "a"}\n[1]\n', "row 2: not a JSON object"),
    ("metadata.jsonl", b'{"file_name": "0.wav", "caption": ' + b"[" * 100_000, "row 1: not valid JSON"),
    ("metadata.jsonl", b'{"file_name": "0.wav", "caption": [5]}\n', "row 1: empty caption"),
    ("metadata.jsonl", b'{"file_name": "0.wav", "n": ' + b"1" * 9_000 + b"}", "row 1: not valid JSON"),
])
def test_tables_that_cannot_be_read_are_refused_with_the_row_and_the_fix(tmp_path, name, raw, message):
    write_tones(tmp_path, 3)
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=message):
        AudioFolder(tmp_path)


NASTY_CELLS = ["0.wav", "1.wav", "2.wav", "../0.wav", "/etc/passwd", "0", "a dog", "", " ", "_", "\x00",
               "\ud800", "\u202e", "0.WAV", "metadata.csv", "nan", "-1"]
CELLS = st.one_of(st.text(max_size=30), st.sampled_from(NASTY_CELLS))
ROWS = st.lists(st.lists(CELLS, min_size=1, max_size=4), min_size=1, max_size=6)
HEADS = ["file_name,caption", "filename,fold,category", "youtube_id,start_time,caption",
         "file_name,caption_1,caption_2", "caption"]


def quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"'


def table_text(rows: list[list[str]], kind: str, head: str) -> str:
    """kind: jsonl; csv, with each cell in quotes; raw, with none."""
    if kind == "jsonl":
        return "\n".join(json.dumps(dict(zip(head.split(","), row))) for row in rows)
    if kind == "csv":
        rows = [[quoted(cell) for cell in row] for row in rows]
    return head + "\n" + "\n".join(",".join(row) for row in rows)


@EXAMPLES
def test_any_metadata_row_is_read_or_refused_in_one_line(tmp_path_factory, examples):
    folder = tmp_path_factory.mktemp("rows")
    write_tones(folder, 4)

    @settings(max_examples=examples, **SEARCH)
    @given(ROWS, st.sampled_from(["csv", "raw", "jsonl"]), st.sampled_from(HEADS),
           st.sampled_from([0.0, 0.5, 0.99]))
    def check(rows, kind, head, share):
        for old in folder.glob("metadata.*"):
            old.unlink()
        meta = folder / f"metadata.{'jsonl' if kind == 'jsonl' else 'csv'}"
        meta.write_text(table_text(rows, kind, head), encoding="utf-8", errors="surrogatepass", newline="")
        val_fold = 1 if "fold" in head.split(",") else None
        for split in ("train", "val"):
            try:
                clips = AudioFolder(folder, split, val_fold, share)
            except UserError as e:
                assert "\n" not in printable(str(e)) and str(folder) in str(e)
            else:
                assert all(path.resolve().is_relative_to(folder.resolve()) for path in clips.paths)
                for caption in (caption for captions in clips.captions for caption in captions):
                    assert caption.isprintable() and caption.strip()
    check()


@EXAMPLES
@pytest.mark.parametrize("ext", ["wav", "flac", "ogg"])
def test_any_bytes_in_an_audio_header_end_in_finite_sound_or_one_line(tmp_path, ext, examples):
    """Random bytes written into the first 128 of a file (or anywhere), pieces cut off: no crash, no hang, no
    memory, no NaN."""
    good = write_tone(tmp_path / f"good.{ext}", 0.3).read_bytes()
    path = tmp_path / f"bad.{ext}"
    before, outcomes = peak_memory(), {"read": 0, "refused": 0}
    place = st.integers(0, 127) | st.integers(0, len(good) - 1)
    byte = st.integers(0, 255) | st.sampled_from([0, 1, 127, 128, 255])

    @settings(max_examples=examples, **SEARCH)
    @given(st.lists(st.tuples(place, byte), min_size=1, max_size=8),
           st.integers(1, len(good)) | st.just(len(good)))
    def check(changes, length):
        raw = bytearray(good)
        for at, value in changes:
            raw[at] = value
        path.write_bytes(raw[:length])
        try:
            x = read_audio(path)
        except UserError as e:
            assert path.name in str(e) and "\n" not in str(e)
            outcomes["refused"] += 1
        else:
            assert x.dtype == np.float32 and x.ndim == 1 and len(x) <= LONGEST_S * RATE
            assert np.isfinite(x).all()
            outcomes["read"] += 1
        assert len(_decode_chunk([0], [path], [1_000])) == 1_000
    check()
    assert peak_memory() - before < 1e6
    assert outcomes["refused"]
    assert outcomes["read"] or ext != "wav", "checksums of flac and ogg notice nearly everything"
    path.write_bytes(good)
    assert len(read_audio(path)) == round(0.3 * RATE), "negative control: the untouched file is read"


# --- what comes from elsewhere: run folders -----------------------------------------------------------------

@pytest.mark.parametrize("change, message", [
    ({"width": 64}, "width is 64 in config.json and 32 in checkpoint.pt"),
    ({"task": "sr"}, "task is 'sr' in config.json and 't2a' in checkpoint.pt"),
    ({"depth": "many"}, "depth is 'many', not of type int"),
    ({"width": 10**9}, "width 1000000000: must be"),
    ({"depth": 10**9}, "depth 1000000000: must be"),
    ({"guidance": "magic"}, "guidance is 'magic', not one of"),
    ({"new_idea": 1}, "unknown setting 'new_idea'.*version"),
    ({"width": True}, "width is True"),
    ({"lr": float("nan")}, "lr nan: must be a finite number"),
])
def test_settings_from_elsewhere_are_refused_by_the_field_that_differs(t2a_run, tmp_path, change, message):
    run = copy_of(t2a_run, tmp_path / "run")
    fields = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**fields, **change}))
    with pytest.raises(UserError, match=message):
        evaluate.load_run(run)
    with pytest.raises(UserError, match=message):
        train.train({}, str(run))
    del fields["gamma"]
    (run / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="no setting 'gamma'"):
        evaluate.load_run(run)


def test_checkpoints_of_another_version_or_kind_are_refused_by_name(t2a_run, tmp_path):
    run = copy_of(t2a_run, tmp_path / "run")
    good = torch.load(run / "checkpoint.pt", weights_only=True)
    assert good["version"] == checkpoints.VERSION
    (run / "checkpoint-previous.pt").unlink()
    ema = good["ema"]
    misshapen = {**ema, "head.weight": torch.zeros(3, 3)}
    incomplete = {name: weight for name, weight in ema.items() if name != "head.bias"}
    for change, message in (
            ({"version": 1}, f"of version 1, this code reads version {checkpoints.VERSION}"),
            ({"version": 99}, "of version 99"),
            ({"ema": misshapen}, "size mismatch for head.weight"),
            ({"ema": incomplete}, "head.bias"),
            ({"ema": 5}, "can't be read .*ema is a int"),
            ({"words": [1, 2]}, "lacks a part")):
        torch.save({**good, **change}, run / "checkpoint.pt")
        with pytest.raises(UserError, match=message):
            evaluate.load_run(run)
    torch.save([1, 2], run / "checkpoint.pt")
    with pytest.raises(UserError, match="can't be read"):
        evaluate.load_run(run)


def test_every_setting_of_a_run_passes_its_own_check(t2a_run, sr_run):
    for run in (t2a_run, sr_run, ASSETS / "demo", ASSETS / "demo-sr"):
        assert validate_config(json.loads((run / "config.json").read_text())) is None
    assert validate_config({})


def test_the_command_line_ends_with_status_2_for_a_run_of_another_version(t2a_run, tmp_path):
    run = copy_of(t2a_run, tmp_path / "run")
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save({**checkpoint, "version": 1}, run / "checkpoint.pt")
    done = in_process(evaluate, "generate", run, "--prompt", "rain", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "version 1" in done.stderr
    assert not list(tmp_path.glob("*.wav"))
