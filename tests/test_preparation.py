"""Claims about which clips `--data` stands for. (How a mixture draws: tests/test_recordings.py.)"""
import pytest
from folders import make_folder, write_tone

import train
from parts import preparation
from parts.audio import RATE
from parts.config import Config
from parts.errors import UserError
from parts.preparation import open_data
from parts.recordings import AudioFolder, Mixed
from parts.soundworld import SoundWorld


def tone_folder(root, n):
    """n tones, all with the same caption; returns root."""
    names = [f"{k}.wav" for k in range(n)]
    return make_folder(root, names, [(name, "a tone") for name in names], ("file_name", "caption"))


def test_the_default_split_holds_out_files_without_a_fold_column(tmp_path):
    folder = tone_folder(tmp_path / "mine", 5)
    sizes = [len(open_data(str(folder), split, 0, Config().val_fold)) for split in ("train", "val")]
    assert sizes == [4, 1]


def test_data_is_soundworld_a_folder_or_several_of_them_with_weights(tmp_path):
    folder = tone_folder(tmp_path / "own", 22)
    assert isinstance(open_data("soundworld", "train", 10), SoundWorld)
    assert isinstance(open_data(str(folder), "train"), AudioFolder)
    mixture = open_data(f"{folder}=3, soundworld=1", "train", 10)
    assert isinstance(mixture, Mixed) and mixture.weights == [3.0, 1.0]
    assert [type(part) for part in mixture.parts] == [AudioFolder, SoundWorld]
    with_a_sign = tone_folder(tmp_path / "a=1", 22)
    assert isinstance(open_data(str(with_a_sign), "train"), AudioFolder), "a folder's name may hold ="


def test_each_clip_is_asked_for_as_many_wordings_as_it_has(tmp_path):
    """Counted round to the most that any clip has, the first wording of others would be drawn more often."""
    rows = [(f"{k}.wav", f"wording {j}") for k in range(4) for j in range(3 if k == 0 else 2)]
    folder = make_folder(tmp_path / "own", [f"{k}.wav" for k in range(4)], rows, ("file_name", "caption"))
    mixture = open_data(f"{folder}=1,soundworld=1", "train", 6)
    asked = [[mixture.caption(i, k) for k in range(mixture.wordings(i))] for i in range(len(mixture))]
    own = [captions for captions in asked if captions[0].startswith("wording")]
    assert sorted(map(len, own))[-1] <= 3 and all(len(set(captions)) == len(captions) for captions in own)
    assert {len(captions) for captions in asked} >= {2, 4} and len(own) + 6 == len(asked)


@pytest.mark.parametrize("mixture", ["soundworld=0", "{folder}=x", "=1", "soundworld=1,"])
def test_mixtures_that_do_not_read_name_equals_weight_are_refused(tmp_path, mixture):
    folder = tone_folder(tmp_path / "own", 2)
    with pytest.raises(UserError, match="NAME=WEIGHT"):
        open_data(mixture.format(folder=folder), "train", 100)


def test_a_part_of_a_mixture_that_does_not_exist_is_named():
    with pytest.raises(UserError, match="nowhere: no such folder"):
        open_data("nowhere=1,soundworld=1", "train", 100)


def test_a_missing_judge_model_is_told_before_training_and_leaves_no_run(tiny, tmp_path):
    for flag in ("clap", "audio_model"):
        with pytest.raises(UserError, match="no/model"):
            train.train({**tiny, flag: str(tmp_path / "no/model"), "out": str(tmp_path / "run")})
        assert not (tmp_path / "run").exists()


def test_a_run_folder_that_is_a_link_is_emptied_and_stays(tmp_path):
    for name in ("disk", "plain"):
        (tmp_path / name / "samples").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    preparation._remove(tmp_path / "run")
    preparation._remove(tmp_path / "plain")
    assert (tmp_path / "run").is_symlink() and list((tmp_path / "disk").iterdir()) == []
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("place", ["LatentCache", "feature_mean"])
def test_whatever_fails_in_preparation_leaves_no_run(tiny, tmp_path, monkeypatch, place):
    """A full disk, say."""
    def fail(*given):
        raise UserError("latents: can't be written (No space left on device)")

    monkeypatch.setattr(preparation, place, fail)
    with pytest.raises(UserError, match="No space left"):
        train.train({**tiny, "task": "sr", "out": str(tmp_path / "run")})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("n, message", [(8_000, "silence"), (1, "can't fit|silence")])
def test_a_folder_of_nothing_ends_in_one_line_and_leaves_no_run(tiny, tmp_path, n, message):
    for k in range(25):
        write_tone(tmp_path / "set" / "class" / f"{k}.wav", n / RATE, level=0)
    for task in ("t2a", "sr"):
        with pytest.raises(UserError, match=message):
            train.train({**tiny, "task": task, "data": str(tmp_path / "set"), "out": str(tmp_path / "run")})
        assert not (tmp_path / "run").exists()
