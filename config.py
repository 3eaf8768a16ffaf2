"""What a run is made of: every setting with its default, the presets, the recipes, the command line.

    defaults < preset (by device) < recipe < what the user typed

Read it beside train.py, which does what is said here. A new setting is one line of Config; a new row of mechanisms one line of RECIPES.
"""
from __future__ import annotations

import argparse
import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path

import evaluate
import regime
import structure_reg
from data import UserError


@dataclass
class Config:
    task: str = "t2a"            # t2a: caption -> sound; sr: band-limited -> full-band sound
    data: str = "soundworld"     # soundworld, a folder of recordings (layouts: data.AudioFolder), or a mixture: a=3,soundworld=1
    max_bad_share: float = 0.01  # share of a folder's rows or files that may be unusable; they are left out and listed in bad.txt
    val_fold: int = 0            # folder data: the value of column `fold` that is held out; 0: a tenth of the files
    out: str = ""                # run folder; empty: runs/<task>, numbered when taken
    preset: str = "auto"         # smoke (CPU, MPS) | small (one GPU) | full; auto: by device
    device: str = "auto"         # cpu | cuda | mps
    precision: str = "auto"      # fp32 | bf16; auto: the one that measures faster on this machine at this shape
    seed: int = 0                # everything random derives from it
    steps: int = 3_000           # optimizer steps
    batch: int = 32              # clips a step, over all devices
    accumulate: int = 1          # parts that a batch is cut into, one after another: less memory, the same flow-matching gradient
    checkpointing: bool = False  # recompute each block in the backward pass instead of keeping it: less memory, a third more time
    compile: bool = False        # torch.compile the network: a minute or more at the start
    width: int = 128             # D
    depth: int = 4               # L, transformer blocks
    heads: int = 4               # attention heads
    channels: int = 64           # C, principal components kept by the codec
    seconds: float = 2.56        # length of training crops
    clips: int = 6_000           # SoundWorld training clips
    variants: int = 3            # sr: band-limited versions of each training clip
    optimizer: str = "muon"      # muon: for the matrices inside blocks, AdamW for the rest | adamw: for everything
    lr: float = 2e-3             # rate after warm-up; constant, because a decay would favour early-finishing arms
    muon_lr: float = 5e-3        # the same for Muon, in units of AdamW's rate (update RMS 0.2 lr)
    warmup: int = 100            # steps of linear warm-up
    weight_decay: float = 0.01   # decoupled, in both optimizers
    clip: float = 1.0            # gradient norm ceiling
    ema: float = 0.9999          # EMA ceiling; ramped as (1 + k) / (10 + k), so the average spans the last tenth of the run
    cond_drop: float = 0.1       # share of samples trained without condition, for classifier-free guidance
    recipe: str = "stage"        # vanilla | static | stop | clock | stage: a row of RECIPES; single flags are laid over it
    guidance: str = "adaptive"   # off | constant | adaptive: lambda(r)
    codec: str = "mel"           # the latent space; mel: log-mel + PCA, or a neural codec (folder or hub id)
    text: str = "words"          # words: the embedded encoder, trained along, or a frozen one (folder or hub id)
    teacher: str = "tiny"        # tiny: the shipped one | its controls: random (not pretrained) | shuffled (what it hears in other clips) | folder or hub id
    teacher_layer: int = 0       # of a pretrained teacher, from 1; 0: the last
    lambda0: float = 0.5         # weight of the alignment loss (REPA: 0.5)
    gamma: float = 1.0           # exponent of its decay
    stop_at: float = 0.0         # share of the steps after which constant guidance ends at once (HASTE, arXiv 2505.16792); 0: never
    guide_every: int = 4         # guidance looks at every n-th token of a clip, another one each step: neighbours resemble each other
    align: int = 0               # aligned block, from 1; 0: round(0.4 L)
    timesteps: str = "adaptive"  # off: reference density (m = 0) | constant: m_late | adaptive: from m_early to m_late with r
    m_late: float = 1.5          # centre m of p(t) at r = 1, and of the constant mode; a logit: 1.5 is t = 0.82, higher is towards noise
    m_early: float = 2.0         # m at r = 0: t = 0.88
    t_std: float = 1.0           # s of the logit-normal, on the same scale
    structure: str = "adaptive"  # off | constant: groups by depth, from the start | adaptive: groups found in the weights, once they have converged
    mu0: float = 0.1             # weight of the structure loss
    struct_loss: str = "grouped"  # grouped | dispersive
    regime: str = "slope"        # source of r: slope | loss | clock | replay:FILE (another run's log.jsonl)
    signal: str = "t1"           # what the slope is taken of: t1 | levels | ratio | latent (regime.signal)
    probe: str = "auto"          # auto: measure D where r depends on it | always | never
    cfg: float = 2.5             # guidance scale w of previews and scores (t2a; sr uses 1)
    sample_steps: int = 16       # Euler steps of previews and scores
    eval_every: int = 600        # steps between validation, previews and checkpoints
    score_clips: int = 500       # clips of the final table
    score_split: str = "test"    # test | val: development must not see the test split
    judge: str = "dev"           # dev | final: who listens for the final table
    clap: str = ""               # a CLAP model (folder or hub id) for the final table's CLAP score
    audio_model: str = ""        # any audio model, for the final table's KID and Frechet distance
    trust_remote_code: bool = False  # run Python code that comes with a pretrained model
    allow_pickle: bool = False   # read pretrained weights that are not safetensors
    workers: int = -1            # processes that prepare data; -1: one a core
    profile: bool = False        # print each part's share of the time at the end

    @property
    def adaptive(self) -> bool:
        """Does any mechanism follow r?"""
        return "adaptive" in (self.guidance, self.timesteps, self.structure)


PRESETS = {  # what differs from the defaults above; a second entry is laid over it for super-resolution
    "smoke": ({}, {"clips": 2_500, "score_clips": 100}),
    "small": ({"steps": 20_000, "batch": 128, "width": 384, "depth": 12, "heads": 6, "clips": 40_000, "lr": 5e-4, "muon_lr": 2e-3, "eval_every": 1_000}, {}),
    "full": ({"steps": 300_000, "batch": 256, "width": 768, "depth": 16, "heads": 12, "channels": 96, "seconds": 10.24, "clips": 20_000,
              "lr": 2e-4, "muon_lr": 1e-3, "warmup": 2_000, "eval_every": 5_000}, {}),
}
RECIPES = {  # who drives what; the other settings are the same in every row
    "vanilla": {"guidance": "off", "timesteps": "off", "structure": "off"},
    "static": {"guidance": "constant", "timesteps": "constant", "structure": "off"},
    "stop": {"guidance": "constant", "timesteps": "constant", "structure": "off", "stop_at": 0.4},
    "clock": {"guidance": "adaptive", "timesteps": "adaptive", "structure": "adaptive", "regime": "clock"},
    "stage": {"guidance": "adaptive", "timesteps": "adaptive", "structure": "adaptive", "regime": "slope"},
}
TRUST = ("trust_remote_code", "allow_pickle")  # said anew each time: a folder from elsewhere must not say it for the user
MODES = ("off", "constant", "adaptive")
CHOICES = {"task": ("t2a", "sr"), "preset": ("auto", *PRESETS), "precision": ("auto", "fp32", "bf16"), "optimizer": ("muon", "adamw"),
           "recipe": tuple(RECIPES), "guidance": MODES, "timesteps": MODES, "structure": MODES, "struct_loss": tuple(structure_reg.LOSSES),
           "signal": regime.SIGNALS, "score_split": ("test", "val"), "judge": ("dev", "final"), "probe": ("auto", "always", "never")}


def parse(argv: list[str], description: str = __doc__) -> tuple[dict, str]:
    """Command line -> ({field: typed value} as given, run folder to resume or '')."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--resume", metavar="RUN", default="", help="continue the run in this folder")
    hints = typing.get_type_hints(Config)
    for f in dataclasses.fields(Config):
        how = {"action": argparse.BooleanOptionalAction, "default": None} if hints[f.name] is bool else {"type": hints[f.name], "choices": CHOICES.get(f.name)}
        p.add_argument("--" + f.name.replace("_", "-"), dest=f.name, help=f"default {f.default!r}", **how)
    given = {k: v for k, v in vars(p.parse_args(argv)).items() if v is not None}
    resume = given.pop("resume")
    extra = sorted(set(given) - {"steps", "device", "workers", "profile", *TRUST})
    if resume and extra:
        raise UserError(f"--resume continues with the run's own settings; only --steps, --device, --workers and --profile may be added, not --{extra[0].replace('_', '-')}")
    return given, resume


def out_of_range(cfg: Config) -> tuple[str, str] | None:
    """The first setting with an impossible value, as ("name value", what it must be)."""
    for name, ok, why in (("steps", cfg.steps > 0, "positive"), ("batch", cfg.batch > 0, "positive"), ("lr", cfg.lr > 0, "positive"), ("muon_lr", cfg.muon_lr > 0, "positive"),
        ("width", 0 < cfg.width <= 16_384, "from 1 to 16384"), ("heads", cfg.heads > 0 and cfg.width % (2 * cfg.heads) == 0, "such that width / heads is an even number"),
        ("channels", 0 < cfg.channels <= 128, "from 1 to 128"), ("seconds", 0.5 <= cfg.seconds <= 30, "from 0.5 to 30"),
        ("seed", cfg.seed >= 0, "0 or more"), ("max_bad_share", 0 <= cfg.max_bad_share < 1, "in [0, 1)"), ("warmup", cfg.warmup > 0, "positive"), ("clip", cfg.clip > 0, "positive"), ("weight_decay", cfg.weight_decay >= 0, "0 or more"), ("score_clips", cfg.score_clips >= 2, "at least 2"),
        ("accumulate", cfg.accumulate > 0 and cfg.batch % cfg.accumulate == 0, f"a divisor of --batch {cfg.batch}"),
        ("accumulate", cfg.batch // cfg.accumulate > 1 or cfg.structure == "off" and cfg.teacher != "shuffled", "fewer than --batch: the structure loss and shuffled features compare clips of one part"),
        ("clips", cfg.clips >= 100, "at least 100"), ("variants", cfg.variants > 0, "positive"), ("eval_every", cfg.eval_every > 0, "positive"),
        ("cond_drop", 0 <= cfg.cond_drop < 1, "in [0, 1)"), ("sample_steps", cfg.sample_steps > 0, "positive"),
        ("lambda0", cfg.lambda0 >= 0, "0 or more"), ("mu0", cfg.mu0 >= 0, "0 or more"), ("gamma", cfg.gamma > 0, "positive"),
        ("stop_at", 0 <= cfg.stop_at <= 1, "in [0, 1]"), ("align", 0 <= cfg.align <= cfg.depth, f"a block from 1 to {cfg.depth}, or 0"),
        ("guide_every", 0 < cfg.guide_every <= 8, "from 1 to 8"),
        ("t_std", cfg.t_std > 0, "positive"), ("depth", 0 < cfg.depth <= 512, "from 1 to 512"),
        ("depth", cfg.depth > 1 or cfg.structure == "off" and cfg.probe != "always", "at least 2, or add --structure off: one block has no groups"),
        ("clap", not cfg.clap or cfg.task == "t2a", "left out with --task sr: there is no caption to compare with"),
        ("probe", cfg.probe != "never" or cfg.regime != "slope" or not cfg.adaptive,
         "auto or always where an adaptive mechanism follows the slope")):
        if not ok:
            return f"{name.replace('_', '-')} {getattr(cfg, name)}", why
    return None


def foreign(fields) -> str | None:
    """What is wrong with the settings of a run folder from elsewhere, in one line; None: nothing."""
    hints, known = typing.get_type_hints(Config), {f.name for f in dataclasses.fields(Config)}
    if not isinstance(fields, dict) or set(fields) != known:
        odd = sorted(set(fields) ^ known) if isinstance(fields, dict) else []
        return f"{'unknown' if odd[0] not in known else 'no'} setting {odd[0]!r}; it is of another version" if odd else "holds no settings"
    for name, value in fields.items():
        kinds = (int, float) if hints[name] is float else (hints[name],)
        if not isinstance(value, kinds) or isinstance(value, bool) != (hints[name] is bool):
            return f"{name} is {value!r}, not of type {hints[name].__name__}"
        if name in CHOICES and value not in CHOICES[name]:
            return f"{name} is {value!r}, not one of {', '.join(CHOICES[name])}"
    wrong = out_of_range(Config(**fields))
    return "{}: must be {}".format(*wrong) if wrong else None


def resolve(given: dict) -> Config:
    """Defaults < preset (by device) < recipe < what the user typed."""
    cfg = Config(**{k: given[k] for k in ("task", "device", "preset") if k in given})
    cfg.device = evaluate.pick_device(cfg.device)
    if cfg.preset == "auto":
        cfg.preset = "small" if cfg.device.startswith("cuda") else "smoke"
    base, for_sr = PRESETS[cfg.preset]
    cfg = dataclasses.replace(cfg, **base, **(for_sr if cfg.task == "sr" else {}), **RECIPES[given.get("recipe", cfg.recipe)])
    cfg = dataclasses.replace(cfg, **{k: v for k, v in given.items() if k not in ("device", "preset")})
    if not given.get("out"):
        names = [f"runs/{cfg.task}" + (f"-{k}" if k > 1 else "") for k in range(1, 10_000)]
        cfg.out = next(n for n in names if not Path(n).exists())
    wrong = out_of_range(cfg)
    if wrong:
        raise UserError("--{}: must be {}".format(*wrong))
    try:
        regime.Regime(cfg.regime, cfg.steps)
    except (ValueError, OSError) as e:
        raise UserError(f"--regime {cfg.regime}: {e}") from None
    return dataclasses.replace(cfg, align=cfg.align or max(1, round(0.4 * cfg.depth)))


def settings(given: dict, resume: str) -> tuple[Config, dict | None]:
    """What the user gave, completed, and the checkpoint to go on from."""
    if not resume:
        cfg = resolve(given)
        if Path(cfg.out).exists() and any(Path(cfg.out).iterdir()):
            raise UserError(f"--out {cfg.out}: folder is not empty; resume it with --resume {cfg.out}, or choose another")
        return cfg, None
    begun = evaluate.has_checkpoint(Path(resume))  # or died before its first checkpoint: then from the start
    cfg, ckpt = evaluate.load_checkpoint(Path(resume)) if begun else (evaluate.load_config(Path(resume)), None)
    if ckpt and "optimizer" not in ckpt:
        raise UserError(f"--resume {resume}: an exported checkpoint (no optimizer state); it can be used, not continued")
    cfg = dataclasses.replace(Config(**cfg), out=resume, **dict.fromkeys(TRUST, False) | given)
    cfg.device = evaluate.pick_device(cfg.device)
    if ckpt and cfg.steps <= ckpt["step"] and "steps" in given:
        raise UserError(f"--steps {cfg.steps}: {resume} already has {ckpt['step']} steps; give a larger number")
    return cfg, ckpt
