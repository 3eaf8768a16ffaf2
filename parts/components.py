"""Which part a setting names: codec, text encoder, teacher. The only place where a name becomes a part.

Idea.  Each slot has an embedded part, the default, and takes a pretrained one instead (a folder or hub id).
The rest of the project calls what it gets from here and does not know which of the two it is.

    --codec    mel                     codec.Codec      else  pretrained_codec.PretrainedCodec
    --text     words                   text.Words       else  pretrained_text.PretrainedText
    --teacher  tiny, shuffled, random  teacher.Teacher  else  pretrained_teacher.PretrainedTeacher

`config` is a dict of settings as a run folder holds it, `cfg` the dataclass
config.Config. All raise UserError where a pretrained part can't be loaded.

Public: open_codec, beside_model, open_text, open_teacher.
"""
from __future__ import annotations

from torch import nn

from parts.codec import Codec
from parts.pretrained_codec import PretrainedCodec
from parts.pretrained_teacher import PretrainedTeacher
from parts.pretrained_text import PretrainedText
from parts.teacher import load_teacher, random_teacher
from parts.text import Words


def open_codec(config: dict, device: str = "cpu", trust: bool = False,
               pickles: bool = False) -> Codec | PretrainedCodec:
    """The codec that the settings name, not yet fitted. trust, pickles: see parts.pretrained.load; they are
    the caller's to give, never the run folder's."""
    if config["codec"] == "mel":
        return Codec(config["channels"])
    return PretrainedCodec(config["codec"], config["channels"], trust=trust, pickles=pickles, device=device)


def beside_model(codec: nn.Module, device: str) -> nn.Module:
    """The codec on the GPU of the model, where sound is made from then on; elsewhere it stays on the CPU.
    (Once data is prepared: worker processes do that.)"""
    return codec.to(device) if str(device).startswith("cuda") else codec


def open_text(config: dict, words: list[str], device: str = "cpu", trust: bool = False,
              pickles: bool = False) -> Words | PretrainedText:
    """The text encoder that the settings name: the embedded vocabulary `words`, or a pretrained encoder."""
    if config["text"] == "words":
        return Words(words)
    return PretrainedText(config["text"], trust=trust, pickles=pickles, device=device)


def open_teacher(cfg) -> nn.Module:
    """The SSL teacher that a config.Config names: the shipped one, a control, or a pretrained one.

    The control "shuffled" is the shipped teacher too: training then pairs each clip with another clip's
    features."""
    if cfg.teacher in ("tiny", "shuffled"):
        return load_teacher()
    if cfg.teacher == "random":
        return random_teacher(cfg.seed)
    return PretrainedTeacher(
        cfg.teacher,
        cfg.teacher_layer,
        trust=cfg.trust_remote_code,
        pickles=cfg.allow_pickle,
        device=cfg.device,
    )
