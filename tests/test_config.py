"""Claims about the settings of a run: what may be typed, what follows from it, what is refused."""
import ast
import dataclasses
import itertools
import re
import typing

import pytest
import torch
from conftest import ROOT, TINY, in_process

import regime
import sampler
import structure_reg
import train
from parts import config, peers
from parts.config import (
    CHOICES,
    PRESETS,
    RECIPES,
    WITH_RESUME,
    Config,
    parse,
    resolve,
    settings_not_default,
    validate_config,
)
from parts.errors import UserError

FIELDS = [field.name for field in dataclasses.fields(Config)]
CPU = {"device": "cpu", "out": "unused"}


# --- what is there

def test_every_setting_has_its_meaning_beside_it():
    """A comment on the line of each field of Config. Negative control: one without."""
    def without_meaning(source):
        lines = source.splitlines()
        cls = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
        fields = [node for node in cls.body if isinstance(node, ast.AnnAssign)]
        after = {node.target.id: lines[node.end_lineno - 1][node.end_col_offset:] for node in fields}
        return list(after), [name for name, text in after.items() if not re.match(r" +# \S", text)]

    names, missing = without_meaning((ROOT / "parts" / "config.py").read_text())
    assert names == FIELDS and not missing
    control = 'class C:\n    a: int = 1  # good\n    b: int = 2\n    c: str = "# not"\n'
    assert without_meaning(control) == (["a", "b", "c"], ["b", "c"])


def test_choices_are_those_of_the_modules_that_take_them():
    """parts/ must not import the concept files, so these are written twice."""
    assert sorted(CHOICES["regime_signal"]) == sorted(regime.SIGNALS)
    assert CHOICES["struct_loss"] == tuple(train.STRUCT_LOSSES)
    assert (*config.REGIMES, "replay") == regime.SOURCES


def test_every_density_that_may_be_chosen_is_one_that_drive_knows():
    """Negative control: a peer that was not handed in has none."""
    detector, peer = structure_reg.GroupDetector(4), peers.InfoNoise(sampler.LogitNormal())
    for timesteps in CHOICES["timesteps"]:
        density = train.drive(Config(timesteps=timesteps), 0.5, 1, detector, peer).density
        assert 0 < float(density.pdf(torch.tensor(0.5)))
        assert (density is peer.density) == (timesteps == "infonoise")
    with pytest.raises(AttributeError):
        train.drive(Config(timesteps="infonoise"), 0.5, 1, detector)


def test_choices_hold_their_defaults_and_presets_and_recipes_name_settings():
    assert all(getattr(Config(), name) in allowed for name, allowed in CHOICES.items())
    tables = [*RECIPES.values(), *itertools.chain.from_iterable(PRESETS.values())]
    assert all(set(table) <= set(FIELDS) for table in tables)
    assert set(WITH_RESUME) <= set(FIELDS)
    assert all({"guidance", "timesteps", "structure"} <= set(recipe) for recipe in RECIPES.values())
    assert tuple(RECIPES) == ("vanilla", "static", "stop", "clock", "stage", "infonoise", "curriculum")


def test_two_recipes_follow_r_and_a_peer_differs_from_static_in_its_density_alone():
    adaptive = {name for name in RECIPES if resolve({**CPU, "recipe": name}).adaptive}
    assert adaptive == {"clock", "stage"}
    for peer in ("infonoise", "curriculum"):
        assert RECIPES[peer] == {**RECIPES["static"], "timesteps": peer}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("task", ["t2a", "sr"])
def test_every_preset_and_recipe_is_possible(task, preset, recipe):
    cfg = resolve({**CPU, "task": task, "preset": preset, "recipe": recipe})
    assert validate_config(dataclasses.asdict(cfg)) is None


# --- what follows from what is typed

def test_what_is_typed_overrules_the_recipe_that_overrules_the_preset_that_overrules_the_default(
        monkeypatch):
    assert resolve(CPU).steps == Config().steps and resolve(CPU).preset == "smoke"
    small = resolve({**CPU, "preset": "small"})
    assert small.width == PRESETS["small"][0]["width"] != Config().width
    assert resolve({**CPU, "preset": "small", "width": 96}).width == 96
    static = resolve({**CPU, "recipe": "static"})
    assert static.guidance == "constant" and static.structure == "off" and not static.adaptive
    mixed = resolve({**CPU, "recipe": "static", "structure": "adaptive"})
    assert mixed.guidance == "constant" and mixed.structure == "adaptive" and mixed.adaptive
    assert resolve({**CPU, "task": "sr"}).clips == PRESETS["smoke"][1]["clips"] != resolve(CPU).clips
    monkeypatch.setitem(PRESETS, "smoke", ({"guidance": "off", "seed": 5}, {}))
    assert resolve(CPU).guidance == RECIPES["stage"]["guidance"] and resolve(CPU).seed == 5


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda", "cuda:1"])
def test_the_preset_whose_quality_is_known_is_the_default_on_every_device(monkeypatch, device):
    """Until `small` has been run on a card."""
    monkeypatch.setattr(config, "pick_device", lambda name: device)
    monkeypatch.setattr(config, "pick_precision", lambda name: "bf16")
    assert resolve({"out": "unused"}).preset == "smoke"
    assert resolve({"out": "unused", "preset": "small"}).preset == "small"


def test_the_run_folder_and_the_aligned_block_are_chosen_where_nothing_is_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        names.append(resolve({"device": "cpu"}).out)
        (tmp_path / names[-1]).mkdir(parents=True)
    assert names == ["runs/t2a", "runs/t2a-2", "runs/t2a-3"]
    blocks = [resolve({**CPU, "depth": depth}).align_block for depth in (2, 4, 12)]
    assert blocks == [1, 2, 5]
    assert resolve({**CPU, "align_block": 3}).align_block == 3


def test_the_command_line_gives_what_was_typed_and_no_more():
    assert parse([]) == ({}, "")
    typed = "--task sr --lr 1e-3 --profile --no-compile --seconds 2 --regime-signal t1.0".split()
    assert parse(typed) == ({"task": "sr", "lr": 1e-3, "profile": True, "compile": False,
                             "seconds": 2.0, "regime_signal": "t1.0"}, "")
    assert parse(["--resume", "runs/x", "--steps", "9"]) == ({"steps": 9}, "runs/x")


def test_every_setting_has_a_flag_and_help_shows_its_default(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in FIELDS) and "(default stage)" in text


def test_a_resumed_run_keeps_its_settings():
    types = typing.get_type_hints(Config)
    for name in set(FIELDS) - set(WITH_RESUME):
        flag = f"--{name.replace('_', '-')}"
        value = [] if types[name] is bool else [CHOICES.get(name, ("1",))[0]]
        with pytest.raises(UserError, match=f"own settings.* not {flag}$"):
            parse(["--resume", "runs/x", flag, *value])


# --- what is refused

@pytest.mark.parametrize("argv, message", [
    (("--stepz", 3), "--stepz: no such flag; did you mean --steps?"),
    (("--steps", "many"), "invalid int value"),
    (("--steps", 0), "--steps 0: must be positive"),
    (("--task", "tts"), "invalid choice: 'tts'"),
    (("--data", "no/such/folder"), "no such folder"),
    (("--resume", "no/such/run"), "not a run folder"),
    (("--width", 30), "--heads 4: must be"),
    (("--heads", 0), "--heads 0: must be"),
    (("--seed", -1), "--seed -1: must be"),
    (("--ema", -1), "--ema -1.0: must be in [0, 1]"),
    (("--ema", 1.5), "--ema 1.5: must be in [0, 1]"),
    (("--regime", "moon"), "--regime moon: must be slope, loss, agreement, clock or replay:FILE"),
    (("--regime", "agreement", "--guidance", "off"), "--regime agreement: must be another one with"),
    (("--regime-signal", "ratio"), "invalid choice: 'ratio'"),
    (("--timesteps", "sometimes"), "invalid choice: 'sometimes'"),
    (("--s-late", 0), "--s-late 0.0: must be from 0.01 to 10"),
    (("--struct-share", 2), "--struct-share 2.0: must be in [0, 1]"),
    (("--eval-every", -1), "--eval-every -1: must be 0 or more"),
    (("--regime", "replay:none.jsonl"), "none.jsonl"),
    (("--probe", "never"), "--probe never: must be auto or always"),
    (("--align-block", 9), "--align-block 9: must be a block from 1 to 4"),
    (("--accumulate", 32), "--accumulate 32: must be fewer than --batch"),
    (("--depth", 1), "--depth 1: must be at least 2"),
    (("--grad-clip", 0), "--grad-clip 0.0: must be positive"),
    (("--task", "sr", "--clap", "models/clap"), "--clap models/clap: must be left out with --task sr"),
    (("--task", "sr", "--audio-model", "x"), "--audio-model x: must be left out with --task sr"),
    (("--recipe", "soup"), "invalid choice: 'soup'"),
    (("--device", "abacus"), "--device abacus: not here"),
])
def test_bad_flags_end_with_status_2_and_leave_nothing(tmp_path, argv, message):
    done = in_process(train, *argv, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_batch_cannot_be_cut_unevenly():
    with pytest.raises(UserError, match="--accumulate 3: must be a divisor of --batch 8"):
        resolve({**TINY, **CPU, "batch": 8, "accumulate": 3})


def test_one_block_is_enough_where_nothing_asks_for_groups_of_blocks():
    assert resolve({**CPU, "depth": 1, "structure": "off"}).depth == 1
    with pytest.raises(UserError, match="--depth 1: must be at least 2"):
        resolve({**CPU, "depth": 1, "structure": "off", "probe": "always"})


@pytest.mark.parametrize("change, message", [
    ({"steps": 0}, "steps 0: must be positive"),
    ({"steps": 1.0}, "steps is 1.0, not of type int"),
    ({"steps": True}, "steps is True, not of type int"),
    ({"profile": 1}, "profile is 1, not of type bool"),
    ({"judge": "me"}, "judge is 'me', not one of dev, final"),
    ({"cfg": 2.5}, "unknown setting 'cfg'; it is of another version"),
])
def test_settings_of_a_folder_are_checked_as_if_they_had_been_typed(change, message):
    fields = dataclasses.asdict(Config())
    assert validate_config(fields) is None and validate_config({**fields, "lr": 1}) is None
    assert validate_config({**fields, **change}) == message
    del fields["seed"]
    assert validate_config(fields) == "no setting 'seed'; it is of another version"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("task", CHOICES["task"])
def test_a_default_run_differs_in_no_setting_and_another_in_what_was_typed(task, preset):
    """Also with other blocks, whose aligned one is chosen for them; where it is written and computed says
    nothing about its kind."""
    given = {**CPU, "task": task, "preset": preset}
    moved = dataclasses.asdict(resolve({**given, "workers": 1, "out": "elsewhere", "compile": True}))
    assert settings_not_default(moved) == []
    other = dataclasses.asdict(resolve({**given, "recipe": "static", "depth": 10}))
    assert settings_not_default(other) == [
        ("recipe", "static", "stage"), ("depth", "10", str(PRESETS[preset][0].get("depth", 4))),
        ("guidance", "constant", "adaptive"), ("timesteps", "constant", "adaptive"),
        ("structure", "off", "adaptive")]
