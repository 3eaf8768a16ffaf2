"""What is typed wrongly, copied halfway or taken from elsewhere ends in one line that names it, and nothing
of the user's is lost. (Sound files: test_audio_files.py; crashes and floods: test_robust.py.)"""
import copy
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import in_process
from folders import make_folder, write_tone
from run_files import a_run, final, save

import evaluate
import train
from lab import block_work, experiments, pretrain_teacher, regime_choice, report, runner, train_decoder
from parts import arguments, checkpoints, config, devices, moments, preparation, runs
from parts.audio import RATE, write_wav
from parts.audio_files import read_audio
from parts.cache import cache_dir, fill_array
from parts.errors import UserError
from parts.files import read_json, write_text
from parts.recordings import AudioFolder


def refused(module, *argv, cwd, message: str) -> None:
    """The command ends with status 2 and one line, which holds `message`."""
    done = in_process(module, *argv, cwd=cwd)
    assert done.returncode == 2 and message in done.stderr, (argv, done.stderr[-600:])
    assert len([line for line in done.stderr.splitlines() if "error:" in line]) == 1
    assert "Traceback" not in done.stderr


def tones(folder: Path, rows: dict[str, list[str]], n: int = 6) -> Path:
    """n tones, and for each table its lines; returns the folder."""
    for k in range(n):
        write_tone(folder / f"{k}.wav", hz=200 + 50 * k)
    for name, lines in rows.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


# --- settings that do nothing -------------------------------------------------------------------------------

@pytest.mark.parametrize("typed, needed", [
    ("--m 3", "--timesteps constant"), ("--s 0.5", "--timesteps constant"),
    ("--stop-at 0.4", "--guidance constant"), ("--recipe static --gamma 2", "--guidance adaptive"),
    ("--recipe static --m-late 0", "--timesteps adaptive"), ("--recipe vanilla --lambda0 1", "--guidance"),
    ("--recipe static --struct-share 0.3", "--structure"), ("--recipe static --regime clock", "adaptive"),
    ("--optimizer adamw --muon-lr 1e-3", "--optimizer muon"), ("--val-fold 5", "--data FOLDER"),
    ("--task sr --guidance-scale 4", "--task t2a"), ("--task sr --judge final", "--task t2a"),
    ("--task sr --text m", "--task t2a"), ("--variants 9", "--task sr"), ("--teacher-layer 3", "pretrained"),
    ("--data x --clips 500", "--data soundworld"), ("--max-bad-share 0.1", "--data FOLDER"),
    ("--recipe vanilla --teacher random", "--guidance"), ("--regime clock --regime-signal t0.5", "slope"),
])
def test_a_setting_that_would_change_nothing_is_refused_with_what_it_needs(typed, needed):
    flag = [word for word in typed.split() if word.startswith("--")][-1]
    with pytest.raises(UserError, match="changes nothing here; it needs") as error:
        config.parse(typed.split())
    assert str(error.value).startswith(flag) and needed in str(error.value)


@pytest.mark.parametrize("typed", [
    "--recipe static --m 3 --s 0.5 --stop-at 0.4", "--m-late 0 --gamma 2 --regime clock --struct-share 0.3",
    "--recipe infonoise --m 0", "--recipe static --probe always --regime loss", "--val-fold 5 --data x",
    "--data x=1,soundworld=1 --val-fold 2", "--guidance-scale 4 --judge final", "--timesteps constant --m 3",
    "--task sr --variants 9", "--data x=1,soundworld=1 --clips 500 --max-bad-share 0.1", "--teacher random",
    "--recipe vanilla --probe always --regime-signal t0.5 --teacher random", "--teacher m --teacher-layer 3",
])
def test_a_setting_that_acts_is_taken(typed):
    assert config.parse(typed.split())[0]


def test_an_empty_name_is_no_run_and_no_folder():
    with pytest.raises(UserError, match="--resume: empty"):
        config.parse(["--resume", ""])
    with pytest.raises(UserError, match="--data : must be soundworld, a folder"):
        config.resolve({"data": "", "device": "cpu"})


@pytest.mark.parametrize("argv, message", [
    (["--judge", "final"], "--judge: for captions"),
    (["--guidance-scale", "3"], "--guidance-scale: for captions"),
    (["--clap", "x"], "--clap: for captions"), (["--val-fold", "2"], "--val-fold 2: belongs to --data"),
    (["--max-bad-share", "0.5"], "--max-bad-share 0.5: belongs to --data"),
])
def test_a_score_is_not_asked_for_what_it_has_not(sr_run, tmp_path, argv, message):
    refused(evaluate, "score", sr_run, *argv, cwd=tmp_path, message=message)


def test_captions_have_no_cutoff(t2a_run, tmp_path):
    refused(evaluate, "score", t2a_run, "--cutoff", 3_000, cwd=tmp_path,
            message="--cutoff 3000: for super-resolution")


def test_a_flag_of_another_command_is_not_said_to_be_misspelt(tmp_path):
    message = "--cutoff: not a flag of this command"
    refused(evaluate, "sounds", "x", "--cutoff", "9", cwd=tmp_path, message=message)


@pytest.mark.parametrize("name", ["cpu:", "cpu:00", "cpu:1", "cpu:\u0660", "cpu:x"])
def test_a_device_that_torch_would_not_know_is_refused(name):
    with pytest.raises(UserError, match="no such device"):
        devices.pick_device(name)
    assert devices.pick_device("cpu:0") == "cpu:0"


# --- arms ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, message", [
    ({"optimizer": "sgd"}, "arm 'mine': --optimizer is 'sgd', not one of muon, adamw"),
    ({"guidance": "on"}, "--guidance is 'on', not one of"), ({"task": "tts"}, "--task is 'tts', not one of"),
    ({"compile": "yes"}, "--compile is 'yes', not of type bool"), ({"steps": "many"}, "not of type int"),
    ({"lr": "1e-3"}, "--lr is '1e-3', not of type float"), ({"recipe": "soup"}, "--recipe is 'soup'"),
    ({"preset": "huge"}, "--preset is 'huge'"), ({"regime": 5}, "--regime is 5, not of type str"),
    ({"regime": "ramp:abc"}, "ramp:abc: must be ramp:SHARE"), ({"regime": "ramp:0"}, "must be ramp:SHARE"),
    ({"regime": "yoked:nobody"}, "there is no arm 'nobody'"), ({"device": 3}, "--device is 3, not of type"),
    ({"lambda0": 1e300}, "--lambda0 1e+300: must be from 0 to 1000"),
])
def test_an_arm_that_could_not_be_run_is_refused_before_any_is(tmp_path, options, message):
    refused(experiments, "run", "E1", "--arm", f"mine={json.dumps(options)}", "--out", tmp_path / "e",
            "--dry-run", cwd=tmp_path, message=message)


@pytest.mark.parametrize("arms, message", [
    (['static={"lambda0": 0}'], "arm 'static': there is an arm 'static'"),
    (['mine={"lambda0": 1}', 'mine={"lambda0": 2}'], "arm 'mine': there is an arm 'mine'"),
    (['a b={"lambda0": 1}', 'a-b={"lambda0": 2}'], "arm 'a-b': there is an arm 'a b', and runs of both"),
    (['?={"lambda0": 1}'], "arm '?': must be"),
])
def test_an_arm_whose_runs_would_be_taken_for_anothers_is_refused(tmp_path, arms, message):
    typed = [word for arm in arms for word in ("--arm", arm)]
    refused(experiments, "run", "E1", *typed, "--out", tmp_path / "e", "--dry-run", cwd=tmp_path,
            message=message)


def test_a_file_of_arms_that_is_none_is_named(tmp_path):
    for content in (b"\xff\xfe", b"{", b"[]", b'{"a": {}, "a": {}}', 9_999 * b"["):
        (tmp_path / "arms.json").write_bytes(content)
        refused(experiments, "run", "E1", "--arms", tmp_path / "arms.json", "--dry-run", cwd=tmp_path,
                message="arms.json: not a JSON file of arms")


def test_damaged_files_of_an_experiment_are_named(tmp_path):
    for content in ("{", "[]", "{}", '{"experiment": "E1", "arms": [], "seeds": [], "reference": "x"}',
                    '{"experiment": "E99", "arms": {}, "seeds": [], "reference": "x"}',
                    '{"experiment": "E1", "arms": {"x": 1}, "seeds": [], "reference": "x"}',
                    '{"experiment": "E1", "arms": {}, "seeds": ["0"], "reference": "x"}'):
        (tmp_path / "experiment.json").write_text(content)
        refused(experiments, "table", tmp_path, cwd=tmp_path, message="experiment.json: damaged")
    spec = {"experiment": "E1", "arms": {"static": {}}, "seeds": [0], "reference": "static"}
    (tmp_path / "experiment.json").write_text(json.dumps(spec))
    (tmp_path / "rows.jsonl").write_text('{"arm": "static", "seed": 0}\n{"arm": "sta')
    refused(experiments, "table", tmp_path, cwd=tmp_path, message="rows.jsonl, line 2: damaged")
    for row in ('{"arm": "static", "seed": "0"}', '{"arm": "static", "seed": 0, "config": 5}', "5"):
        (tmp_path / "rows.jsonl").write_text(row + "\n")
        refused(experiments, "table", tmp_path, cwd=tmp_path, message="rows.jsonl, line 1: damaged")


def test_a_damaged_run_of_an_experiment_is_named_with_the_fix(t2a_run, tmp_path):
    run = tmp_path / "runs" / "static-s0"
    shutil.copytree(t2a_run, run)
    spec = {"experiment": "E1", "arms": {"static": {}}, "seeds": [0], "reference": "static"}
    (tmp_path / "experiment.json").write_text(json.dumps(spec))
    damaged = {"made.json": "[]", "axes.json": "{", "config.json": "5", "log.jsonl": "5\n"}
    for name, content in damaged.items():
        whole = (run / name).read_bytes() if (run / name).exists() else None
        (run / name).write_text(content)
        refused(experiments, "table", tmp_path, cwd=tmp_path, message=name)
        if whole is None:
            (run / name).unlink()
        else:
            (run / name).write_bytes(whole)


def test_an_experiment_whose_runs_all_fail_claims_no_folder(tmp_path):
    """So that it can be asked for again, rightly. A folder of silence passes as one of recordings."""
    for k in range(25):
        write_tone(tmp_path / "set" / "class" / f"{k}.wav", 0.5, level=0)
    done = in_process(experiments, "run", "E1", "--only", "static", "--seeds", 1, "--steps", 2,
                      "--data", tmp_path / "set", "--out", tmp_path / "e", cwd=tmp_path)
    assert done.returncode and "FAILED static, seed 0" in done.stdout, done.stderr[-600:]
    assert not (tmp_path / "e" / "experiment.json").exists()


def test_a_narrower_command_leaves_an_experiment_as_large_as_it_was(tmp_path):
    wide = {"experiment": "E1", "arms": {"static": {"lr": 1.0}, "stage": {"lr": 1.0}}, "seeds": [0, 1],
            "reference": "static", "pilot": False}
    experiments._write_spec(tmp_path, wide)
    narrow = {"arms": {"stage": {"lr": 1.0}}, "seeds": [1], "reference": "stage"}
    experiments._write_spec(tmp_path, {**wide, **narrow})
    assert read_json(tmp_path / "experiment.json") == wide
    with pytest.raises(UserError, match="holds arm 'stage' with lr 1.0, not 2.0"):
        experiments._write_spec(tmp_path, {**wide, "arms": {"stage": {"lr": 2.0}}})


# --- recordings ---------------------------------------------------------------------------------------------

def test_a_file_in_both_splits_is_refused(tmp_path):
    head, *rows = "file_name,caption", *(f"{k}.wav,a tone of {k}" for k in range(6))
    apart = tones(tmp_path, {"train.csv": [head, *rows[3:]], "test.csv": [head, *rows[:3]]})
    sets = [preparation.open_data(str(apart), split) for split in ("train", "val")]
    preparation._refuse_other_clips("x", *sets, None, "")
    tones(tmp_path, {"train.csv": [head, *rows]})
    sets = [preparation.open_data(str(apart), split) for split in ("train", "val")]
    with pytest.raises(UserError, match="3 files are in the training and in the validation split.*0.wav"):
        preparation._refuse_other_clips("x", *sets, None, "")


def test_a_file_in_two_folds_is_refused(tmp_path):
    rows = [f"{k}.wav,a tone of {k},{fold}" for fold in (1, 2) for k in range(6)]
    tones(tmp_path, {"metadata.csv": ["file_name,caption,fold", *rows]})
    sets = [preparation.open_data(str(tmp_path), split, val_fold=1) for split in ("train", "val")]
    with pytest.raises(UserError, match="6 files are in the training and in the validation split"):
        preparation._refuse_other_clips("x", *sets, None, "")


def test_a_file_that_is_written_in_two_ways_is_one_clip(tmp_path):
    (tmp_path / "a").mkdir()
    for k in range(6):
        (tmp_path / f"link-{k}.wav").symlink_to(tmp_path / f"{k}.wav")
    rows = [f"{way}{k}.wav,a tone of {k}" for k in range(6) for way in ("", "a/../", "link-")]
    folder = tones(tmp_path, {"metadata.csv": ["file_name,caption", *rows]})
    train_set, val_set = (AudioFolder(folder, split) for split in ("train", "val"))
    assert (len(train_set), len(val_set), train_set.wordings(0)) == (5, 1, 1)
    assert not train_set.files & val_set.files


def test_sound_files_that_are_not_read_are_counted_by_kind(tmp_path):
    (tmp_path / "dog").mkdir()
    tones(tmp_path / "dog", {})
    for k in range(3):
        (tmp_path / "dog" / f"{k}.m4a").write_bytes(b"x")
    (tmp_path / "dog" / "lost.wav").symlink_to(tmp_path / "nowhere.wav")
    (note,) = AudioFolder(tmp_path, "train").notes
    assert "3 .m4a" in note and "1 links that lead nowhere" in note and ".flac" in note
    table = tones(tmp_path / "dog", {"metadata.csv": ["file_name,caption", "0.wav,a", "1.m4a,b"]})
    with pytest.raises(UserError, match="row 3: '1.m4a' is not of a kind that is read"):
        AudioFolder(table, "train")


def test_rows_are_counted_as_an_editor_counts_lines(tmp_path):
    lines = ["file_name,caption", "", "0.wav,a", "", "1.wav,b", "none.wav,c"]
    with pytest.raises(UserError, match="row 6: no audio file for 'none.wav'"):
        AudioFolder(tones(tmp_path, {"metadata.csv": lines}), "train")


def test_a_class_folder_that_is_a_link_is_refused_and_not_left_out(tmp_path):
    for name in ("cat", "dog"):
        tones(tmp_path / "elsewhere" / name, {})
    (tmp_path / "set").mkdir()
    shutil.copytree(tmp_path / "elsewhere" / "cat", tmp_path / "set" / "cat")
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    with pytest.raises(UserError, match="dog: a link to a folder, which is not followed; copy"):
        AudioFolder(tmp_path / "set")


def test_folders_named_as_splits_are_splits_and_one_alone_is_a_class(tmp_path):
    for name in ("train", "test"):
        tones(tmp_path / "split" / name, {})
        tones(tmp_path / "classes" / name, {})
    tones(tmp_path / "classes" / "dog", {})
    train_set, val_set = (AudioFolder(tmp_path / "split", split) for split in ("train", "val"))
    assert {path.parent.name for path in train_set.paths} == {"train"} and train_set.caption(0) == ""
    assert {path.parent.name for path in val_set.paths} == {"test"}
    classes = AudioFolder(tmp_path / "classes")
    assert {classes.caption(i) for i in range(len(classes))} == {"dog", "test", "train"}


def test_recordings_without_captions_train_super_resolution_alone(tiny, tmp_path):
    tones(tmp_path / "set", {}, 30)
    settings = {**tiny, "data": str(tmp_path / "set"), "steps": 2, "seconds": 0.5, "channels": 4}
    with pytest.raises(UserError, match="0.wav: nothing says what it is"):
        train.train({**settings, "task": "t2a", "out": str(tmp_path / "t2a")})
    assert not (tmp_path / "t2a").exists()
    assert final(train.train({**settings, "task": "sr", "out": str(tmp_path / "sr")}))["step"] == 2


def test_a_run_folder_among_the_recordings_is_refused(tiny, tmp_path):
    tones(tmp_path / "set" / "dog", {}, 30)
    for inside in (tmp_path / "set", tmp_path / "set" / "dog" / "run"):
        with pytest.raises(UserError, match="not empty|lies in the folder of recordings"):
            train.train({**tiny, "data": str(tmp_path / "set"), "out": str(inside)})
    assert len(list((tmp_path / "set").rglob("*"))) == 31, "nothing was left there"


def test_a_column_split_says_what_is_held_out(tmp_path):
    splits = ["train", "Training", "val", "train", "test", "train"]
    rows = [f"{k}.wav,a tone of {k},{split}" for k, split in enumerate(splits)]
    folder = tones(tmp_path, {"metadata.csv": ["file_name,caption,split", *rows]})
    for split, names in (("train", ["0", "1", "3", "5"]), ("val", ["2"]), ("test", ["4"])):
        assert [path.stem for path in AudioFolder(folder, split).paths] == names
    tones(tmp_path, {"metadata.csv": ["file_name,caption,split", *rows[:4]]})
    assert [path.stem for path in AudioFolder(folder, "test").paths] == ["2"], "val stands in"
    tones(tmp_path, {"metadata.csv": ["file_name,caption,split", "0.wav,a,7"]})
    with pytest.raises(UserError, match="row 2: split '7' is none of train, val and test"):
        AudioFolder(folder)


def test_a_fold_of_zero_is_a_fold(tmp_path):
    rows = [f"{k}.wav,a tone of {k},{k % 3}" for k in range(6)]
    folder = str(tones(tmp_path, {"metadata.csv": ["file_name,caption,fold", *rows]}))
    val_set = preparation.open_data(folder, "val", val_fold=0)
    assert [path.stem for path in val_set.paths] == ["0", "3"]
    hashed = preparation.open_data(folder, "val", val_fold=config.Config().val_fold)
    assert len(hashed) == 1, "negative control: the default holds out a tenth, at least one"


def test_names_match_however_their_accents_and_bytes_are_written(tmp_path):
    write_tone(tmp_path / "cafe\u0301.wav")
    strange = os.fsdecode(b"b\xff.wav")
    soundfile.write(os.fsencode(tmp_path / strange), np.zeros(800) + 0.1, RATE, format="WAV")
    (tmp_path / "metadata.csv").write_text("file_name,caption\ncaf\u00e9.wav,a tone\n", encoding="utf-8")
    clips = AudioFolder(tmp_path, "val")
    assert [path.name for path in clips.paths] == ["cafe\u0301.wav"]
    assert read_audio(tmp_path / strange).shape == (800,)
    write_text(tmp_path / "page.html", strange)
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "b\\udcff.wav"


def test_several_wordings_may_stand_in_one_list(tmp_path):
    row = '{"file_name": "0.wav", "caption": ["a bell", "a low bell"]}'
    folder = tones(tmp_path, {"metadata.jsonl": [row]})
    assert AudioFolder(folder, "val").captions == [["a bell", "a low bell"]]


def test_files_of_a_low_rate_are_told(tmp_path):
    for k in range(4):
        write_tone(tmp_path / "dog" / f"{k}.wav", rate=8_000 if k < 2 else RATE)
    clips = AudioFolder(tmp_path, "train").prepare(workers=0)
    low = sum(soundfile.info(path).samplerate < RATE for path in clips.paths)
    (note,) = clips.notes
    assert 0 < low and f"{low} of 3 files are sampled at less than 16 kHz (down to 8000 Hz)" in note


def test_a_run_goes_on_with_its_own_recordings_alone_wherever_they_lie(tmp_path, bare, tiny):
    """Negative control: other sounds under the same names."""
    data = tmp_path / "data"
    data.mkdir()
    rows = ["file_name,caption", *(f"{k}.wav,a tone of {k}" for k in range(12))]
    tones(data, {"metadata.csv": rows}, 12)
    settings = {**tiny, "task": "t2a", "recipe": "vanilla", "steps": 2, "channels": 4, "seconds": 0.5,
                "data": str(data), "probe": "never"}
    run = train.train({**settings, "out": str(tmp_path / "run")})
    moved = data.rename(tmp_path / "moved")
    refused(train, "--resume", run, "--steps", 3, cwd=tmp_path, message="no such folder")
    other = shutil.copytree(moved, tmp_path / "other")
    tones(other, {"metadata.csv": [*rows[:-1], "11.wav,katze"]}, 12)
    refused(train, "--resume", run, "--steps", 3, "--data", other, cwd=tmp_path,
            message=f"the training clips of {other} are not those that it was trained on")
    train.train({"steps": 3, "data": str(moved)}, str(run))
    assert final(run)["step"] == 3 and config.load_config(run)["data"] == str(moved)


# --- files that a result would destroy, or that can't be written --------------------------------------------

def test_an_upsampled_recording_never_takes_its_inputs_place(sr_run, tmp_path):
    mine = write_tone(tmp_path / "mine.wav")
    before = mine.read_bytes()
    refused(evaluate, "upsample", sr_run, "--input", mine, "--out", mine, cwd=tmp_path,
            message="is the input")
    assert mine.read_bytes() == before


def test_of_several_clips_none_is_made_where_one_has_no_place(t2a_run, tmp_path):
    (tmp_path / "h-1.wav").mkdir()
    refused(evaluate, "generate", t2a_run, "--prompt", "a bell", "--n", 2, "--out", tmp_path / "h.wav",
            cwd=tmp_path, message="h-1.wav must be a file, and this is a folder")
    assert [path.name for path in tmp_path.iterdir()] == ["h-1.wav"]


def test_a_word_too_many_is_no_flag(tmp_path):
    refused(evaluate, "generate", "run", "--prompt", "a", "bell", cwd=tmp_path,
            message="bell: one argument too many; a text of several words needs quotes")


def test_a_cache_that_is_a_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STAGE_AUDIO_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="file: can't be written .File exists.; set STAGE_AUDIO_CACHE"):
        cache_dir()


def test_a_cache_on_a_disk_that_refuses_is_named_with_the_fix(tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setenv("STAGE_AUDIO_CACHE", str(tmp_path))
    cache_dir()
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match="can't be written .Read-only file system.; set STAGE_AUDIO_CACHE to"):
        cache_dir()


def test_a_file_in_a_folder_that_refuses_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/x/config.json: can't be written .Not a directory"):
        write_text(tmp_path / "file" / "x" / "config.json", "{}")


def test_weights_are_saved_under_a_name_of_their_own(tmp_path):
    for module in (train_decoder, pretrain_teacher):
        refused(module, "--out", "decoder.pt", cwd=tmp_path, message="must be named NAME.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_place_where_nothing_can_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match="must be a file that can be written"):
        arguments.new_file(str(tmp_path / "file" / "x.json"))
    assert arguments.new_file(str(tmp_path / "new" / "x.json")) == tmp_path / "new" / "x.json"


def test_two_runs_of_one_name_are_not_recorded_over_each_other(tmp_path):
    refused(regime_choice, "record", "a/run", "b/run", "--out", tmp_path / "r", cwd=tmp_path,
            message="two runs have folders of one name")
    refused(regime_choice, "means", "a", "b", cwd=tmp_path, message="b: one argument too many")


def test_block_work_refuses_two_runs_of_one_name(t2a_run, tmp_path):
    again = shutil.copytree(t2a_run, tmp_path / t2a_run.name)
    refused(block_work, t2a_run, again, "--out", tmp_path / "w.json", cwd=tmp_path,
            message="is called t2a too")
    assert not (tmp_path / "w.json").exists()


# --- damaged or foreign files -------------------------------------------------------------------------------

def test_sound_that_is_not_finite_is_not_written(tmp_path):
    for bad in (np.nan, np.inf):
        with pytest.raises(UserError, match="the sound that was made is not finite"):
            write_wav(tmp_path / "x.wav", np.array([0.0, bad]))
    assert not (tmp_path / "x.wav").exists()


def test_weights_that_are_not_finite_are_neither_used_nor_published(t2a_run, tmp_path):
    run = shutil.copytree(t2a_run, tmp_path / "run")
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["ema"]["head.weight"][0, 0] = np.nan
    torch.save(state, run / "checkpoint.pt")
    message = "its weights are not finite (head.weight)"
    refused(evaluate, "generate", run, "--prompt", "a bell", cwd=tmp_path, message=message)
    refused(evaluate, "export", run, tmp_path / "e", cwd=tmp_path, message=message)
    assert not (tmp_path / "e").exists()


def test_what_half_precision_or_the_codec_cannot_hold_is_not_published(t2a_run, tmp_path):
    run = shutil.copytree(t2a_run, tmp_path / "run")
    whole = torch.load(run / "checkpoint.pt", weights_only=True)
    for part, name, value in (("ema", "head.weight", 1e5), ("codec", "mean", np.nan)):
        state = copy.deepcopy(whole)
        state[part][name].view(-1)[0] = value
        torch.save(state, run / "checkpoint.pt")
        refused(evaluate, "export", run, tmp_path / "e", cwd=tmp_path, message=f"not finite ({name})")
        assert not (tmp_path / "e").exists()


def test_an_export_with_a_damaged_table_says_that_it_has_none(t2a_run, tmp_path):
    run = shutil.copytree(t2a_run, tmp_path / "run")
    (run / "scores.json").write_text('{"x": {"protocol": null, "rows": [{"row": "model", "exact": 1}]}}')
    assert in_process(evaluate, "export", run, tmp_path / "e", cwd=tmp_path).returncode == 0
    assert "No results are recorded" in (tmp_path / "e" / "README.md").read_text()


@pytest.mark.parametrize("change", [{"r": "high"}, {"eval": 5}, {"eval": {"val_loss": []}}, {"lambda": None},
                                    {"eval": {"val_loss_t": {}}}, {"D_of": {"t0.5": "x"}}, {"density": []}])
def test_a_line_of_a_log_that_holds_the_wrong_kind_is_named(t2a_run, tmp_path, change):
    run = shutil.copytree(t2a_run, tmp_path / "run")
    first, *others = (run / "log.jsonl").read_text().splitlines()
    (run / "log.jsonl").write_text("\n".join([json.dumps({**json.loads(first), **change}), *others]) + "\n")
    for command in ("page", "dashboard"):
        refused(evaluate, command, run, cwd=tmp_path, message="log.jsonl, line 1: damaged")


@pytest.mark.parametrize("kind, lacking", [("loss", "r"), ("loss", "density"), ("loss", "loss_fm"),
                                           ("eval", "val_loss_t")])
def test_a_line_of_a_log_that_lacks_what_pages_draw_is_named(t2a_run, tmp_path, kind, lacking):
    run = shutil.copytree(t2a_run, tmp_path / "run")
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    k = next(k for k, row in enumerate(rows) if kind in row)
    del (rows[k]["eval"] if kind == "eval" else rows[k])[lacking]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for command in ("page", "dashboard"):
        refused(evaluate, command, run, cwd=tmp_path, message=f"log.jsonl, line {k + 1}: damaged")


def test_a_run_whose_settings_were_edited_does_not_go_on(t2a_run, tmp_path):
    run = shutil.copytree(t2a_run, tmp_path / "run")
    settings = config.load_config(run)
    (run / "config.json").write_text(json.dumps({**settings, "lr": 0.5}))
    refused(train, "--resume", run, "--steps", 14, cwd=tmp_path,
            message="lr is 0.5 in its config.json and was")


@pytest.mark.parametrize("name", [*checkpoints.USED, *checkpoints.TRAINED])
def test_a_checkpoint_without_a_part_falls_back_to_the_one_before(tmp_path, name, capsys):
    run = a_run(tmp_path / "run")
    save(run, 1)
    save(run, 2)
    newest = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save({**newest, name: None}, run / "checkpoint.pt")
    assert final(run)["step"] == 1 and "going on from checkpoint-previous" in capsys.readouterr().err
    if name in ("config", "optimizer"):                    # without: of an early version; an export
        return
    torch.save({k: v for k, v in newest.items() if k != name}, run / "checkpoint.pt")
    assert final(run)["step"] == 1 and f"KeyError: '{name}'" in capsys.readouterr().err


def test_an_optimizer_of_something_else_is_refused_in_one_line(t2a_run, tmp_path):
    run = shutil.copytree(t2a_run, tmp_path / "run")
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    for wrong in ([{}], [5], [{"state": 5, "param_groups": []}]):
        torch.save({**state, "optimizer": wrong}, run / "checkpoint.pt")
        refused(train, "--resume", run, "--steps", 14, cwd=tmp_path,
                message="its optimizers are of other settings")


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"x": {}}', '{"x": {"protocol": {}, "rows": []}}',
                                     '{"x": {"protocol": 5, "rows": [{"row": "model"}]}}'])
def test_a_damaged_final_table_is_named_with_the_fix(t2a_run, tmp_path, content):
    run = shutil.copytree(t2a_run, tmp_path / "run")
    (run / "scores.json").write_text(content)
    message = "scores.json: damaged"
    refused(evaluate, "page", run, cwd=tmp_path, message=message)
    refused(report, run, "--out", tmp_path / "r.html", cwd=tmp_path, message=message)
    with pytest.raises(UserError, match=message):
        runner._final_scores(run)


def test_a_table_that_lacks_a_number_is_named(t2a_run, tmp_path):
    run = shutil.copytree(t2a_run, tmp_path / "run")
    scores = read_json(run / "scores.json")
    for row in next(iter(scores.values()))["rows"]:
        row.pop("kid")
    (run / "scores.json").write_text(json.dumps(scores))
    refused(evaluate, "page", run, cwd=tmp_path, message="scores.json: damaged")


def test_damaged_moments_and_samples_are_named(t2a_run, tmp_path):
    run = shutil.copytree(t2a_run, tmp_path / "run")
    moment = sorted((run / moments.FOLDER).glob("step*.json"))[-1]
    for path, content in ((moment, "{"), (run / moments.FOLDER / "clips.json", "{}")):
        whole = path.read_text()
        path.write_text(content)
        refused(evaluate, "page", run, cwd=tmp_path, message=f"{path.name}: damaged")
        path.write_text(whole)
    captions = run / "samples" / "captions.txt"
    captions.write_text("no colon\n")
    refused(evaluate, "dashboard", run, cwd=tmp_path, message="samples: damaged")


@pytest.mark.parametrize("content", [b"", b"5\n", b"# README\n", b"\xff\xfe\x00", b'{"task": "sr"}\n',
                                     b'{"task": "sr"}\n{"step": 1, "pro'])
def test_a_file_that_was_not_recorded_is_named(tmp_path, content):
    (tmp_path / "x.jsonl").write_bytes(content)
    for command in ("choose", "check", "track", "normal"):
        refused(regime_choice, command, tmp_path / "x.jsonl", cwd=tmp_path, message="x.jsonl")


def test_runs_of_other_settings_are_not_pooled():
    root = Path(__file__).resolve().parents[1] / "results" / "regime"
    long = sorted((root / "default-6000").glob("*.jsonl"))
    short = [path for path in sorted((root / "default").glob("*t2a-s*.jsonl"))]
    with pytest.raises(UserError, match="check: runs of t2a with steps .*; check them apart"):
        regime_choice.check([regime_choice.read(path) for path in (*long, *short)])
    header, _ = regime_choice._alike([regime_choice.read(path) for path in (*long, *short)], "t2a")[0]
    assert header["steps"] == 3_000, "five runs of 3,000 steps, four of 6,000"


def squares(indices) -> np.ndarray:
    return np.array([i * i for i in indices], np.int64)


def test_a_cached_array_that_was_cut_short_is_made_again(tmp_path):
    def fill():
        return fill_array(tmp_path, "x", (9,), np.int64, squares, 9, chunk=4, workers=0)
    whole = (tmp_path / "x.npy").read_bytes() if list(fill()) else b""
    for cut in (whole[:-8], whole[:10], b""):
        (tmp_path / "x.npy").write_bytes(cut)
        assert fill().tolist() == [i * i for i in range(9)]


def test_weights_that_are_no_safetensors_are_named(tmp_path):
    (tmp_path / "x.safetensors").write_text("# README")
    with pytest.raises(UserError, match="x.safetensors: not a file of safetensors"):
        checkpoints.load_frozen(torch.nn.Linear(2, 2), tmp_path / "x.safetensors")


def test_a_run_that_died_before_its_first_checkpoint_takes_no_other_folder(tmp_path):
    run = a_run(tmp_path / "run")
    with pytest.raises(UserError, match="begin a new run"):
        runs.open_settings({"data": "elsewhere"}, str(run))


def test_captions_without_a_single_word_are_refused_before_training(tmp_path, tiny):
    """Negative control: one clip with a word is enough."""
    for word, message in (("🐕", "no training clip's caption holds a word"), ("dog", "")):
        names = [f"{k}.wav" for k in range(12)]
        folder = make_folder(tmp_path / f"of {word}", names, [(name, word) for name in names],
                             ("file_name", "caption"))
        how = {**tiny, "data": str(folder), "task": "t2a", "recipe": "vanilla", "steps": 1, "score_clips": 2}
        out = tmp_path / f"run {word}"
        if message:
            with pytest.raises(UserError, match=message):
                train.train({**how, "out": str(out)})
            assert not out.exists()
        else:
            train.train({**how, "out": str(out)})
