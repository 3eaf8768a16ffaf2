"""Train the decoder of parts/decoder.py: log-mel frames to waveforms.

    python -m lab.train_decoder --out assets/decoder.safetensors [--steps 5000 --clips 6000 --patches 6000]
    python -m lab.train_decoder --out assets/decoder.safetensors --resume                # after a stop

This is the shipped decoder (half precision; about a CPU hour). Trained on SoundWorld's training clips and on
random patches (parts/patches.py), which are like nothing in particular; on no recording and no clip that
anything is scored on.

    wav (B, N) --codec: encode, decode_mel--> log-mel (what generated latents are decoded from too)
    log-mel, two noises --Decoder--> x, x' (B, F, 513), spectra
    loss = E d(x, y) - E d(x, x') / 2, y the clip's spectrum; d: a distance of log magnitudes

The loss is an energy score, which is smallest where x is distributed as y is: a spectral energy distance
(Gritsenko et al., arXiv 2008.01160) in place of a discriminator. Regression alone, E d(x, y), would be
smallest for the blurred centre, which is what Griffin-Lim of a smooth spectrum sounds like.

B clips in a batch, N samples.

Public: spectral_distance, energy_loss, train_decoder.
"""
from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from parts.arguments import Parser, new_weights, whole
from parts.audio import CLIP_S, RATE
from parts.cache import cache_dir, digest, fill_array
from parts.checkpoints import save_half
from parts.codec import PER_TOKEN, Codec
from parts.decoder import Decoder, unit_noise
from parts.devices import StopSignal
from parts.errors import Stopped, UserError, run_cli
from parts.files import write_bytes
from parts.optim import make_optimizers, rate_factor
from parts.patches import RandomPatches
from parts.soundworld import SoundWorld
from parts.spectra import HOP, stft

SECONDS = 1.28                                             # of a training crop
FLOOR = 1e-3       # STFT magnitude that is silence: 108 dB below a full-scale tone's
RATES = (1e-3, 4e-3)                # of AdamW and Muon, after warm-up
PATCHES = ((1, 8), (8, 1), (4, 8))  # frames x bins whose distance is one Euclidean norm


# --- loss -----------------------------------------------------------------------------------------------

def log_magnitude(spectrum: Tensor) -> Tensor:
    """Complex (B, F, 513) -> nats, floored."""
    return 0.5 * (torch.view_as_real(spectrum).square().sum(-1) + FLOOR**2).log()


def spectral_distance(x: Tensor, y: Tensor) -> Tensor:
    """Distance of log magnitudes (B, F, 513): bin by bin, so that each bin's distribution counts, and patch
    by patch (Euclidean norms), so that what neighbours in time and frequency have in common does too. Scalar,
    nats."""
    difference = x - y
    total = difference.abs().mean()
    for patch in PATCHES:
        squares = F.avg_pool2d(difference.square()[:, None], patch)            # mean square of each patch
        total = total + (squares + 1e-6).sqrt().mean()
    return total / (1 + len(PATCHES))


def energy_loss(decoder: Decoder, mel: Tensor, wav: Tensor, generator: torch.Generator) -> Tensor:
    """log-mel (B, F, 64), the clips (B, 320 F) -> the energy score of two decodings: scalar."""
    tones, gain = decoder(mel)
    noises = torch.randn(2, *wav.shape, generator=generator)
    # How a tone's phase lies to the noise is random, since the noise is.
    spectra = [tones + gain * unit_noise(noise)[:, :-1] for noise in noises]
    first, second = (log_magnitude(decoder.fit(spectrum, mel)) for spectrum in spectra)
    target = log_magnitude(stft(wav)[:, :-1])
    # E d(x, y) - E d(x, x') / 2                                           # Gneiting & Raftery 2007, eq. 22
    near = 0.5 * (spectral_distance(first, target) + spectral_distance(second, target))
    return near - 0.5 * spectral_distance(first, second)


# --- training -------------------------------------------------------------------------------------------

def _patch_waves(indices, source: RandomPatches) -> np.ndarray:
    """Random patches `indices`, (len(indices), N) int16: what one worker makes."""
    return np.stack([np.round(source.pair(i)[0] * 32_767) for i in indices]).astype(np.int16)


def training_waves(clips: int, patches: int, seed: int) -> list[np.ndarray]:
    """SoundWorld's training clips and random patches, (n, N) int16 each, on disk."""
    world = SoundWorld("train", clips).prepare()
    source = RandomPatches(patches, seed)
    folder = cache_dir() / f"{source.key}-waves-{digest('decoder', 1)}"
    shape = (patches, round(CLIP_S * RATE))
    made = fill_array(folder, "waves", shape, np.int16, _patch_waves, patches, (source,),
                      desc="random patches")
    return [world._waves, made]


def crops(banks: list[np.ndarray], batch: int, rng) -> Tensor:
    """(batch, N): as many of each bank, cut at random, at random levels."""
    n = round(SECONDS * RATE) // (PER_TOKEN * HOP) * PER_TOKEN * HOP
    waves = []
    for k in range(batch):
        bank = banks[k % len(banks)]
        start = rng.integers(bank.shape[1] - n + 1)
        gain = 10 ** (rng.uniform(-12, 3) / 20)
        waves.append(gain * bank[rng.integers(len(bank)), start : start + n].astype(np.float32) / 32_767)
    return torch.from_numpy(np.stack(waves)).float().clamp(-1, 1)


def _save(state: dict, path: Path) -> None:
    """Whole or not at all."""
    content = io.BytesIO()
    torch.save(state, content)
    write_bytes(path, content.getvalue())


def train_decoder(codec: Codec, banks: list[np.ndarray], steps: int, batch: int = 16, seed: int = 0,
                  checkpoint: Path | None = None, resume: bool = False) -> Decoder:
    """Train a decoder of the codec's log-mel; deterministic for a seed and thread count. checkpoint: written
    when stopped, and read with resume. Stopped: the user stopped it."""
    settings = {"steps": steps, "crops a step": batch, "seed": seed, "clips": [len(bank) for bank in banks]}
    torch.manual_seed(seed)
    decoder = Decoder()
    optimizers = make_optimizers(decoder, "muon", *RATES, 0.0)
    first = 0
    if resume:
        if not checkpoint.is_file():
            raise UserError(f"--resume: there is no {checkpoint}; leave it out to begin")
        try:
            state = torch.load(checkpoint, weights_only=True)
        except Exception as e:  # zip and pickle errors all mean the same to the user
            raise UserError(f"--resume: {checkpoint} can't be read ({type(e).__name__}); leave it out to "
                            "begin anew") from None
        if state["settings"] != settings:
            raise UserError(f"--resume: {checkpoint} is of {state['settings']}, not {settings}; give the "
                            "same, or begin anew")
        decoder.load_state_dict(state["decoder"])
        for optimizer, old in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(old)
        first = state["step"]

    bar = tqdm(range(first, steps), initial=first, total=steps, desc="decoder", dynamic_ncols=True)
    with StopSignal() as stop:
        for k in bar:
            # Functions of (seed, step) alone, so a resumed training sees what it would have seen.
            rng, generator = np.random.default_rng([seed, 8, k]), torch.Generator().manual_seed(8_000_000 + k)
            wav = crops(banks, batch, rng)
            with torch.no_grad():
                z = codec.encode(wav)
                # Generated latents are near true ones, no more: the decoder must bear a little error.
                z = z + 0.1 * rng.uniform() * torch.randn(z.shape, generator=generator)
                mel = codec.decode_mel(z)
            loss = energy_loss(decoder, mel, wav, generator)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            for optimizer, rate in zip(optimizers, RATES):
                optimizer.param_groups[0]["lr"] = rate * rate_factor(k + 1, steps, 100, 0.4)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if k % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
            stopped = stop.now
            if checkpoint and (stopped or (k + 1) % 200 == 0):
                _save({"decoder": decoder.state_dict(), "step": k + 1, "settings": settings,
                       "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, checkpoint)
            if stopped:
                raise Stopped(f"stopped at step {k + 1}; continue with --resume")
    return decoder.eval().requires_grad_(False)


def main() -> None:
    parser = Parser(__doc__, prog="python -m lab.train_decoder")
    parser.add_argument("--steps", type=whole(1), default=5_000)
    parser.add_argument("--clips", type=whole(2), default=6_000, help="SoundWorld training clips")
    parser.add_argument("--patches", type=whole(1), default=6_000, help="random patches")
    parser.add_argument("--seed", type=whole(), default=0)
    parser.add_argument("--resume", action="store_true", help="go on after a stop")
    parser.add_argument("--out", type=new_weights, required=True)
    args = parser.parse_args()
    banks = training_waves(args.clips, args.patches, args.seed)
    codec = Codec().fit(clip.astype(np.float32) / 32_767 for clip in banks[0][:2_000])
    checkpoint = args.out.with_name(f"{args.out.name}.checkpoint")
    decoder = train_decoder(codec, banks, args.steps, seed=args.seed, checkpoint=checkpoint,
                            resume=args.resume)
    save_half(decoder, args.out)
    checkpoint.unlink(missing_ok=True)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_cli(main)
