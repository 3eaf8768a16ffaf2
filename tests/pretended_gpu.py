"""A pretended GPU: what can be said about devices without one. Numbers are real and on the CPU, but each
tensor knows where it would live: mixing two places raises what torch would raise, and each wait of the host
for the device is counted, with the line that waits.

    with pretend() as gpu: ...          # "cuda" can be asked for; .to("cuda") tags, .device and .is_cuda tell
    gpu.waits                           # Counter {"train.py:180 __float__": 7, ...}
    with pretend("mps") as gpu: ...     # an Apple GPU, which has no float64

What counts as a wait: reading a number (float, item, bool, tolist), an index whose size depends on values,
copies to the host, and copies to the device that are blocking or come from memory that is not pinned.

How: a TorchFunctionMode sees every call of torch's Python API, methods and properties included. Not seen:
what happens inside one call (kernels, CUDA's own lists of autocast, attention back ends), streams, compiled
code (torch.compile gives the function itself here), several GPUs.

Public: pretend, Pretended, GPU.
"""
import collections
import contextlib
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import model
from parts import background, devices

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
WAITS = {"item", "__float__", "__int__", "__bool__", "__index__", "tolist", "nonzero", "masked_select",
         "unique", "equal", "allclose"}
# What may take tensors of both places: copies, and indices that are on the CPU.
MAY_MIX = {"copy_", "__set__", "__get__", "__getitem__", "__setitem__", "__deepcopy__",
           "_has_compatible_shallow_copy_type"}
VIEWS = {"__getitem__", "view", "reshape", "unbind", "chunk", "split"}  # of pinned memory: pinned too


def place(x) -> torch.device | None:
    """The accelerator on which a tensor would live; None: it is on the CPU, or no tensor."""
    return x.__dict__.get("place") if isinstance(x, torch.Tensor) else None


def accelerator(device) -> torch.device | None:
    """The device that a name means, None for those that are really here (cpu, meta)."""
    kind = str(device).partition(":")[0]
    if isinstance(device, bool) or kind not in ("cuda", "mps"):
        return None
    return torch.device(kind, int(str(device).partition(":")[2] or 0))


def put(out, where: torch.device | None):
    """Say of every tensor in `out` where it lives."""
    for x in tree_leaves(out):
        if isinstance(x, torch.Tensor):
            if where is not None and where.type == "mps" and x.dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't "
                                "support float64. Please use float32 instead.")
            x.__dict__["place"] = where
    return out


def pin(x: torch.Tensor, *device) -> torch.Tensor:
    """Tensor.pin_memory: a copy that says so."""
    with torch._C.DisableTorchFunction():
        out = x.clone()
    out.__dict__["pinned"] = True
    return out


class Pretended(TorchFunctionMode):
    """The mode itself. waits: how often each line waited for the device."""

    def __init__(self):
        super().__init__()
        self.waits = collections.Counter()

    def wait(self, what: str) -> None:
        frame = sys._getframe(1)
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            if file.is_relative_to(ROOT) and file != Path(__file__):
                break
            frame = frame.f_back
        where = f"{file.name}:{frame.f_lineno}" if frame else "?"
        self.waits[f"{where} {what}"] += 1

    def over(self, function, args):
        """function(*args) under this mode."""
        with self:
            return function(*args)

    def move(self, func, x, args, kwargs):
        """x.to(...), x.cpu(), x.cuda()."""
        given = [*args, *kwargs.values()]
        named = [a for a in given if isinstance(a, (str, torch.device))]
        like = [a for a in given if isinstance(a, torch.Tensor)]
        where = place(x)
        if func.__name__ in ("cpu", "cuda"):
            where = GPU if func.__name__ == "cuda" else None
        elif named:
            where = accelerator(named[0])
        elif like:
            where = place(like[0])
        moves = where != place(x)
        if moves and (where is None or not kwargs.get("non_blocking")):
            self.wait("copy to the host" if where is None else "copy, blocking")
        elif moves and not x.__dict__.get("pinned"):
            self.wait("copy from memory that is not pinned")

        def really(a):
            return CPU if isinstance(a, (str, torch.device)) and accelerator(a) else a
        if func.__name__ in ("cpu", "cuda"):
            out = x
        else:
            out = func(x, *map(really, args), **{name: really(a) for name, a in kwargs.items()})
        if out is x and moves:
            with torch._C.DisableTorchFunction():
                out = x.clone()
        return out if out is x else put(out, where)

    def refuse_mixtures(self, name: str, tensors: list, first) -> None:
        """What torch raises where tensors of two devices meet. A CPU scalar may meet anything."""
        places = {place(x) for x in tensors if place(x) is not None}
        strange = [tuple(x.shape) for x in tensors if place(x) is None and x.dim()]
        mixed = name not in MAY_MIX or (name == "__getitem__" and place(first) is None)
        if len(places) > 1 or (places and strange and mixed):
            raise RuntimeError("Expected all tensors to be on the same device, but found at least two "
                               f"devices, {sorted(map(str, places))} and cpu! ({name}: {strange})")

    def created(self, name: str, kwargs: dict) -> torch.device | None:
        """Where zeros(device=...), tensor(..., device=...) and the like put what they make; on a pretended
        device `kwargs` are changed to make it here."""
        where = accelerator(kwargs["device"])
        if where is None:
            return None
        kwargs["device"] = CPU
        if name in ("tensor", "as_tensor"):
            self.wait("copy, blocking")
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"Expected a '{where.type}' device type for generator but found 'cpu'")
        return where

    def read_or_copied(self, func, name: str, args: tuple, kwargs: dict):
        """What x.device, x.is_cuda, x.to(...) and the like give; None for any other call."""
        prop = getattr(getattr(func, "__self__", None), "__name__", "")
        if name == "__get__" and prop == "device":
            return place(args[0]) or func(*args)
        if name == "__get__" and prop in ("is_cuda", "is_mps"):
            return place(args[0]) is not None and place(args[0]).type == prop[3:]
        if name in ("to", "cpu", "cuda") and args and isinstance(args[0], torch.Tensor):
            return self.move(func, args[0], args[1:], kwargs)
        return None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        known = self.read_or_copied(func, name, args, kwargs)
        if known is not None:
            return known
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        where = next((place(x) for x in tensors if place(x) is not None), None)
        if name == "numpy" and where:
            raise TypeError(f"can't convert {where} device type tensor to numpy. Use Tensor.cpu() to copy "
                            "the tensor to host memory first.")
        self.refuse_mixtures(name, tensors, args[0] if args else None)
        by_value = name == "__getitem__" and any(x.dtype == torch.bool for x in tensors[1:])
        if where and (name in WAITS or by_value):
            self.wait(name)
        if name == "copy_" and place(args[0]) != place(args[1]) and not kwargs.get("non_blocking"):
            self.wait("copy_, blocking")
        if kwargs.get("device") is not None:
            where = self.created(name, kwargs)
        out = func(*args, **kwargs)
        if name == "__set__":                                      # x.data = y
            if func.__self__.__name__ == "data":
                put(args[0], place(args[1]))
            return out
        put(out, where)
        if name in VIEWS and args[0].__dict__.get("pinned"):
            for x in tree_leaves(out):
                x.__dict__["pinned"] = True
        return out


class Autocast(torch.autocast):
    """torch.autocast, where the pretended device is the CPU."""

    def __init__(self, device: str, *args, **kwargs):
        super().__init__("cpu" if accelerator(device) else device, *args, **kwargs)


@contextlib.contextmanager
def pretend(kind: str = "cuda", free: int = 10**10, capability: tuple = (8, 0)):
    """torch answers what the project asks of this device, and tensors are tagged. free: bytes of its memory;
    capability: its compute capability."""
    patch, mode = pytest.MonkeyPatch(), Pretended()
    new, group = torch.nn.Parameter.__new__, torch._C._group_tensors_by_device_and_dtype
    right, rightly_checkpointed = devices.pick_device, model.checkpoint

    def parameter(cls, x=None, *args, **kwargs):
        return put(new(cls, x, *args, **kwargs), place(x))

    def grouped(lists, *args):
        """{(device, dtype): (lists, places in them)}, by the pretended device."""
        return {(place(value[0][0][0]) or key[0], key[1]): value
                for key, value in group(lists, *args).items()}

    def checkpointed(function, *args, **kwargs):
        """What is computed again in the backward pass, where the mode is off."""
        where = next((place(a) for a in args if place(a) is not None), None)

        def again(*inputs):
            if torch._C._len_torch_function_stack():
                return function(*inputs)
            return mode.over(function, put(inputs, where))
        return rightly_checkpointed(again, *args, **kwargs)

    def pick_device(name: str) -> str:
        if name == "auto":
            return kind
        return name if accelerator(name) else right(name)

    for module in [m for m in sys.modules.values() if getattr(m, "pick_device", None) is right]:
        patch.setattr(module, "pick_device", pick_device)
    patch.setattr(torch.nn.Parameter, "__new__", parameter)
    patch.setattr(torch.Tensor, "pin_memory", pin)
    patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", grouped)
    patch.setattr(torch, "autocast", Autocast)
    patch.setattr(torch, "compile", lambda function, **how: function)
    patch.setattr(torch.utils.checkpoint, "_infer_device_type", lambda *args: "cpu")
    patch.setattr(model, "checkpoint", checkpointed)
    patch.setattr(background, "can_spawn", lambda: False)       # at once: other processes know of no pretence
    answers = {"synchronize": None, "max_memory_allocated": 0, "memory_allocated": 0, "set_device": None,
               "reset_peak_memory_stats": None, "get_device_name": "a pretended GPU", "device_count": 1,
               "mem_get_info": (free, 2 * free), "get_device_capability": capability}
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    products, convolutions = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        with mode:
            yield mode
    finally:
        patch.undo()
        torch.backends.cuda.matmul.allow_tf32 = products
        torch.backends.cudnn.allow_tf32 = convolutions
