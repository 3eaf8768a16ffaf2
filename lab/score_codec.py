"""The round trip of held-out clips through a latent space: to be read before a model is trained in it.

    python -m lab.score_codec mel
    python -m lab.score_codec models/dac --data my_folder --out codec.json

Public: main.
"""
from __future__ import annotations

import data
from parts.arguments import Parser, new_json, number, whole
from parts.audio import CLIP_S
from parts.commands import add_loading_options
from parts.components import open_codec
from parts.config import NO_FOLD, Config
from parts.devices import pick_device
from parts.errors import run_cli
from parts.files import to_json, write_text
from parts.scoring import codec_table, score_codec


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("codec", metavar="mel|MODEL")
    parser.add_argument("--channels", type=whole(1, 128), default=64, help="principal components kept")
    parser.add_argument("--data", default="soundworld", help="soundworld or a folder of recordings")
    parser.add_argument("--val-fold", type=whole(), default=NO_FOLD, help="the fold that is held out")
    parser.add_argument("--max-bad-share", type=number(0, 0.999), default=Config.max_bad_share,
                        help="share of its rows or files that may be unusable")
    parser.add_argument("--clips", type=whole(2), default=100)
    parser.add_argument("--out", type=new_json, help="JSON")
    add_loading_options(parser)
    args = parser.parse_args()
    config = {"codec": args.codec, "channels": args.channels, "data": args.data, "val_fold": args.val_fold,
              "max_bad_share": args.max_bad_share, "seconds": CLIP_S}
    codec = open_codec(config, pick_device(args.device), args.trust_remote_code, args.allow_pickle)
    train_set, test_set = data.open_set(config, "train", 2_000), data.open_set(config, "test", args.clips)
    result = score_codec(codec, config, train_set, test_set, args.clips)
    print(codec_table(result))
    if args.out:
        write_text(args.out, to_json(result, indent=1) + "\n")


if __name__ == "__main__":
    run_cli(main)
