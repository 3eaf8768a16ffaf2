"""The model card of an exported run: README.md beside its weights, as model hubs read it.

Idea.  Weights without a word on what they are, what they were trained on, how good they are and under which
licence are of no use to a stranger. All of it is known here: from the settings, and from the run's
scores.json. What is not known is said to be unknown; where no scores were recorded the card says so and how
to make them.

    config.json, scores.json -> README.md: front matter (YAML), task, use, data, results, licence

Names and numbers come from files that may be somebody else's, so every text is made printable, and what has
a meaning in Markdown is escaped.

Public: model_card, export_with_card.
"""
from __future__ import annotations

import json
import math
import re
from pathlib import Path

from parts import checkpoints
from parts.config import OWN_TEACHERS
from parts.errors import printable
from parts.files import write_text
from parts.preparation import named_sets
from parts.prompts import STOP_WORDS

PAPER = "https://arxiv.org/abs/2605.04547"
TASKS = {  # --task -> hub's name of it, ours, what comes in and goes out
    "t2a": ("text-to-audio", "captions to sound", "a caption goes in, a clip comes out"),
    "sr": ("audio-to-audio", "audio super-resolution",
           "a band-limited recording goes in, the same with its upper band restored comes out"),
}
METRICS = {  # key of a row of scores.json -> (heading, better)
    "exact": ("event set right", "higher"),
    "event_kl": ("event KL", "lower"),
    "energy_score": ("energy score", "lower"),
    "lsd": ("LSD", "lower"),
    "lsd_hf": ("LSD above the cutoff", "lower"),
    "clap_score": ("CLAP score", "higher"),
    "kid_model": ("KID, audio model", "lower"),
    "frechet_model": ("Frechet distance, audio model", "lower"),
    "kid": ("KID, judge's space", "lower"),
}

CARD = """\
---
license: {license}
pipeline_tag: {tag}
tags:
- audio
- diffusion
- flow-matching
- {tag}
---

# {title}

{task_sentence} {size_sentence}

Made by an educational reimplementation of the ideas of *Stage-adaptive audio diffusion modeling*
([arXiv 2605.04547]({paper})); it is not the model of that paper. That its training by stages does better
than constant settings was not shown: `docs/results.md` of the code.

## Use

In a folder with the code (`train.py`, `evaluate.py`, ...), this folder as `MODEL`:

```
{command}
```

```python
{snippet}
```

`model.safetensors` holds the averaged weights in half precision, the codec's arrays and, as metadata, the
vocabulary and settings; `config.json` the settings. Loading them runs no code of theirs.

## Training data

{data}

## Results

{results}

## Licence

{licence}

## Limits

{limits}
"""
USE = {
    "t2a": ('python evaluate.py generate MODEL --prompt "{prompt}" --out clip.wav',
            'import evaluate\n\nrun = evaluate.load_run("MODEL")\n'
            'waves = evaluate.generate(run, ["{prompt}"], seeds=[0])    # (1, N), float32 at 16 kHz'),
    "sr": ("python evaluate.py upsample MODEL --input muffled.wav --out clear.wav",
           "import evaluate\nfrom parts.audio_files import read_channels\n\n"
           'run = evaluate.load_run("MODEL")\n'
           'x = read_channels("muffled.wav")[0]                        # (N,), float32 at 16 kHz\n'
           "clear = evaluate.upsample_long(run, x, cutoff=2_000)       # its band limit, Hz"),
}


# --- what the settings say ----------------------------------------------------------------------------------

def _name(text: object) -> str:
    """A text from a file, on one line, with what Markdown would read escaped."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", printable(str(text)))


def _sources(config: dict) -> list[str]:
    """Names of the data sets as they were typed."""
    return [name for name, *_ in named_sets(str(config["data"]))]


def _folder(name: str) -> str:
    """A data set for the card: without the folders it lies in, which are of one machine."""
    return _name(Path(name).name)


def _pretrained(config: dict) -> dict[str, str]:
    """{slot: part} of other people's parts that a run was made with."""
    own = {"codec": ("mel",), "text": ("words",), "teacher": OWN_TEACHERS}
    return {slot: str(config[slot]) for slot, embedded in own.items() if config[slot] not in embedded}


def _licence(config: dict) -> tuple[str, str]:
    """(the hub's key, what to say)."""
    recordings = [name for name in _sources(config) if name != "soundworld"]
    parts = [f"{slot} {_name(part)}" for slot, part in _pretrained(config).items()]
    if not recordings and not parts:
        return "mit", "MIT, as the code. The training data is synthetic and part of the code."
    depends = [_folder(name) for name in recordings] + parts
    return "other", ("**To be filled in before publishing**: the code is MIT; these weights also depend on "
                     f"the licences of {', '.join(depends)}, which this card does not know.")


def _data(config: dict) -> str:
    kinds = []
    for name in _sources(config):
        if name == "soundworld":
            kinds.append(f"SoundWorld, {config['clips']} clips of {config['seconds']:g} s made by 24 "
                         "synthesizers, with captions made from their parameters")
        else:
            kinds.append(f"recordings of the folder {_folder(name)}")
    used = [f"{slot} {_name(part)}" for slot, part in _pretrained(config).items()]
    pretrained = f" Pretrained parts: {', '.join(used)}." if used else " No pretrained part."
    return f"{'; '.join(kinds)}; mono, 16 kHz.{pretrained}"


def _limits(config: dict) -> str:
    said = ["A small model for teaching, not for production. Sound above 8 kHz is not made at all."]
    if _sources(config) == ["soundworld"]:
        said.append("Trained on synthetic sounds only: real recordings are outside of what it knows.")
    if config["task"] == "t2a" and config["text"] == "words":
        said.append("It reads the words of its training captions and no others: "
                    "`python evaluate.py sounds MODEL` lists them.")
    return " ".join(said)


# --- what was measured --------------------------------------------------------------------------------------

def _cell(row: dict, key: str) -> str:
    """A value with its 95 % interval; "-" where there is none."""
    value = row.get(key)
    ends = row.get("interval") if key == "exact" else None
    if isinstance(value, dict):
        value, ends = value.get("mean"), value.get("interval")
    numbers = [value, *(ends if isinstance(ends, list) and len(ends) == 2 else [])]
    if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers):
        return "-"
    text = f"{value:.3f}"
    return f"{text} [{ends[0]:.3f}, {ends[1]:.3f}]" if len(numbers) == 3 else text


def _results(scores: dict | None, step: int) -> str:
    """The rows of scores.json as a table with its protocol."""
    none = "No results are recorded with this model. To measure it: `python evaluate.py score MODEL`."
    try:
        (found,) = (scores or {}).values()
        protocol, rows = dict(found["protocol"]), found["rows"]
        keys = [key for key in METRICS if any(key in row for row in rows)]
        table = [[_name(row["row"]), *(_cell(row, key) for key in keys)] for row in rows]
    except (AttributeError, KeyError, TypeError, ValueError):
        return none
    if not keys:
        return none
    if protocol.get("step") != step:
        return (f"The recorded results are of step {_name(protocol.get('step'))}, these weights of step "
                f"{step}. To measure them: `python evaluate.py score MODEL`.")
    headings = ["", *(f"{METRICS[key][0]} ({METRICS[key][1]} is better)" for key in keys)]
    lines = ["| " + " | ".join(cells) + " |" for cells in (headings, ["---"] * len(headings), *table)]
    left_out = ("run", "step", "prepare_s", "train_s", "data")
    how = ", ".join(f"{_name(name)} {_name(value)}" for name, value in protocol.items()
                    if name not in left_out)
    note = ("Brackets: 95 % intervals over clips of one model. Measured before the weights were rounded to "
            f"half precision, with: {how}.")
    return "\n".join([*lines, "", note])


# --- the card -----------------------------------------------------------------------------------------------

def model_card(config: dict, step: int, scores: dict | None, parameters: int, words: list[str]) -> str:
    """README.md of a model. config: settings of its run; scores: the content of its scores.json, or None;
    words: its vocabulary."""
    tag, title, what = TASKS[config["task"]]
    command, snippet = USE[config["task"]]
    known = next((word for word in words if word not in STOP_WORDS), "a caption")   # of a pretrained encoder
    prompt = "a low bell, then rain" if "soundworld" in _sources(config) else known
    license_key, licence = _licence(config)
    size = (f"A latent diffusion transformer of {parameters / 1e6:.2f} M parameters ({config['depth']} "
            f"blocks of width {config['width']}), trained for {step} steps of {config['batch']} clips "
            f"(recipe {_name(config['recipe'])}, seed {config['seed']}).")
    return CARD.format(
        license=license_key, tag=tag, title=title[0].upper() + title[1:], paper=PAPER,
        task_sentence=f"{what[0].upper() + what[1:]}.", size_sentence=size,
        command=command.format(prompt=prompt), snippet=snippet.format(prompt=prompt), data=_data(config),
        results=_results(scores, step), licence=licence, limits=_limits(config))


def export_with_card(run: Path, folder: Path) -> None:
    """Export a run (checkpoints.export) with its model card; prints what was written. A README.md that is
    there already may have been filled in by hand, and stays."""
    config, checkpoint = checkpoints.export(run, folder)
    scores = None
    try:
        scores = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        print(f"note: {run} has no readable scores.json; the card says that no results are recorded")
    parameters = sum(weight.numel() for weight in checkpoint["ema"].values())
    words = [printable(word) for word in checkpoint["words"]]
    card, text = folder / "README.md", model_card(config, checkpoint["step"], scores, parameters, words)
    if card.is_file() and card.read_text(encoding="utf-8", errors="replace") != text:
        card = folder / "README.new.md"
        print(f"note: {folder / 'README.md'} is kept; the card of these weights is {card.name}")
    write_text(card, text)
    size = (folder / checkpoints.EXPORTED).stat().st_size / 1e6
    print(f"{folder}: {checkpoints.EXPORTED} ({size:.1f} MB), config.json, {card.name} (its model card)")
