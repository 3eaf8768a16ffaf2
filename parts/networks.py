"""What learns: the network, its average, guidance's projector, their optimizers; on one device or several.

Nothing here knows what the network is; train.py builds it, computes its losses (`losses`) and takes the
steps of its optimizers (`update`).

Public: Networks, Compiled.
"""
from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from parts.checkpoints import load_weights
from parts.config import Config
from parts.devices import WORLD, tf32
from parts.errors import UserError, out_of_memory
from parts.optim import make_optimizers


class Compiled:
    """A network, compiled; where that fails, as it is, and one line says so."""

    def __init__(self, net: nn.Module):
        # Shapes are few (parts/batches.py): each gets code of its own. Past the limit, which all networks of
        # a process share, torch would run them as they are, and say nothing.
        torch._dynamo.config.recompile_limit = 256
        self.net, self.compiled = net, torch.compile(net, dynamic=False)

    def __call__(self, *args):
        if self.compiled is None:
            return self.net(*args)
        try:
            return self.compiled(*args)
        except Exception as e:  # of the compiler's many kinds; the network's own come again below
            if out_of_memory(e):
                raise
            self.compiled = None
            why = (str(e).strip().splitlines() or [type(e).__name__])[0][:120]
            print(f"note: the network can't be compiled here ({why}); it runs as it is, slower on a GPU")
        return self.net(*args)


class Networks:
    """model: the network, on its device; projector: that of guidance, or None; phi_mean (F,): mean of the
    teacher's features, or None. `net` and `project` are model and projector as they are called in
    training."""

    def __init__(self, cfg: Config, model: nn.Module, projector: nn.Module | None = None,
                 phi_mean: Tensor | None = None):
        self.cfg, self.model, self.projector, self.phi_mean = cfg, model, projector, phi_mean
        model.checkpointing = cfg.checkpointing
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
        self.model_optimizers = make_optimizers(model, cfg.optimizer, cfg.lr, cfg.muon_lr, cfg.weight_decay,
                                                dtype)
        self.optimizers = list(self.model_optimizers)
        if projector is not None:
            self.optimizers += make_optimizers(projector, "adamw", cfg.lr, 0, cfg.weight_decay)
        self.net, self.project = model, projector
        if WORLD > 1:
            # Gradients are averaged over the devices.
            devices = [cfg.device] if cfg.device.startswith("cuda") else None
            self.net = nn.parallel.DistributedDataParallel(model, devices)
            if projector is not None:
                self.project = nn.parallel.DistributedDataParallel(projector, devices)
        if cfg.compile:
            self.net = Compiled(self.net)
        if cfg.device.startswith("cuda"):
            tf32(True)

    @property
    def lr(self) -> float:
        """AdamW's learning rate at the last update."""
        return self.model_optimizers[0].param_groups[0]["lr"]

    def autocast(self):
        """bfloat16 where the settings say so."""
        kind = self.cfg.device.split(":")[0]
        return torch.autocast(kind, torch.bfloat16, enabled=self.cfg.precision == "bf16")

    def plain(self) -> Networks:
        """The same networks, called neither compiled nor distributed."""
        same = copy.copy(self)
        same.net, same.project = self.model, self.projector
        return same

    def state_dict(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "projector": self.projector.state_dict() if self.projector is not None else {},
            "optimizer": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load(self, state: dict, folder: str) -> None:
        """From a checkpoint's state_dict; `folder` is named where it does not fit (UserError)."""
        load_weights(folder, self.model, state["model"])
        load_weights(folder, self.ema, state["ema"])
        if self.projector is not None:
            load_weights(folder, self.projector, state["projector"])
        try:
            for optimizer, saved in zip(self.optimizers, state["optimizer"], strict=True):
                optimizer.load_state_dict(saved)
        except (ValueError, LookupError, TypeError, AttributeError) as e:  # config.json was changed
            raise UserError(f"{folder}: its optimizers are of other settings than config.json's ({e})"
                            ) from None
