"""The command line of evaluate.py: which commands there are and what each takes.

Public: evaluate_parser, add_loading_options.
"""
from __future__ import annotations

import argparse
from pathlib import Path

from parts.arguments import Once, Parser, new_json, new_wav, number, whole


def evaluate_parser(description: str) -> argparse.ArgumentParser:
    """The chosen command's name is `args.command`."""
    parser = Parser(description)
    commands = parser.add_subparsers(dest="command", required=True)

    generate = commands.add_parser("generate", help="caption -> wav")
    generate.add_argument("run")
    generate.add_argument("--prompt", action=Once, required=True)
    generate.add_argument("--out", type=new_wav, default=Path("out.wav"))
    generate.add_argument("--n", type=whole(1, 10_000), default=1,
                          help="how many, from seeds seed, seed + 1, ...")
    generate.add_argument("--method", choices=("euler", "heun"), default="euler")
    generate.add_argument("--seconds", type=number(0.1, 600))

    upsample = commands.add_parser("upsample", help="band-limited audio -> full band")
    upsample.add_argument("run")
    upsample.add_argument("--input", action=Once, type=Path, required=True)
    upsample.add_argument("--out", type=new_wav, default=Path("clear.wav"))
    upsample.add_argument("--cutoff", type=number(500, 7_999),
                          help="Hz above which the input holds nothing; found by itself when left out")

    score = commands.add_parser("score", help="metrics with intervals")
    score.add_argument("runs", nargs="+")
    score.add_argument("--clips", type=whole(2), default=500)
    score.add_argument("--judge", choices=("dev", "final"), help="default dev")
    score.add_argument("--split", choices=("val", "test", "combos"), default="test")
    # Above 7,250 Hz no mel band lies wholly over the cutoff.
    score.add_argument("--cutoff", type=whole(500, 7_250), help="Hz, of super-resolution; default 2000")
    score.add_argument("--data", default="", metavar="FOLDER", help="other data than it was trained on")
    score.add_argument("--val-fold", type=whole(), help="the fold of that data to score on")
    score.add_argument("--max-bad-share", type=number(0, 0.999),
                       help="share of that data's rows or files that may be unusable")
    score.add_argument("--out", type=new_json, help="JSON")
    score.add_argument("--clap", default="", metavar="MODEL",
                       help="a CLAP model, folder or hub id: CLAP score")
    score.add_argument("--audio-model", default="", metavar="MODEL",
                       help="any audio model, folder or hub id: KID and Frechet distance in its space")

    for command in (generate, upsample):
        command.add_argument("--seed", type=whole(), default=0)
    for command in (generate, score):
        command.add_argument("--guidance-scale", type=number(-100, 100), metavar="W",
                             help="1 is plain conditional, 0 unconditional")
    for command in (generate, upsample, score):
        command.add_argument("--steps", type=whole(1, 100_000), help="integration steps")
        add_loading_options(command)

    sounds = commands.add_parser("sounds", help="what a model can be asked for")
    sounds.add_argument("run")
    add_loading_options(sounds)
    export = commands.add_parser("export", help="small checkpoint for sharing")
    export.add_argument("run", type=Path)
    export.add_argument("folder", type=Path)
    dashboard = commands.add_parser("dashboard", help="draw dashboard.png again")
    dashboard.add_argument("run", type=Path)
    page = commands.add_parser("page", help="write index.html again: the run with training time as a slider")
    page.add_argument("run", type=Path)
    return parser


def add_loading_options(command: argparse.ArgumentParser) -> None:
    """How pretrained parts are loaded, and where."""
    command.add_argument("--device", default="cpu")
    command.add_argument("--trust-remote-code", action="store_true",
                         help="run Python code that comes with a pretrained part")
    command.add_argument("--allow-pickle", action="store_true",
                         help="read pretrained weights that are not safetensors")
