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
import soundfile
import torch
from conftest import ROOT, in_process
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import config
import data
import evaluate as E
import guidance
import regime
import structure_reg
import train
from data import RATE, AudioFolder, UserError
from model import Codec

EXAMPLES = pytest.mark.parametrize("examples", [50, pytest.param(500, marks=pytest.mark.slow)])


def copy_of(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


def tone(path: Path, seconds: float = 0.5, rate: int = RATE, hz: float = 440) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate), rate)
    return path


def folder_with(tmp_path: Path, rows: list[tuple[str, str]], head: str = "file_name,caption") -> Path:
    (tmp_path / "metadata.csv").write_text(head + "\n" + "".join(f"{a},{b}\n" for a, b in rows), encoding="utf-8")
    return tmp_path


def few(tmp_path: Path, n: int = 10) -> list[tuple[str, str]]:
    return [(tone(tmp_path / f"{k}.wav", hz=200 + 50 * k).name, f"a tone of {k}") for k in range(n)]


# --- crashes ----------------------------------------------------------------------------------------------------------------

def final(run: Path) -> dict:
    """A run's checkpoint without what a clock or a path wrote."""
    return {k: v for k, v in torch.load(run / "checkpoint.pt", weights_only=True).items() if k not in ("seconds", "config")}


def log_of(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for r in rows:
        for clocked in ("step_s", "memory_mb"):
            r.pop(clocked, None)
        r.get("eval", {}).pop("seconds", None)
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
    if how == "gone":
        path.unlink()
    else:
        raw = path.read_bytes()
        path.write_bytes(raw[: len(raw) // 2] if how == "cut" else raw[:3_000] + bytes(200) + raw[3_200:] if how == "flipped" else b"")


def test_a_damaged_newest_checkpoint_falls_back_with_a_warning_and_training_ends_the_same(t2a_run, tmp_path, capsys, bare):
    run = copy_of(t2a_run, tmp_path / "run")
    for how in ("gone", "empty", "flipped", "cut"):
        shutil.copy(t2a_run / "checkpoint.pt", run / "checkpoint.pt")
        spoil(run / "checkpoint.pt", how)
        assert E.load_checkpoint(run)[1]["step"] == 6
        err = capsys.readouterr().err
        assert "warning" in err and ("is missing" if how == "gone" else "is damaged") in err and "checkpoint-previous.pt, step 6" in err
    train.train({}, str(run))
    assert same(final(run), final(t2a_run))
    steps = lambda p: [json.loads(line)["step"] for line in (p / "log.jsonl").read_text().splitlines()]
    assert steps(run) == steps(t2a_run)
    for name in E.CHECKPOINTS:
        spoil(run / name, "cut")
    with pytest.raises(UserError, match="can't be read"):
        E.load_checkpoint(run)


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
    """By the system's limit on the size of a file, which fails as a full disk does: in the middle of a write."""
    run = copy_of(t2a_run, tmp_path / "run")
    _, before = E.load_checkpoint(run)
    size = (run / "checkpoint.pt").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises(UserError, match=r"checkpoint\.pt: can't be written \(File too large\).*--resume") as e:
            train.train({"steps": 14}, str(run))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(str(e.value).splitlines()) == 1 and not list(run.glob("*.tmp"))
    assert E.load_checkpoint(run)[1]["step"] == before["step"] == 12
    train.train({}, str(run))
    assert E.load_checkpoint(run)[1]["step"] == 14
    log = E.Log(run / "log.jsonl", 14)
    log.file = open("/dev/full", "a", buffering=1)
    with pytest.raises(UserError, match=r"log\.jsonl: can't be written \(No space left on device\)"):
        log({"step": 15})


def test_caches_take_their_room_before_they_are_filled(tmp_path):
    full = data.fill_array(tmp_path, "x", (1_000, 1_000), np.float32, lambda i: np.zeros((len(i), 1_000), np.float32), 1_000, workers=0, desc="zeros")
    assert (tmp_path / "x.npy").stat().st_blocks * 512 >= full.nbytes, "not a sparse file: a disk that fills up later can't kill the process"
    with pytest.raises(UserError, match="make room"):
        data.fill_array(tmp_path, "y", (10, 10**13), np.float32, None, 10, desc="too much")
    assert not list(tmp_path.glob("y*.npy")) and not list(tmp_path.glob("*.tmp*"))


HOLD = "import data, pathlib, sys, time\nwith data.alone(pathlib.Path(sys.argv[1]), 'x'):\n    print('held', flush=True)\n    time.sleep(60)\n"


def test_a_second_process_is_refused_and_a_killed_ones_lock_is_not_in_the_way(t2a_run, tmp_path, bare):
    run = copy_of(t2a_run, tmp_path / "run")
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another process is training this run"):
        train.train({"steps": 14}, str(run))
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    train.train({"steps": 14}, str(run))
    assert E.load_checkpoint(run)[1]["step"] == 14


@pytest.mark.slow
@pytest.mark.parametrize("task", ["t2a", "sr"])
def test_killed_at_random_moments_and_resumed_it_is_the_run_that_never_stopped(tmp_path, task):
    """kill -9 ten times and more, in preparation, steps, evaluation, checkpoint and table: parameters, optimizer, losses, regime and structure
    bitwise equal; no step of the log missing or double."""
    rng = random.Random(7)
    base = [sys.executable, "train.py", "--task", task, "--recipe", "stage", "--width", "32", "--depth", "4", "--heads", "2", "--channels", "16", "--batch", "8", "--clips", "400", "--warmup", "4",
            "--steps", "400", "--eval-every", "40", "--score-clips", "8", "--sample-steps", "3", "--precision", "fp32", "--device", "cpu", "--workers", "1", "--variants", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "STAGE_AUDIO_CACHE": str(tmp_path / "cache-a")}
    began = time.time()
    subprocess.run([*base, "--out", str(tmp_path / "whole")], cwd=ROOT, env=env, check=True, capture_output=True)
    whole_s = time.time() - began
    run, env["STAGE_AUDIO_CACHE"] = tmp_path / "run", str(tmp_path / "cache-b")
    kills, ended = [], False
    while not ended:
        known = (run / "config.json").exists()
        if run.exists() and not known:  # died while it made the folder
            shutil.rmtree(run)
        p = subprocess.Popen([*base[:2], "--resume", str(run)] if known else [*base, "--out", str(run)], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            out, _ = p.communicate(timeout=3 + rng.random() * whole_s / 3 if len(kills) < 25 else None)
            assert p.returncode == 0, out[-2_000:]
            ended = True
        except subprocess.TimeoutExpired:
            p.kill()
            p.communicate()
            lines = (run / "log.jsonl").read_text().split("\n")[:-1] if (run / "log.jsonl").exists() else []
            kills.append(json.loads(lines[-1])["step"] if lines else None)
    print("killed after steps", kills)
    assert len(kills) >= 5
    whole = tmp_path / "whole"
    assert same(final(run), final(whole)) and same(log_of(run), log_of(whole))
    assert not same(final(run), torch.load(whole / "checkpoint-previous.pt", weights_only=True)), "negative control"


# --- numbers ----------------------------------------------------------------------------------------------------------------

def poisoned(monkeypatch, clips) -> None:
    """Latents of these training clips read as NaN."""
    crop = data.LatentCache.crop
    def bad(self, i, *a):
        z = crop(self, i, *a)
        return z * np.nan if i in clips and len(self) == 100 else z
    monkeypatch.setattr(data.LatentCache, "crop", bad)


def test_a_poisoned_clip_costs_its_steps_and_is_named(tiny, t2a_run, tmp_path, monkeypatch, bare):
    poisoned(monkeypatch, {17})
    run = train.train({**tiny, "steps": 24, "eval_every": 24, "out": str(tmp_path / "run")})
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    skipped = [r for r in rows if "skipped" in r]
    drawn = [17 in np.random.default_rng([0, 1, k]).integers(0, 100, 8) for k in range(1, 25)]
    assert [r["step"] for r in skipped] == [k for k, hit in enumerate(drawn, 1) if hit] and 0 < len(skipped) < 12
    assert all(r["clips"] == ["SoundWorld train clip 17"] for r in skipped)
    assert all(torch.isfinite(v).all() for v in E.load_checkpoint(run)[1]["ema"].values())
    assert all(np.isfinite(r["loss"]) for r in rows if "loss" in r)


def test_ten_bad_steps_in_a_row_end_the_run_with_the_last_good_checkpoint(tiny, t2a_run, tmp_path, monkeypatch, bare):
    run = copy_of(t2a_run, tmp_path / "run")
    poisoned(monkeypatch, set(range(100)))
    with pytest.raises(UserError, match=f"step {12 + train.SKIPS}: no finite gradient in {train.SKIPS} steps"):
        train.train({"steps": 60}, str(run))
    ours, before = (torch.load(p / "checkpoint.pt", weights_only=True) for p in (run, t2a_run))
    assert ours["step"] == 18 and same(ours["model"], before["model"]), "an evaluation on the way saved the weights that did not move"


@pytest.mark.parametrize("name, x", [("silence", np.zeros(RATE)), ("clipped", np.sign(np.sin(np.arange(RATE) * 0.3))), ("DC", np.full(RATE, 0.5)), ("denormals", np.full(RATE, 1e-40)), ("one click", np.eye(1, RATE)[0])])
def test_degenerate_sound_stays_finite_from_codec_to_metrics(name, x, waves):
    x = x.astype(np.float32)
    codec = Codec(16).fit([*waves[:8], *[x] * 3])
    z = codec.encode(torch.from_numpy(x)[None])
    assert torch.isfinite(z).all() and torch.isfinite(codec.decode(z)).all()
    teacher = guidance.load_teacher()
    phi = guidance.Ear(codec, teacher)(z)
    pred = torch.zeros_like(phi, requires_grad=True)  # a projector whose output is constant, or dead
    guidance.alignment_loss(pred, phi - phi.mean((0, 1)), None).backward()
    assert torch.isfinite(phi).all() and torch.isfinite(pred.grad).all()
    heard = E.listen(E.load_judge("dev"), [x, x])
    assert all(np.isfinite(v).all() for v in heard.values())
    for ref, est in ((x, x), (waves[0][:RATE], x), (x, waves[0][:RATE])):
        bands = [E.high_band_mel(a, 2_000) for a in (ref, est)]
        numbers = [E.si_sdr(ref, est), *E.lsd(E.log_power(ref), E.log_power(est), 2_000).values(), E.energy_score(bands[0], [bands[1]] * 2)]
        assert np.isfinite(numbers).all(), numbers
    for a in (np.zeros((9, 4)), np.ones((9, 4))):
        assert np.isfinite([E.kid(np.ones((9, 4)), a), E.kid(a, np.ones((9, 4))), E.frechet(np.ones((9, 4)), a)]).all()
    assert all(v is None or np.isfinite(v) for v in E.describe(x).values())
    y = data.band_limit(x, 2_000)
    assert np.isfinite(y).all()
    hs = [torch.zeros(2, 5, 8, requires_grad=True) for _ in range(5)]
    for loss in structure_reg.LOSSES.values():
        loss(hs, [0, 0, 1, 1], None).backward()
    assert all(h.grad is None or torch.isfinite(h.grad).all() for h in hs)
    D = regime.probe(lambda x_t, t: torch.zeros_like(x_t), torch.nn.Identity(), z.detach(), torch.randn(z.shape), (1.0,), None, z.detach(), None)
    assert np.isfinite(list(D.values())).all()


# --- what comes from elsewhere ------------------------------------------------------------------------------------------------

def test_paths_in_metadata_may_not_leave_the_folder(tmp_path):
    secret, home = tone(tmp_path / "secret" / "own.wav"), tmp_path / "set"
    rows = few(home)
    (home / "link.wav").symlink_to(secret)
    (home / "inside.wav").symlink_to(home / "3.wav")
    (home / "loop.wav").symlink_to(home / "loop.wav")
    (home / "dir").symlink_to(home)  # a loop of folders
    (home / "away").symlink_to(secret.parent)
    assert len(AudioFolder(folder_with(home, rows + [("inside.wav", "x")]), "train")) == 10, "a link within the folder is fine"
    for bad in ("../secret/own.wav", str(secret), "link.wav", "away/own.wav"):
        with pytest.raises(UserError, match="row 12: leads to .*outside of"):
            AudioFolder(folder_with(home, rows + [(bad, "x")]), "train", max_bad_share=0.5)
    for bad in ("loop.wav", "/dev/zero", "/dev/stdin", "http://example.com/own.wav", "file:///etc/passwd", "a" * 5_000 + ".wav", "dir"):
        with pytest.raises(UserError, match="row 12: no audio file"):
            AudioFolder(folder_with(home, rows + [(bad, "x")]), "train")
    (home / "metadata.csv").unlink()
    (home / "class").mkdir()
    shutil.move(home / "link.wav", home / "class" / "link.wav")
    with pytest.raises(UserError, match="outside of"):
        AudioFolder(home)
    os.mkfifo(home / "class" / "pipe.wav")
    (home / "class" / "link.wav").unlink()
    tone(home / "class" / "ok.wav")
    assert [p.name for p in AudioFolder(home, "val").paths] == ["ok.wav"], "a pipe is not opened, a loop of folders not followed for ever"


def liar(kind: str, path: Path) -> Path:
    """A short tone whose header claims something else."""
    tone(path, 0.5)
    raw = bytearray(path.read_bytes())
    if path.suffix == ".flac":  # STREAMINFO: 20 bits of rate, 3 of channels, 5 of depth, 36 of samples from byte 18
        word = int.from_bytes(raw[18:26], "big")
        rate, rest, samples = word >> 44, (word >> 36) & 0xFF, word & (1 << 36) - 1
        rate, samples = {"length": (rate, 3_500 * RATE), "long": (rate, (1 << 36) - 1), "rate": (655_350, samples), "slow": (1, samples)}[kind]
        raw[18:26] = (rate << 44 | rest << 36 | samples).to_bytes(8, "big")
    else:
        at = raw.index(b"data")
        if kind in ("length", "long"):
            raw[at + 4 : at + 8] = struct.pack("<I", 0xFFFFFFF0)
            raw[4:8] = struct.pack("<I", 0xFFFFFFFF)
        else:
            raw[24:28] = struct.pack("<I", {"rate": 4_000_000_000, "slow": 1}[kind])
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("ext", ["wav", "flac"])
@pytest.mark.parametrize("kind", ["length", "long", "rate", "slow"])
def test_headers_that_lie_cost_neither_memory_nor_time(tmp_path, kind, ext):
    path = liar(kind, tmp_path / f"liar.{ext}")
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        x = data.read_audio(path)
        assert 0 < len(x) <= RATE and np.isfinite(x).all()  # what is there
    except UserError as e:
        assert "liar" in str(e)
    d = AudioFolder(folder_with(tmp_path, few(tmp_path, 20) + [(path.name, "x")]), max_bad_share=0.1)
    d.prepare(0)
    assert time.process_time() - began < 5 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6  # kB
    assert all(len(d.wave(i)) < 2 * RATE for i in range(len(d)))


def test_unreadable_files_among_good_ones_are_left_out_and_listed_up_to_the_share(tiny, tmp_path, bare):
    rows = few(tmp_path / "set", 40)
    (tmp_path / "set" / "3.wav").write_bytes(b"RIFF")
    rows[20] = (tone(tmp_path / "set" / "20.flac").name, "cut")
    raw = (tmp_path / "set" / "20.flac").read_bytes()
    (tmp_path / "set" / "20.flac").write_bytes(raw[: len(raw) // 2])
    folder = folder_with(tmp_path / "set", rows + [("5.wav", ""), ("6.wav", "a tone of 6"), ("none.wav", "x")])
    with pytest.raises(UserError, match=r"row 42: empty caption; 2 of 43 can't be used, the share 0.01 may be left out \(--max-bad-share\)"):
        data.open_data(str(folder), "train", max_bad_share=0.01)
    run = train.train({**tiny, "task": "sr", "data": str(folder), "max_bad_share": 0.1, "seconds": 0.5, "out": str(tmp_path / "run")})
    listed = (run / "bad.txt").read_text()
    assert len(listed.splitlines()) == 4 and all(x in listed for x in ("3.wav: can't be read", "20.flac: ", "row 42: empty caption", "row 44: no audio file"))
    sets = [data.open_data(str(folder), s, max_bad_share=0.1).prepare(0) for s in ("train", "val")]
    assert sum(map(len, sets)) == 38 and not {"3.wav", "20.flac"} & {p.name for d in sets for p in d.paths}
    assert any("count once" in n for d in sets for n in d.notes)
    for d in sets:  # what is left is what it says
        for i in range(len(d)):
            peak = np.argmax(np.abs(np.fft.rfft(d.wave(i)))) / len(d.wave(i)) * RATE
            assert abs(peak - (200 + 50 * int(Path(d.name(i)).stem))) < 5
    with pytest.raises(UserError, match="3.wav: can't be read|20.flac: "):
        train.train({**tiny, "task": "sr", "data": str(folder), "max_bad_share": 0.05, "seconds": 0.5, "out": str(tmp_path / "none")})
    assert not (tmp_path / "none").exists()


def test_captions_are_made_safe_for_the_terminal_and_cut(tmp_path, capsys):
    rows = few(tmp_path)
    text = "file_name\tcaption\n".replace("\t", ",") + "".join(f'{a},"\x1b]0;owned\x07 {b}\r\n\u202eback\u2028 {"long " * 300}"\n' for a, b in rows)
    (tmp_path / "metadata.csv").write_text(text, encoding="utf-8", newline="")
    d = AudioFolder(tmp_path)
    assert all(c.isprintable() and len(c) <= data.LONGEST_CAPTION and c.startswith("]0;owned a tone of") for cs in d.captions for c in cs)
    assert any("longer than 500" in n for n in d.notes)

    def fail():
        raise UserError("file \x1b[2Jname\nnext")
    with pytest.raises(SystemExit):
        data.run_cli(fail)
    assert capsys.readouterr().err == "error: file  [2Jname next\n"


@pytest.mark.parametrize("raw", ["\ufefffile_name,caption\r\n0.wav,a\r\n1.wav,b\r\n".encode(), b'file_name,caption\n0.wav,"a\nb"\n"1.wav",b\n',
                                 '\ufeff{"file_name": "0.wav", "caption": "a"}\r\n\r\n{"file_name": "1.wav", "caption": "b"}'.encode()])
def test_marks_line_ends_and_quoted_newlines_of_other_systems_are_read(tmp_path, raw):
    few(tmp_path, 2)
    (tmp_path / ("metadata.jsonl" if b"{" in raw else "metadata.csv")).write_bytes(raw)
    assert {c for s in ("train", "val") for cs in AudioFolder(tmp_path, s).captions for c in cs} in ({"a", "b"}, {"a b", "b"})


@pytest.mark.parametrize("name, raw, message", [
    ("metadata.csv", "file_name,caption\n0.wav,a".encode("utf-16"), "save it as UTF-8"), ("metadata.csv", "file_name,caption\n0.wav,a".encode("utf-16-le"), "save it as UTF-8"),
    ("metadata.csv", b"file_name,caption\n0.wav,caf\xe9\n", "save it as UTF-8"), ("metadata.csv", b"file_name,caption,caption\n0.wav,a,b\n", "two columns are named 'caption'"),
    ("metadata.csv", b'file_name,caption\n0.wav,"' + b"x" * 200_000 + b"\n", "after row 1.*quote left open"), ("metadata.csv", b"file_name;caption\n0.wav;a\n", "no column caption"),
    ("metadata.csv", b"file_name,caption\n0.wav,a\n1.wav,b,c\n", "row 3: more fields"), ("metadata.jsonl", b'{"file_name": "0.wav", "caption": "a"}\n[1]\n', "row 2: not a JSON object"),
    ("metadata.jsonl", b'{"file_name": "0.wav", "caption": ' + b"[" * 100_000, "row 1: not valid JSON"), ("metadata.jsonl", b'{"file_name": "0.wav", "caption": ["a"]}\n', "row 1: empty caption"),
    ("metadata.jsonl", b'{"file_name": "0.wav", "n": ' + b"1" * 9_000 + b"}", "row 1: not valid JSON")])
def test_tables_that_cannot_be_read_are_refused_with_the_row_and_the_fix(tmp_path, name, raw, message):
    few(tmp_path, 3)
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=message):
        AudioFolder(tmp_path)


CELLS = st.one_of(st.text(max_size=30), st.sampled_from(["0.wav", "1.wav", "2.wav", "../0.wav", "/etc/passwd", "0", "a dog", "", " ", "_", "\x00", "\ud800", "\u202e", "0.WAV", "metadata.csv", "nan", "-1"]))


@EXAMPLES
def test_any_metadata_row_is_read_or_refused_in_one_line(tmp_path_factory, examples):
    folder = tmp_path_factory.mktemp("rows")
    few(folder, 4)

    @settings(max_examples=examples, deadline=5_000, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(st.lists(st.lists(CELLS, min_size=1, max_size=4), min_size=1, max_size=6), st.sampled_from(["csv", "raw", "jsonl"]),
           st.sampled_from(["file_name,caption", "filename,fold,category", "youtube_id,start_time,caption", "file_name,caption_1,caption_2", "caption"]), st.sampled_from([0.0, 0.5, 0.99]))
    def check(rows, kind, head, share):
        for old in folder.glob("metadata.*"):
            old.unlink()
        names = head.split(",")
        if kind == "jsonl":
            text = "\n".join(json.dumps(dict(zip(names, row))) for row in rows)
        else:
            text = head + "\n" + "\n".join(",".join('"' + c.replace('"', '""') + '"' if kind == "csv" else c for c in row) for row in rows)
        (folder / f"metadata.{'jsonl' if kind == 'jsonl' else 'csv'}").write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
        for split in ("train", "val"):
            try:
                d = AudioFolder(folder, split, 1 if "fold" in names else None, share)
            except UserError as e:
                assert "\n" not in data.printable(str(e)) and str(folder) in str(e)
            else:
                assert all(p.resolve().is_relative_to(folder.resolve()) for p in d.paths)
                assert all(c.isprintable() and c.strip() for cs in d.captions for c in cs)
    check()


@EXAMPLES
@pytest.mark.parametrize("ext", ["wav", "flac", "ogg"])
def test_any_bytes_in_an_audio_header_end_in_finite_sound_or_one_line(tmp_path, ext, examples):
    """Random bytes written into the first 128 of a file (or anywhere), pieces cut off: no crash, no hang, no memory, no NaN."""
    good = tone(tmp_path / f"good.{ext}", 0.3).read_bytes()
    before, path = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, tmp_path / f"bad.{ext}"
    outcomes = {"read": 0, "refused": 0}

    @settings(max_examples=examples, deadline=5_000, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(st.lists(st.tuples(st.integers(0, 127) | st.integers(0, len(good) - 1), st.integers(0, 255) | st.sampled_from([0, 1, 127, 128, 255])), min_size=1, max_size=8), st.integers(1, len(good)) | st.just(len(good)))
    def check(changes, length):
        raw = bytearray(good)
        for at, byte in changes:
            raw[at] = byte
        path.write_bytes(raw[:length])
        try:
            x = data.read_audio(path)
        except UserError as e:
            assert path.name in str(e) and "\n" not in str(e)
            outcomes["refused"] += 1
        else:
            assert x.dtype == np.float32 and x.ndim == 1 and np.isfinite(x).all() and len(x) <= data.LONGEST_S * RATE
            outcomes["read"] += 1
        assert len(data._decode_chunk([0], [path], [1_000])) == 1_000
    check()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6  # kB
    assert outcomes["refused"] and (outcomes["read"] or ext != "wav"), "checksums of flac and ogg notice nearly everything"
    path.write_bytes(good)
    assert len(data.read_audio(path)) == round(0.3 * RATE), "negative control: the untouched file is read"


@pytest.mark.parametrize("change, message", [
    ({"width": 64}, "width is 64 in config.json and 32 in checkpoint.pt"), ({"task": "sr"}, "task is 'sr' in config.json and 't2a' in checkpoint.pt"), ({"depth": "many"}, "depth is 'many', not of type int"),
    ({"width": 10**9}, "width 1000000000: must be"), ({"depth": 10**9}, "depth 1000000000: must be"), ({"guidance": "magic"}, "guidance is 'magic', not one of"), ({"new_idea": 1}, "unknown setting 'new_idea'.*version"),
    ({"width": True}, "width is True"), ({"lr": float("nan")}, "lr nan: must be positive")])
def test_settings_from_elsewhere_are_refused_by_the_field_that_differs(t2a_run, tmp_path, change, message):
    run = copy_of(t2a_run, tmp_path / "run")
    fields = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**fields, **change}))
    for use in (E.load_run, lambda p: train.train({}, str(p))):
        with pytest.raises(UserError, match=message):
            use(run)
    del fields["gamma"]
    (run / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="no setting 'gamma'"):
        E.load_run(run)


def test_checkpoints_of_another_version_or_kind_are_refused_by_name(t2a_run, tmp_path):
    run = copy_of(t2a_run, tmp_path / "run")
    good = torch.load(run / "checkpoint.pt", weights_only=True)
    assert good["version"] == E.VERSION
    (run / "checkpoint-previous.pt").unlink()
    for change, message in (({"version": 1}, "of version 1, this code reads version 2"), ({"version": 99}, "of version 99"), ({"ema": {**good["ema"], "head.weight": torch.zeros(3, 3)}}, "size mismatch for head.weight"),
                            ({"ema": {k: v for k, v in good["ema"].items() if k != "head.bias"}}, "head.bias"), ({"ema": 5}, "lacks a part, or holds something else"), ({"words": [1, 2]}, "lacks a part")):
        torch.save({**good, **change}, run / "checkpoint.pt")
        with pytest.raises(UserError, match=message):
            E.load_run(run)
    torch.save([1, 2], run / "checkpoint.pt")
    with pytest.raises(UserError, match="can't be read"):
        E.load_run(run)


def test_every_setting_of_a_run_passes_its_own_check(t2a_run, sr_run):
    for run in (t2a_run, sr_run, *(E.ASSETS / d for d in ("demo", "demo-sr"))):
        assert config.foreign(json.loads((run / "config.json").read_text())) is None
    assert config.foreign([]) and config.foreign({}) and config.foreign(5)


def test_the_command_line_ends_with_status_2_for_a_run_of_another_version(t2a_run, tmp_path):
    run = copy_of(t2a_run, tmp_path / "run")
    torch.save({**torch.load(run / "checkpoint.pt", weights_only=True), "version": 1}, run / "checkpoint.pt")
    done = in_process(E, "generate", run, "--prompt", "rain", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "version 1" in done.stderr and not list(tmp_path.glob("*.wav"))
