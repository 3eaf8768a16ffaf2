"""Claims about prompts: each is met, with notes of what was read how and left out, or refused with what
can be asked for. The vocabulary is that of the shipped demo."""
import numpy as np
import pytest
import torch
from conftest import ROOT, in_process
from tiny_models import tiny_model

import evaluate
from parts.checkpoints import load_checkpoint
from parts.errors import UserError
from parts.judges import judge_clips, load_judge
from parts.pretrained_text import PretrainedText
from parts.prompts import QUALIFIERS, SYNONYMS, THINGS, check_prompt
from parts.soundworld import FAMILIES, NAMES, SOUNDS, SoundWorld, noun_phrases
from parts.text import MAX_WORDS, Words


@pytest.fixture(scope="module")
def demo():
    """The vocabulary of the shipped model."""
    return Words(load_checkpoint(ROOT / "assets/demo")[1]["words"])


MET = {  # prompt: (caption that the model is given, a part of the notes; "": no notes)
    # As they are.
    "a low bell, then rain": ("a low bell then rain", ""),
    "A LOW Bell... THEN rain!!": ("a low bell then rain", ""),
    "2 bells": ("two bells", ""),
    "🐕 bell 🔔": ("bell", ""),
    # Plurals, possessives, -ing and -ed.
    "dogs barking": ("dog bark", "read 'dogs' as 'dog', 'barking' as 'bark'"),
    "dogs": ("dog bark", "read 'dogs' as 'dog bark'"),
    "two phones ringing": ("two phone ringing", "read 'phones' as 'phone'"),
    "laughing babies": ("person laughing baby", "'laughing' as 'person laughing', 'babies' as 'baby'"),
    "the phone rings": ("the phone ringing", "'rings' as 'ringing'"),
    "wind howls": ("wind howling", "'howls' as 'howling'"),
    "a baby cries": ("a baby crying", "'cries' as 'crying'"),
    "humming": ("electrical hum", "'humming' as 'electrical hum'"),
    "drumming": ("drum", "'drumming' as 'drum'"),
    "crickets chirped": ("crickets chirping", "'chirped' as 'chirping'"),
    "Knocking at the door": ("knock at the door", "'knocking' as 'knock'"),
    "a dog’s bark": ("a dog bark", "as 'dog'"),
    # Synonyms.
    "puppies": ("dog bark", "'puppies' as 'dog bark'"),
    "a motorcycle": ("a engine", "'motorcycle' as 'engine'"),
    "giggling": ("laughter", "'giggling' as 'laughter'"),
    "a bell before rain": ("a bell then rain", "'before' as 'then'"),
    # Compounds.
    "thunderstorm": ("thunder", "'thunderstorm' as 'thunder'"),
    "raindrops": ("rain", "'raindrops' as 'rain'"),
    "songbirds": ("bird chirping", "'songbirds' as 'bird chirping'"),
    "a churchbell": ("a church bell", "'churchbell' as 'church bell'"),
    # In part.
    "a loww bell, then rain": ("a bell then rain", "left out: 'loww' (did you mean 'low'?)"),
    "birds in the forest": ("bird chirping in the", "'forest' (near: rain, a thunderclap, wind)"),
    "someone laughs loudly": ("laugh", "left out: 'someone', 'loudly'"),
    "five bells": ("bells", "left out: 'five'"),
    "rain without thunder": ("rain thunder", "left out: 'without' (nothing can be excluded)"),
    "un chien, a dog bark": ("a dog bark", "left out: 'un', 'chien'"),
    "rain " + "x" * 5_000: ("rain", f"left out: '{'x' * 30}...'"),
    # Too long.
    "a bell " * 20 + "then rain": ("a bell " * 20 + "then rain", "its end is left out: 'then rain'"),
}
INSTRUMENTS = "(near: a bell, a flute, a guitar)"
VOICES = "(near: a voice singing, a person laughing, a baby crying)"
IMPACTS = "(near: a knock, breaking glass, a drum)"
ALL = "it knows rain, thunder, wind, dog, "
REFUSED = {  # prompt: what may be asked for instead
    # Things that SoundWorld has not.
    "footsteps on gravel": f"'footsteps' {IMPACTS}",
    "A man plays the piano in a quiet room": f"'man' {VOICES}; 'piano' {INSTRUMENTS}",
    "people talking": f"'people', 'talking' {VOICES}",
    "a saxophone": f"'saxophone' {INSTRUMENTS}",
    "gunshot": f"'gunshot' {IMPACTS}",
    "cat meowing": "'cat', 'meowing' (near: a dog bark, a bird chirping, crickets)",
    # Known words that name no sound.
    "cars passing by": "'cars' (near: a car engine, a car horn)",
    "police": "'police' (near: a police siren)",
    "two, then three in the distance": ALL,
    # Mistyped.
    "a gitar": "'gitar' (did you mean 'guitar'?)",
    "HELICOPTOR": "'helicoptor' (did you mean 'helicopter'?)",
    # No word that is near by letters or meaning; "passing" is no compound.
    "xyzzy": ALL,
    "passing": ALL,
    "": ALL,
    "🐕": ALL,
    "un chien qui aboie": ALL,
    "狗叫声": ALL,
    "कुत्ता भौंक रहा है": ALL,
    "собака лает": ALL,
    "dog" * 2_000: ALL,
}


@pytest.mark.parametrize("prompt", [*MET, *REFUSED], ids=lambda prompt: prompt[:40] or "empty")
def test_a_prompt_is_met_with_notes_or_refused_with_what_can_be_asked_for(demo, prompt):
    if prompt in MET:
        expected, note = MET[prompt]
        caption, notes = check_prompt(prompt, demo, "RUN", soundworld=True)
        assert caption == expected and set(caption.split()) <= set(demo.words)
        assert any(note in line for line in notes) if note else notes == []
        assert all(line.startswith("note: ") and "\n" not in line for line in notes)
    else:
        with pytest.raises(UserError) as refused:
            check_prompt(prompt, demo, "RUN", soundworld=True)
        message = str(refused.value)
        assert REFUSED[prompt] in message and message.endswith("python evaluate.py sounds RUN")
        assert "did you mean" not in message or "did you mean" in REFUSED[prompt]
        assert "\n" not in message and len(message) < 450


def test_captions_of_soundworld_and_all_that_is_listed_are_met_word_for_word(demo):
    captions = [SoundWorld("test", 100).caption(i) for i in range(100)]
    listed = [phrase for sound in SOUNDS for phrase in noun_phrases(sound)]
    for text in captions + [phrase for phrase in listed if set(demo.split(phrase)) <= set(demo.ids)]:
        caption, notes = check_prompt(text, demo, "RUN", soundworld=True)
        assert torch.equal(demo.encode([caption]), demo.encode([text]))
        assert not any("read" in note for note in notes)


def test_the_name_of_each_sound_alone_is_made_by_the_shipped_model(demo):
    """One word may be too little: by itself "dog" makes next to nothing, its phrase a dog."""
    run, judge = evaluate.load_run(ROOT / "assets/demo"), load_judge("dev")
    captions = [check_prompt(name, demo, "RUN", soundworld=True)[0] for name in NAMES]
    made = evaluate.generate(run, captions, list(range(len(NAMES))))
    present = judge_clips(judge, made)["presence"] > 0
    assert np.mean(np.diagonal(present)) >= 0.9
    bare = evaluate.generate(run, ["dog", "dog"], [3, 12])
    found = judge_clips(judge, bare)["presence"][:, NAMES.index("dog")] > 0
    assert not found.any(), "negative control"


def test_the_tables_of_meanings_name_words_of_soundworld_and_contradict_neither_them_nor_each_other():
    phrases = [phrase for sound in SOUNDS for phrase in (*sound.one, *sound.many)]
    of_sounds = {word for phrase in phrases for word in Words.split(phrase)}
    captions = [SoundWorld("train", 2_000).caption(i) for i in range(2_000)]
    known = set(Words.fit(captions).words)
    typed = [word for words in (*SYNONYMS.values(), *THINGS.values()) for word in words.split()]
    assert QUALIFIERS <= of_sounds and set(SYNONYMS) <= known and set(THINGS) == set(FAMILIES)
    assert len(typed) == len(set(typed)) and not set(typed) & known


# --- other data, other encoders

OWN = Words.fit(["a hiss in the room", "Türen knarren", "waves", "thunder and storm", "狗 叫", "creaks"])


@pytest.mark.parametrize("prompt, expected", [
    ("hisses in a room", "hiss in a room"),
    ("a wave", "a waves"),
    ("creaking", "creaks"),
    ("thunderstorm", "thunder storm"),
    ("TÜREN", "türen"),
    ("Tu\u0308ren", "türen"),
    ("狗叫声", "狗 叫"),
    ("a bark in the room", "a in the room"),
])
def test_words_of_own_recordings_are_met_by_general_rules(prompt, expected):
    assert check_prompt(prompt, OWN, "RUN")[0] == expected


@pytest.mark.parametrize("prompt, instead", [
    ("a man in the", ""), ("rain", ""), ("puppy", ""), ("gust", ""), ("", ""),
    ("the rooom", "'rooom' (did you mean 'room'?); "),
])
def test_prompts_of_own_recordings_are_refused_where_none_but_stop_words_are_known(prompt, instead):
    with pytest.raises(UserError) as refused:
        check_prompt(prompt, OWN, "RUN")
    assert str(refused.value) == (f"--prompt {prompt!r}: no word of it but stop words is one that this "
                                  f"model knows; {instead}all: python evaluate.py sounds RUN")


def test_a_frozen_text_encoder_refuses_nothing_and_its_limit_is_told(tmp_path):
    text = PretrainedText(str(tiny_model("t5", tmp_path)), max_tokens=8)
    for prompt in ("xyzzy", "", "कुत्ता", "a dog"):
        assert check_prompt(prompt, text, "RUN", soundworld=True) == (prompt, [])
    caption, notes = check_prompt("dog " * 7 + "rain wind", text, "RUN")
    assert caption == "dog " * 7 + "rain wind"
    assert notes == ["note: too long; its end is left out: 'rain wind'"]


# --- the command

def generate(prompt: str, folder):
    """The command with the shipped model and few steps -> p.wav in a folder."""
    return in_process(evaluate, "generate", ROOT / "assets/demo", "--prompt", prompt, "--out", "p.wav",
                      "--steps", 2, cwd=folder)


def test_the_command_says_how_a_prompt_is_read_and_what_is_found_in_order_of_onset(tmp_path):
    done = generate("dogs barking, then raindrops", tmp_path)
    assert done.returncode == 0, done.stderr
    note, made = done.stdout.splitlines()
    assert note == "note: read 'dogs' as 'dog', 'barking' as 'bark', 'raindrops' as 'rain'"
    assert made.startswith("p.wav: 2.56 s, ") and "the judge finds, in order of onset: " in made


def test_the_caption_that_was_read_is_the_one_that_is_made(tmp_path):
    waves = []
    for prompt in ("dogs barking", "dog bark", "rain"):
        assert generate(prompt, tmp_path).returncode == 0
        waves.append((tmp_path / "p.wav").read_bytes())
    assert waves[0] == waves[1]
    assert waves[0] != waves[2], "negative control: the prompt matters"


def test_a_refused_prompt_ends_with_status_2_one_line_and_no_file(tmp_path):
    done = generate("footsteps\non gravel", tmp_path)
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    assert len(done.stderr.strip().splitlines()) == 1 and IMPACTS in done.stderr


def test_a_prompt_of_the_longest_length_is_read_whole(demo):
    caption, notes = check_prompt("bell " * MAX_WORDS, demo, "RUN", soundworld=True)
    assert demo.encode([caption]).shape == (1, MAX_WORDS) and notes == []
    assert demo.encode([caption + " rain"]).shape == (1, MAX_WORDS)
