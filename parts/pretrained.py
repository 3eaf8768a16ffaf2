"""Other people's models in the place of the embedded parts: how they are loaded (through `transformers`).

Idea.  Research runs replace the toy parts by pretrained ones. Each slot has one class that takes a hub id or
a local folder and has the interface of the part that it replaces, so the rest of the project does not know
which one it got.

    --teacher      parts/pretrained_teacher.py  PretrainedTeacher  wav (B, N) -> phi (B, T', F)
    --codec        parts/pretrained_codec.py    PretrainedCodec    wav (B, N) <-> z (B, T, C)
    --text         parts/pretrained_text.py     PretrainedText     caption -> (1 + S, E)
    --clap         parts/pretrained_judges.py   Clap               wav, caption -> (B, E) of unit length
    --audio-model  parts/pretrained_judges.py   Embedder           wav -> (B, E)

B batch, N samples at 16 kHz, T tokens, T' frames, F, C, E widths, S tokens of text. Each file lists models
that fit.

Nothing here runs code that came with a download, or reads pickled weights, unless a flag asked for it.
`transformers` is imported only when a pretrained part is opened.

Public: load, hub_in_reach, has_own, fingerprint, freeze, CLIPS_PER_CALL.
"""
from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import torch
from torch import nn

from parts.errors import UserError

# Clips in one call of a pretrained encoder or decoder, whose activations are as large as waveform x channels.
CLIPS_PER_CALL = 8
WITHOUT_WEIGHTS = ("AutoConfig", "AutoFeatureExtractor", "AutoTokenizer")  # these read small text files only
# Weights that a folder may lack, since nothing here reads them: what masks inputs in pretraining, counters. A
# pooler is what PretrainedText asks for.
DISPENSABLE = ("masked_spec_embed", "num_batches_tracked", "position_ids", "pooler.")
PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def load(kind: str, name: str, flag: str, trust: bool = False, pickles: bool = False, **options):
    """transformers.KIND.from_pretrained(name), each of its many failures turned into one line of advice.

    name: a folder, or a hub id (searched among what is on this machine first). flag: the setting that named
    it, for the messages. Weights are read from safetensors; `pickles` also admits pytorch_model.bin, `trust`
    the repository's own Python code. Names of weights that the folder lacks, which transformers draws at
    random, stand in `missing_weights` of the model where nothing depends on them. Raises UserError."""
    try:
        import transformers
    except ImportError:
        needs = "needs the package transformers: pip install transformers"
        raise UserError(f"--{flag} {name}: {needs}") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    # A folder, or OWNER/MODEL. Other spellings are meant as paths, and the hub need not be asked for them.
    is_folder = bool(name) and Path(name).expanduser().is_dir()
    if not is_folder and (name.count("/") > 1 or name.startswith((".", "/", "~")) or not name):
        raise UserError(f"--{flag} {name}: no such folder")
    where = str(Path(name).expanduser()) if is_folder else name
    if kind not in WITHOUT_WEIGHTS:
        options |= {"use_safetensors": None if pickles else True, "output_loading_info": True}

    # First what is on this machine, then the hub.
    found = failed = None
    for only_here in (True, False):
        if not only_here and not hub_in_reach():
            break
        try:
            found = getattr(transformers, kind).from_pretrained(
                where, trust_remote_code=trust, local_files_only=only_here, **options
            )
            break
        # OSError, ValueError, KeyError, hub and safetensors errors: the text is all they have in common.
        except Exception as error:
            reason = _final_reason(error, Path(where) if is_folder else None, pickles)
            if reason:
                raise UserError(f"--{flag} {name}: {reason}") from None
            failed = failed or error
    if found is not None:
        return found if kind in WITHOUT_WEIGHTS else _complete(*found, f"--{flag} {name}")
    cached = _cached_folder(name)
    if cached:
        raise UserError(f"--{flag} {name}: {_damage(failed, cached, name, pickles)}")
    folder = "models/" + name.split("/")[-1]
    raise UserError(
        f"--{flag} {name}: not on this machine, and the hub can't be reached or has no such model. "
        f"With a network: hf download {name} --local-dir {folder}; then --{flag} {folder}"
    )


def _complete(model: nn.Module, info: dict, where: str) -> nn.Module:
    """The model, if no weight was missing that its output depends on. info: of its loading."""
    model.missing_weights = sorted(info["missing_keys"])
    random = [name for name in model.missing_weights if not any(part in name for part in DISPENSABLE)]
    if random:
        raise UserError(f"{where}: lacks {len(random)} of the model's weights ({random[0]}), which would be "
                        "random; get the whole model, or another one")
    return model


def _final_reason(error: Exception, folder: Path | None, pickles: bool) -> str | None:
    """Why loading failed for good; None where a hub id (folder None) may still be found elsewhere."""
    text = str(error)
    if "trust_remote_code" in text or "custom code" in text:
        return (
            "comes with Python code of its own, which would run on this machine; read it, "
            "then add --trust-remote-code"
        )
    if folder is None:
        return None
    if not pickles and any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        return (
            "its weights are pickled (.bin), a format that can carry code; convert them to safetensors, "
            "or add --allow-pickle"
        )
    first_line = (text.splitlines() or [""])[0]
    return f"can't be loaded ({type(error).__name__}: {first_line[:160]})"


def _cached_folder(name: str) -> Path | None:
    """Where the hub's client has put this model on this machine; None: it has not."""
    from huggingface_hub import try_to_load_from_cache
    file = try_to_load_from_cache(name, "config.json")
    return Path(file).parent if isinstance(file, str) else None


def _damage(error: Exception, cached: Path, name: str, pickles: bool) -> str:
    """Why a model that was downloaded to the folder `cached` can't be used, and what to do."""
    reason = _final_reason(error, cached, pickles)
    if "can't be loaded" not in reason:
        return reason
    return (f"its download on this machine is incomplete or damaged, it {reason}; with a network: "
            f"hf download {name} --force-download (its folder is {cached})")


def hub_in_reach() -> bool:
    """Can the hub's name be resolved (or is there a proxy that may)?

    Asked first because the hub's client would retry for half a minute to find out."""
    from huggingface_hub import constants
    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in PROXIES):
        return True
    host = constants.ENDPOINT.split("//")[-1].split("/")[0].split(":")[0]
    try:
        return bool(socket.getaddrinfo(host, 443))
    except OSError:
        return False


def has_own(name: str, file: str) -> bool:
    """Does a model folder or cached repository hold this file?"""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return (folder / file).is_file()
    from huggingface_hub import try_to_load_from_cache
    return isinstance(try_to_load_from_cache(name, file), str)


def fingerprint(model: nn.Module) -> str:
    """Short hash of the weights: what a cache of features or latents is keyed by."""
    sha = hashlib.sha256()
    for name, value in model.state_dict().items():
        sha.update(name.encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def freeze(model: nn.Module, device: str) -> nn.Module:
    """No gradients, eval mode, on the device; bfloat16 on a GPU (a teacher's features need no more, and
    float16 overflows in some models)."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    return model.to(device, dtype).eval().requires_grad_(False)
