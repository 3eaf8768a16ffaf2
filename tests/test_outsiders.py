"""What is typed wrongly, copied halfway or taken from elsewhere ends in one line that names it, and nothing
of the user's is lost. (Sound files: test_audio_files.py; crashes and floods: test_robust.py.)"""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_process
from folders import write_tone
from run_files import a_run, final, save

import evaluate
import train
from lab import block_work, experiments, pretrain_teacher, regime_choice, report, runner, train_decoder
from parts import arguments, checkpoints, config, devices, moments, preparation, runs
from parts.audio import write_wav
from parts.cache import fill_array
from parts.errors import UserError
from parts.files import read_json
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
    ({"regime": "yoked:nobody"}, "there is no arm 'nobody'"),
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
    for content in (b"\xff\xfe", b"{", b"[]"):
        (tmp_path / "arms.json").write_bytes(content)
        refused(experiments, "run", "E1", "--arms", tmp_path / "arms.json", "--dry-run", cwd=tmp_path,
                message="arms.json: not a JSON file of arms")


def test_damaged_files_of_an_experiment_are_named(tmp_path):
    for content in ("{", "[]", "{}", '{"experiment": "E1", "arms": [], "seeds": [], "reference": "x"}'):
        (tmp_path / "experiment.json").write_text(content)
        refused(experiments, "table", tmp_path, cwd=tmp_path, message="experiment.json: damaged")
    spec = {"experiment": "E1", "arms": {"static": {}}, "seeds": [0], "reference": "static"}
    (tmp_path / "experiment.json").write_text(json.dumps(spec))
    (tmp_path / "rows.jsonl").write_text('{"arm": "static", "seed": 0}\n{"arm": "sta')
    refused(experiments, "table", tmp_path, cwd=tmp_path, message="rows.jsonl, line 2: damaged")


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
    refused(regime_choice, "means", "a", "b", cwd=tmp_path, message="means: takes one run")


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
