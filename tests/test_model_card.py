"""Claims about the model card: what is known is in it, what is not is said to be unknown."""
import json
import re

import pytest
import torch
from conftest import ROOT, in_process

import evaluate
from parts.config import Config, load_config
from parts.model_card import model_card

ROWS = [{"row": "real", "exact": 0.97, "interval": [0.95, 0.98], "event_kl": 0.0},
        {"row": "model", "exact": 0.8125, "interval": [0.77, 0.85], "event_kl": 0.034}]


def scores(step=3_000, rows=ROWS, **protocol):
    return {"runs/t2a": {"protocol": {"run": "runs/t2a", "step": step, "judge": "final", "w": 2.5, "n": 500,
                                      **protocol}, "rows": rows}}


def card(step=3_000, found=None, **settings):
    return model_card(vars(Config(**settings)), step, found, 1_720_000, ["a", "bell", "the"])


def front_matter(text: str) -> dict:
    """Simple YAML: `key: value` and lists of `- value`."""
    head, fields, key = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL).group(1), {}, ""
    for line in head.splitlines():
        if line.startswith("- "):
            fields[key].append(line[2:])
        else:
            key, _, value = line.partition(":")
            fields[key] = value.strip() or []
    return fields


def test_an_export_has_a_card_whose_snippet_and_command_work(t2a_run, sr_run, tmp_path, monkeypatch):
    for run, task in ((t2a_run, "text-to-audio"), (sr_run, "audio-to-audio")):
        out = tmp_path / run.name / "MODEL"
        assert in_process(evaluate, "export", run, out, cwd=tmp_path).returncode == 0
        text = (out / "README.md").read_text()
        assert front_matter(text)["pipeline_tag"] == task and front_matter(text)["license"] == "mit"
        assert str(tmp_path) not in text and str(run) not in text, "paths of this machine"
        rows = next(iter(json.loads((run / "scores.json").read_text()).values()))["rows"]
        key = "exact" if task == "text-to-audio" else "energy_score"
        for row in rows:
            value = row[key] if key == "exact" else row[key]["mean"]
            assert re.search(rf"^\| {row['row']} \|.*{value:.3f}", text, re.MULTILINE), row["row"]

        # As a stranger would type it, next to the folder.
        monkeypatch.chdir(out.parent)
        evaluate.write_wav(out.parent / "muffled.wav", 0.1 * torch.randn(20_000).numpy())
        space = {}
        exec(re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1), space)
        made = space["waves"][0] if task == "text-to-audio" else space["clear"]
        assert made.ndim == 1 and len(made) > 10_000 and abs(made).max() > 0


def test_the_licence_of_recordings_is_unknown_whatever_their_folder_is_called(tmp_path):
    """Negative control: SoundWorld's is MIT. A folder may have = in its name."""
    (tmp_path / "a=b").mkdir()
    for data in ("/home/me/field recordings/soundworld", str(tmp_path / "a=b"), "soundworld=1,mine=2"):
        text = card(data=data)
        assert front_matter(text)["license"] == "other"
        assert "/home/me" not in text and str(tmp_path) not in text
    assert "recordings of the folder a=b" in card(data=str(tmp_path / "a=b"))
    assert front_matter(card(data="soundworld"))["license"] == "mit"


def test_the_command_of_a_model_of_recordings_asks_for_a_word_that_it_knows():
    assert '--prompt "bell"' in card(data="mine") and "a low bell, then rain" in card(data="soundworld")


def test_a_card_that_was_filled_in_by_hand_stays_beside_the_new_one(t2a_run, tmp_path):
    out = tmp_path / "MODEL"
    for _ in range(2):  # the same card again is no new one
        assert in_process(evaluate, "export", t2a_run, out, cwd=tmp_path).returncode == 0
        assert not (out / "README.new.md").exists()
    made = (out / "README.md").read_text()
    (out / "README.md").write_text("mine")
    done = in_process(evaluate, "export", t2a_run, out, cwd=tmp_path)
    assert done.returncode == 0 and "README.md is kept" in done.stdout
    assert (out / "README.md").read_text() == "mine" and (out / "README.new.md").read_text() == made


def test_an_export_goes_into_no_folder_of_other_things(t2a_run, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.txt").write_text("x")
    done = in_process(evaluate, "export", t2a_run, tmp_path / "photos", cwd=tmp_path)
    assert done.returncode == 2 and "is not empty and holds no exported model" in done.stderr
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["1.txt"]


def test_results_are_those_of_these_weights_or_none_are_claimed():
    said = "No results are recorded with this model"
    assert "| model | 0.812 [0.770, 0.850] | 0.034 |" in card(found=scores())
    assert "judge final, w 2.5, n 500" in card(found=scores())
    for broken in (None, {}, [], {"a": {}}, {"a": 1}, scores(rows=[{}]), scores(rows=[{"row": "model"}])):
        assert said in card(found=broken), broken
    other = card(found=scores(step=600))
    assert "of step 600, these weights of step 3000" in other and "0.812" not in other


def test_a_number_that_is_none_is_no_number():
    rows = [{"row": "model", "exact": float("nan"), "interval": [0, 1], "event_kl": "<b>0</b>"}]
    assert "| model | - | - |" in card(found=scores(rows=rows))


def test_what_the_card_cannot_know_is_left_to_be_filled_in():
    own = card(data="/home/me/bird_calls=2,soundworld=1", codec="models/dac", task="sr")
    assert front_matter(own)["license"] == "other" and "To be filled in" in own
    assert "bird\\_calls" in own and "models/dac" in own and "/home/me" not in own
    assert "bird" not in card(data="soundworld=3, soundworld=1")
    assert "b=x" in card(data="/a=c/b=x=2,soundworld=1") and "c/b" not in card(data="/a=c/b=x=2,soundworld=1")
    assert "a low bell" not in card(data="my_folder"), "a prompt that its vocabulary may not have"


def test_texts_of_others_stay_texts():
    text = card(found=scores(rows=[{**ROWS[1], "row": "a | <script>\n# b"}], judge="`x`"))
    assert "<script>" not in text and "\n# b" not in text and r"a \| \<script\> \# b" in text


@pytest.mark.parametrize("name", ["demo", "demo-sr"])
def test_what_is_shipped_can_be_exported_again(name, tmp_path):
    done = in_process(evaluate, "export", ROOT / "assets" / name, tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0 and "no results are recorded" in done.stdout
    assert {**load_config(tmp_path / "out"), "out": ""} == {**load_config(ROOT / "assets" / name), "out": ""}
    a, b = (evaluate.load_run(path) for path in (ROOT / "assets" / name, tmp_path / "out"))
    assert all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))
