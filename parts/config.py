"""The settings of a run: each with its default and its meaning, presets, recipes, checks, the command line.

    defaults  <  preset  <  recipe  <  what the user typed

`Config` is flat: one documented field a line, grouped under headings, and the command line has a flag for
each. A new setting is one line of `Config`; a new combination of mechanisms is one line of RECIPES. What a
value must satisfy stands in the check of its group, below.

Public: Config, PRESETS, RECIPES, CHOICES, NO_FOLD, parse, resolve, compiles_by_default, refuse_out_of_range,
validate_config, save_config, load_config, settings_not_default, TRUST, free_folder.
"""
from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import math
import os
import typing
from dataclasses import dataclass
from pathlib import Path

from parts.arguments import Parser
from parts.devices import pick_device, pick_precision
from parts.errors import UserError
from parts.files import read_json, to_json, write_text


@dataclass
class Config:
    # --- the run
    task: str = "t2a"            # t2a: caption -> sound; sr: band-limited -> full-band sound
    preset: str = "auto"         # smoke: a CPU | small: one GPU, never run yet | full: big; auto: smoke
    recipe: str = "stage"        # a row of RECIPES; flags overrule it
    out: str = ""                # run folder; empty: runs/<task>, numbered when taken
    seed: int = 0                # everything random derives from it
    steps: int = 6_000           # optimizer steps, K
    device: str = "auto"         # cpu | cuda | mps
    precision: str = "auto"      # fp32 | bf16; auto: bf16 where the processor multiplies it
    workers: int = -1            # processes that prepare data; -1: one a core
    profile: bool = False        # print each part's share of the time at the end

    # --- data
    data: str = "soundworld"     # soundworld, a folder of recordings, or a mixture: folder=3,soundworld=1
    max_bad_share: float = 0.01  # share of a folder's rows or files that may be unusable (bad.txt)
    val_fold: int = -1           # value of column `fold` that is held out; -1: a tenth of the files
    seconds: float = 2.56        # length of training crops
    clips: int = 6_000           # SoundWorld training clips
    variants: int = 3            # sr: band-limited versions of each training clip

    # --- model
    width: int = 128             # W, model width
    depth: int = 4               # L, transformer blocks
    heads: int = 4               # attention heads
    channels: int = 64           # C, principal components that the codec keeps
    codec: str = "mel"           # the latent space; mel: log-mel + PCA, or a neural codec (folder or hub id)
    text: str = "words"          # words: the embedded encoder, or a frozen one (folder or hub id)
    trust_remote_code: bool = False  # run Python code that comes with a pretrained model
    allow_pickle: bool = False   # read pretrained weights that are not safetensors

    # --- optimizer
    batch: int = 32              # clips a step, over all devices
    accumulate: int = 1          # parts that a batch is cut into: less memory, the same gradient
    #                              (but of losses that compare clips)
    checkpointing: bool = False  # recompute each block in the backward pass: less memory, a third more time
    compile: bool = False        # torch.compile the network, a minute or more at the start; on CUDA
    #                              always, but for --no-compile
    optimizer: str = "muon"      # muon: matrices inside blocks, AdamW the rest | adamw: everything
    lr: float = 2e-3             # rate after warm-up; --cool 0 keeps it where times to quality are compared
    muon_lr: float = 5e-3        # the same for Muon, in units of AdamW's rate (update RMS 0.2 lr)
    warmup: int = 100            # steps of linear warm-up
    cool: float = 0.2            # share of the steps, at the end, in which the rates fall linearly to 0
    weight_decay: float = 0.01   # decoupled, in both optimizers
    grad_clip: float = 1.0       # ceiling of the gradient norm
    ema: float = 0.9999          # EMA ceiling; ramped as (1 + k) / (10 + k): spans a tenth of the run
    cond_drop: float = 0.1       # share of samples trained without condition, for classifier-free guidance
    #                              (super-resolution is sampled without it)

    # --- regime: where training is
    regime: str = "slope"        # source of r: slope | loss | agreement | clock | replay:FILE (a log.jsonl)
    regime_signal: str = "levels"  # what the slope is taken of: of regime.SIGNALS
    probe: str = "auto"          # auto: measure D where r depends on it | always | never

    # --- mechanism 1: SSL guidance
    guidance: str = "adaptive"   # off | constant | adaptive: lambda(r)
    teacher: str = "tiny"        # tiny: the shipped one | folder or hub id | controls: random (not
    #                              trained), shuffled (the shipped one's features of other clips)
    teacher_layer: int = 0       # of a pretrained teacher, from 1; 0: the last
    lambda0: float = 0.5         # weight of the alignment loss (REPA: 0.5)
    gamma: float = 1.0           # exponent of its decay
    stop_at: float = 0.0         # constant guidance ends after this share of the steps (HASTE); 0: no
    guide_every: int = 4         # align every n-th token, others each step: neighbours are alike
    align_block: int = 0         # aligned block, from 1; 0: round(0.4 L)

    # --- mechanism 2: training timesteps, logit-normal: centre m, width s (logits; m = 1.5 is t = 0.82)
    timesteps: str = "adaptive"  # off: m = 0, s = 1 | constant | adaptive: m(r), s(r) | a peer: infonoise |
    #                              curriculum
    m: float = 1.5               # of the constant density
    s: float = 1.0               # its width
    m_early: float = 2.0         # of the adaptive one at r = 0: nearer to noise
    s_early: float = 1.0         # width there
    m_late: float = 1.0          # and at r = 1
    s_late: float = 1.0          # width there

    # --- mechanism 3: structure of the blocks
    structure: str = "adaptive"  # off | constant: groups by depth | adaptive: groups in the weights
    struct_share: float = 0.15   # share of the flow-matching gradient that its loss has (adaptive: times r)
    struct_loss: str = "grouped"  # grouped | dispersive | diversity

    # --- evaluation
    guidance_scale: float = 2.5  # w of classifier-free guidance in previews and scores (t2a; sr uses 1)
    sample_steps: int = 16       # Euler steps of previews and scores
    eval_every: int = 1_000      # steps between validation, previews and checkpoints; 0: half a doubling
    score_clips: int = 500       # clips of the final table
    score_split: str = "test"    # test | val: development must not use the test split
    judge: str = "dev"           # dev | final: the judge of the final table
    clap: str = ""               # a CLAP model (folder or hub id) for the final table's CLAP score
    audio_model: str = ""        # any audio model, for the final table's KID and Frechet distance

    @property
    def adaptive(self) -> bool:
        """Does any mechanism follow r?"""
        return "adaptive" in (self.guidance, self.timesteps, self.structure)

    @property
    def probed(self) -> bool:
        """Is the discrepancy D measured?"""
        return self.probe == "always" or (self.probe == "auto" and self.adaptive and self.regime == "slope")

    @property
    def ramp(self) -> int:
        """Steps in which the structure loss sets in and its weight is measured."""
        return round(0.1 * self.steps)

    @property
    def compares_clips(self) -> bool:
        """Does a loss, or the control of shuffled features, need several clips in each part of a batch?"""
        shuffled = self.teacher == "shuffled" and self.guidance != "off"
        return self.structure != "off" or shuffled


PRESETS = {  # what differs from the defaults above; a second entry is laid over it for super-resolution
    "smoke": ({}, {"clips": 2_500, "score_clips": 100, "steps": 3_000, "eval_every": 600}),
    # As many clips a step as half of 8 GB takes: it is the launches of its kernels that take the time.
    "small": ({"steps": 8_000, "batch": 192, "width": 384, "depth": 12, "heads": 6, "clips": 40_000,
               "lr": 5e-4, "muon_lr": 2e-3, "eval_every": 1_000}, {}),
    "full": ({"steps": 300_000, "batch": 256, "width": 768, "depth": 16, "heads": 12, "channels": 96,
              "seconds": 10.24, "clips": 20_000, "lr": 2e-4, "muon_lr": 1e-3, "warmup": 2_000,
              "eval_every": 5_000}, {}),
}
RECIPES = {  # who drives what; the other settings are the same in every row
    "vanilla": {"guidance": "off", "timesteps": "off", "structure": "off"},
    "static": {"guidance": "constant", "timesteps": "constant", "structure": "off"},
    "stop": {"guidance": "constant", "timesteps": "constant", "structure": "off", "stop_at": 0.4},
    "clock": {"guidance": "adaptive", "timesteps": "adaptive", "structure": "adaptive", "regime": "clock"},
    "stage": {"guidance": "adaptive", "timesteps": "adaptive", "structure": "adaptive", "regime": "slope"},
    # Peers: other people's adaptive densities of timesteps, which know nothing of r.
    "infonoise": {"guidance": "constant", "timesteps": "infonoise", "structure": "off"},
    "curriculum": {"guidance": "constant", "timesteps": "curriculum", "structure": "off"},
}
NO_FOLD = -1  # --val-fold's default
OWN_TEACHERS = ("tiny", "random", "shuffled")
# Asked anew each time: a run folder from elsewhere must not answer for the user.
TRUST = ("trust_remote_code", "allow_pickle")
WITH_RESUME = ("steps", "device", "data", "workers", "profile", *TRUST)  # what may be typed beside --resume
# What may differ between two runs that are compared: where a run is written and computed, and how.
NOT_OF_ITS_KIND = ("out", "preset", "device", "precision", "compile", "workers", "profile")
MODES = ("off", "constant", "adaptive")
REGIMES = ("slope", "loss", "agreement", "clock")  # sources of r without a file
PREDICTIONS = ("levels", "t1.0", "t0.9", "t0.7", "t0.5", "sample")  # compared token by token, or pooled
SIGNALS = (*PREDICTIONS, *(f"{name}-pooled" for name in PREDICTIONS), "latent")
CHOICES = {
    "task": ("t2a", "sr"),
    "preset": ("auto", *PRESETS),
    "recipe": tuple(RECIPES),
    "precision": ("auto", "fp32", "bf16"),
    "optimizer": ("muon", "adamw"),
    "regime_signal": SIGNALS,
    "probe": ("auto", "always", "never"),
    "guidance": MODES,
    "timesteps": (*MODES, "infonoise", "curriculum"),
    "structure": MODES,
    "struct_loss": ("grouped", "dispersive", "diversity"),
    "score_split": ("test", "val"),
    "judge": ("dev", "final"),
}


# --- checks: (setting, is it possible?, what it must be), a function for each group -------------------------

def _number_checks(c: Config):
    """An infinity passes tests such as lr > 0, and seeds are multiplied, which must fit into 64 bits."""
    for name, value in vars(c).items():
        if isinstance(value, float):
            yield name, math.isfinite(value), "a finite number"
        elif isinstance(value, int):
            yield name, abs(value) < 2**31, "below 2147483648"


def _run_checks(c: Config):
    yield "steps", c.steps > 0, "positive"
    yield "seed", c.seed >= 0, "0 or more"


def _data_checks(c: Config):
    yield "data", bool(c.data.strip()), "soundworld, a folder or a mixture of them"
    yield "max_bad_share", 0 <= c.max_bad_share < 1, "in [0, 1)"
    yield "seconds", 0.5 <= c.seconds <= 30, "from 0.5 to 30"
    yield "clips", 100 <= c.clips <= 10**7, "from 100 to 10000000"
    yield "variants", 0 < c.variants <= 1_000, "from 1 to 1000"


def _model_checks(c: Config):
    yield "width", 0 < c.width <= 16_384, "from 1 to 16384"
    yield "depth", 0 < c.depth <= 512, "from 1 to 512"
    one_block_is_enough = c.structure == "off" and c.probe != "always"
    enough = c.depth > 1 or one_block_is_enough
    yield "depth", enough, "at least 2, or add --structure off: one block has no groups"
    even = c.heads > 0 and c.width % (2 * c.heads) == 0
    yield "heads", even, "such that width / heads is an even number"
    yield "channels", 0 < c.channels <= 128, "from 1 to 128"


def _optimizer_checks(c: Config):
    yield "batch", 0 < c.batch <= 65_536, "from 1 to 65536"
    divides = c.accumulate > 0 and c.batch % c.accumulate == 0
    yield "accumulate", divides, f"a divisor of --batch {c.batch}"
    several = divides and c.batch // c.accumulate > 1
    yield ("accumulate", several or not c.compares_clips,
           "fewer than --batch: the structure loss and shuffled features compare clips of one part")
    yield from ((name, 0 < getattr(c, name) <= 10, "positive, at most 10") for name in ("lr", "muon_lr"))
    yield "warmup", c.warmup > 0, "positive"
    yield "cool", 0 <= c.cool <= 1, "in [0, 1]"
    yield "ema", 0 <= c.ema <= 1, "in [0, 1]"
    yield "weight_decay", 0 <= c.weight_decay <= 10, "from 0 to 10"
    yield "grad_clip", c.grad_clip > 0, "positive"
    yield "cond_drop", 0 <= c.cond_drop < 1, "in [0, 1)"


def _regime_checks(c: Config):
    name, _, file = c.regime.partition(":")
    known = c.regime in REGIMES or (name == "replay" and file != "")
    yield "regime", known, "slope, loss, agreement, clock or replay:FILE"
    guided = c.regime != "agreement" or c.guidance != "off"
    yield "regime", guided, "another one with --guidance off: there is nothing to agree with"
    needs_probe = c.regime == "slope" and c.adaptive
    measured = c.probe != "never" or not needs_probe
    yield "probe", measured, "auto or always where an adaptive mechanism follows the slope"


def _mechanism_checks(c: Config):
    yield "lambda0", 0 <= c.lambda0 <= 1_000, "from 0 to 1000"
    yield "gamma", 0 < c.gamma <= 100, "positive, at most 100"
    yield "stop_at", 0 <= c.stop_at <= 1, "in [0, 1]"
    yield "guide_every", 0 < c.guide_every <= 8, "from 1 to 8"
    yield "align_block", 0 <= c.align_block <= c.depth, f"a block from 1 to {c.depth}, or 0"
    centres, widths = ("m", "m_early", "m_late"), ("s", "s_early", "s_late")
    yield from ((name, abs(getattr(c, name)) <= 10, "from -10 to 10: a logit of t") for name in centres)
    yield from ((name, 0.01 <= getattr(c, name) <= 10, "from 0.01 to 10") for name in widths)
    yield "struct_share", 0 <= c.struct_share <= 1, "in [0, 1]"


def _evaluation_checks(c: Config):
    yield "guidance_scale", -100 <= c.guidance_scale <= 100, "from -100 to 100"
    yield "sample_steps", 0 < c.sample_steps <= 10_000, "from 1 to 10000"
    yield "eval_every", c.eval_every >= 0, "0 or more"
    yield "score_clips", c.score_clips >= 2, "at least 2"
    captioned = c.task == "t2a"
    yield "clap", not c.clap or captioned, "left out with --task sr: there is no caption to compare with"
    yield "audio_model", not c.audio_model or captioned, "left out with --task sr: its table has no such row"


def _needs(c: Config):
    """(settings, do they act beside the others?, what they need)."""
    guided, synthetic = c.guidance != "off", c.data == "soundworld"
    yield ("guidance_scale", "judge", "text"), c.task == "t2a", "--task t2a"
    yield ("variants",), c.task == "sr", "--task sr"
    yield ("clips",), "soundworld" in c.data, "--data soundworld: of a folder all clips are used"
    yield ("val_fold",), not synthetic, "--data FOLDER: SoundWorld has no folds"
    yield ("max_bad_share",), not synthetic, "--data FOLDER: SoundWorld has no files"
    yield ("muon_lr",), c.optimizer == "muon", "--optimizer muon"
    yield ("lambda0", "guide_every", "align_block"), guided, "--guidance constant or adaptive"
    yield ("gamma",), c.guidance == "adaptive", "--guidance adaptive"
    yield ("stop_at",), c.guidance == "constant", "--guidance constant"
    constant = c.timesteps in ("constant", "infonoise")
    yield ("m", "s"), constant, "--timesteps constant; adaptive ones move from --m-early to --m-late"
    yield ("m_early", "s_early", "m_late", "s_late"), c.timesteps == "adaptive", "--timesteps adaptive"
    yield ("struct_share", "struct_loss"), c.structure != "off", "--structure constant or adaptive"
    yield ("teacher_layer",), c.teacher not in OWN_TEACHERS, "a pretrained --teacher"
    followed = c.adaptive or c.probe == "always"
    yield ("regime",), followed, "a mechanism that is adaptive, such as --guidance adaptive"
    yield ("regime_signal",), c.probed, "--regime slope and a mechanism that is adaptive, or --probe always"
    of_teacher = c.probed and c.regime_signal != "latent"
    yield ("teacher",), guided or of_teacher, "--guidance constant or adaptive, or --probe always"


def refuse_without_effect(given: dict, typed: dict) -> None:
    """UserError where a setting was typed that changes nothing beside the others that are given."""
    for names, act, needed in _needs(_layered(given)):
        idle = [name for name in names if name in typed and not act]
        if idle:
            flag = idle[0].replace("_", "-")
            raise UserError(f"--{flag} {typed[idle[0]]}: changes nothing here; it needs {needed}")


CHECKS = (_number_checks, _run_checks, _data_checks, _model_checks, _optimizer_checks, _regime_checks,
          _mechanism_checks, _evaluation_checks)


def out_of_range(cfg: Config) -> str | None:
    """What is wrong with the first setting that is impossible: "name value: must be ..."."""
    for name, possible, must_be in itertools.chain.from_iterable(check(cfg) for check in CHECKS):
        if not possible:
            return f"{name.replace('_', '-')} {getattr(cfg, name)}: must be {must_be}"
    return None


def refuse_out_of_range(cfg: Config) -> None:
    """UserError, as of a flag, where a setting is impossible."""
    wrong = out_of_range(cfg)
    if wrong:
        raise UserError(f"--{wrong}")


def validate_config(fields: dict) -> str | None:
    """What is wrong with the settings of a run folder from elsewhere, in one line; None: nothing."""
    # The folder's fields are those of this version, no more and no fewer.
    types = typing.get_type_hints(Config)
    odd = sorted(set(fields) ^ set(types))
    if odd:
        return f"{'no' if odd[0] in types else 'unknown'} setting {odd[0]!r}; it is of another version"

    return wrong_value(fields) or out_of_range(Config(**fields))


def wrong_value(fields: dict) -> str | None:
    """What is wrong with the first setting that could not have been typed: of another type, or none of its
    choices; None: nothing."""
    types = typing.get_type_hints(Config)
    for name, value in fields.items():
        allowed = (int, float) if types[name] is float else (types[name],)
        is_a_bool = isinstance(value, bool)  # which Python also takes for an int
        if not isinstance(value, allowed) or is_a_bool != (types[name] is bool):
            return f"{name} is {value!r}, not of type {types[name].__name__}"
        if name in CHOICES and value not in CHOICES[name]:
            return f"{name} is {value!r}, not one of {', '.join(CHOICES[name])}"
    return None


# --- config.json of a run folder ---------------------------------------------------------------------------

def save_config(folder: Path, cfg: Config) -> None:
    write_text(folder / "config.json", to_json(dataclasses.asdict(cfg), indent=1) + "\n")


def load_config(folder: Path) -> dict:
    """config.json of a run folder, each field checked as if it had been typed; UserError names the field."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder}: not a run folder (no config.json)")
    fields = read_json(file)
    wrong = validate_config(fields)
    if wrong:
        raise UserError(f"{file}: {wrong}")
    return fields


def settings_not_default(config: dict) -> list[tuple[str, str, str]]:
    """(setting, its value, the default) of the settings that are not those of the default run of this task
    and preset; without those that say nothing about its kind."""
    preset = _of_preset(config["preset"], config["task"]) if config["preset"] in PRESETS else {}
    default = dataclasses.asdict(Config()) | preset
    default |= {"task": config["task"], "align_block": _align_block(config["depth"])}
    return [(name, str(value), str(default[name])) for name, value in config.items()
            if name not in NOT_OF_ITS_KIND and value != default[name]]


# --- the command line ---------------------------------------------------------------------------------------

def _meanings() -> list[tuple[str, str]]:
    """(heading, meaning) of each setting: the comments of Config itself, so that each stands in one place."""
    heading, found = "", []
    for line in inspect.getsource(Config).splitlines():
        code, _, comment = line.partition("# ")
        if comment.startswith("--- "):
            heading = comment.removeprefix("--- ")
        elif ": " in code and " = " in code:
            found.append([heading, comment])
        elif comment and not code.strip() and found:               # goes on from the line above
            found[-1][1] += " " + comment.strip()
    return [(heading, " ".join(meaning.split())) for heading, meaning in found]


def parse(argv: list[str], description: str = __doc__) -> tuple[dict, str]:
    """Command line -> ({field: typed value} as given, run folder to resume or '')."""
    parser = Parser(description)
    parser.add_argument("--resume", metavar="RUN", help="continue the run in this folder")
    types, groups = typing.get_type_hints(Config), {}
    for f, (heading, meaning) in zip(dataclasses.fields(Config), _meanings(), strict=True):
        if types[f.name] is bool:
            how = {"action": argparse.BooleanOptionalAction, "default": None}
        else:
            how = {"type": types[f.name], "choices": CHOICES.get(f.name),
                   "metavar": None if f.name in CHOICES else types[f.name].__name__.upper()}
        default = "" if f.default == "" or f.default is False else f" (default {f.default})"
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        flag = "--" + f.name.replace("_", "-")
        groups[heading].add_argument(flag, dest=f.name, help=f"{meaning}{default}".replace("%", "%%"), **how)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}

    # A resumed run keeps its settings: another batch size halfway would make it a run that nobody can repeat.
    if given.get("resume") == "":                          # of a shell variable that is not set
        raise UserError("--resume: empty; name the folder of a run")
    resume = os.path.expanduser(given.pop("resume", ""))
    extra = sorted(set(given) - set(WITH_RESUME))
    if resume and extra:
        *some, last, typed = (f"--{name.replace('_', '-')}" for name in (*WITH_RESUME, extra[0]))
        raise UserError(f"--resume continues with the run's own settings; only {', '.join(some)} and {last} "
                        f"may be added, not {typed}")
    if not resume:
        refuse_without_effect(given, given)
    return given, resume


def _of_preset(name: str, task: str) -> dict:
    """The settings that a preset changes for a task."""
    both, only_sr = PRESETS[name]
    return {**both, **only_sr} if task == "sr" else both


def _align_block(depth: int) -> int:
    """The aligned block where none is given: at two fifths of the depth."""
    return max(1, round(0.4 * depth))


def _layered(given: dict) -> Config:
    """Defaults < preset < recipe < what the user typed."""
    preset = given.get("preset", Config.preset)
    if preset == "auto":
        preset = "smoke"  # on a GPU too: the quality of `small` is not known, since none has run it
    of_preset = _of_preset(preset, given.get("task", Config.task))
    recipe = RECIPES[given.get("recipe", Config.recipe)]
    return Config(**{**of_preset, **recipe, **given, "preset": preset})


def compiles_by_default(device: str) -> bool:
    """On CUDA a small network's step is bound by starting some two thousand kernels; compiled, there are
    fewer; elsewhere it costs a minute and gains little."""
    return device.startswith("cuda")


def resolve(given: dict) -> Config:
    """Defaults < preset < recipe < what the user typed, and what `auto` is here. UserError for a value that
    can't be."""
    wrong = wrong_value(given)
    if wrong:
        raise UserError(f"--{wrong}")
    cfg = _layered(given)
    cfg.device = pick_device(cfg.device)
    if cfg.precision == "auto":
        cfg.precision = pick_precision(cfg.device)
    if "compile" not in given:
        cfg.compile = compiles_by_default(cfg.device)
    cfg.out = os.path.expanduser(cfg.out)
    if not cfg.out:
        cfg.out = free_folder(f"runs/{cfg.task}")
    refuse_out_of_range(cfg)
    if not cfg.align_block:
        cfg.align_block = _align_block(cfg.depth)
    return cfg


def free_folder(name: str) -> str:
    """`name`, or name-2, name-3, ...: the first that does not exist."""
    names = itertools.chain([name], (f"{name}-{k}" for k in itertools.count(2)))
    return next(n for n in names if not Path(n).exists())
