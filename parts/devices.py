"""The machine: device, precision, processes, time, memory.

torchrun starts a command once a device and numbers the processes by the environment variables RANK and
WORLD_SIZE; without it there is one process, number 0. Several processes share a batch: each takes its rows
(parts/batches.py, Prefetcher).

Public: RANK, WORLD, join_processes, leave_processes, broadcast_from_rank0, StopSignal, run_on_all,
pick_device, cpu, hardware, memory_mb, pick_precision, tf32, Timer, from_all, ignore.
"""
from __future__ import annotations

import datetime
import os
import platform
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from parts.cache import cores
from parts.errors import UserError, out_of_memory, run_cli

RANK = int(os.environ.get("RANK", "0"))         # this process
WORLD = int(os.environ.get("WORLD_SIZE", "1"))  # how many there are


def tf32(allowed: bool) -> None:
    """May a GPU round the factors of float32 products and convolutions to ten bits of mantissa? In training,
    for speed; where results are measured it must not: a table would depend on what ran before it."""
    # The switches that torch.compile reads: after newer ones were written it fails in some versions.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


# --- processes ----------------------------------------------------------------------------------------------

def join_processes(device: str) -> str:
    """Meet the other processes of a torchrun job -> the device of this one. Does nothing where there are
    none."""
    if WORLD == 1:
        return device
    on_gpu = device.startswith("cuda")
    if on_gpu:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # Patience: the others wait while process 0 prepares and evaluates.
        try:
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(hours=2))
        except ValueError as e:
            why = str(e).splitlines()[0][:120]
            raise UserError(f"WORLD_SIZE={WORLD}, but the processes can't meet ({why}); start them with "
                            "torchrun, or unset it") from None
    return device


def run_on_all(main) -> None:
    """Run `main()` as a command (errors.run_cli) in each process of a job: process 0 speaks for all, and the
    end of one is one line from the others."""
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")

    def one_of_several() -> None:
        try:
            main()
        except RuntimeError as e:
            if WORLD == 1 or out_of_memory(e):
                raise
            why = str(e).splitlines()[0][:120]
            raise UserError(f"process {RANK} lost the others ({why}); the last checkpoint of the run is "
                            "intact, go on with the same command and --resume RUN") from None
    run_cli(one_of_several)


def leave_processes() -> None:
    """End what join_processes began."""
    if WORLD > 1:
        dist.destroy_process_group()


def broadcast_from_rank0(x):
    """x of process 0, on all of them."""
    box = [x]
    if WORLD > 1:
        dist.broadcast_object_list(box)
    return box[0]


def from_all(x):
    """A tensor (n, ...) of each process -> all of them, in the order of the processes."""
    if WORLD == 1:
        return x
    found = [x] * WORLD
    torch.distributed.all_gather_object(found, x.cpu())
    return torch.cat(found)


class StopSignal:
    """Ctrl-C and SIGTERM end a loop between two steps instead of in the middle of one.

    `with StopSignal() as stop: while not stop.now: ...`. Several processes must leave at the same step: `now`
    changes there only in `agree()`, which all of them call at the same steps and which process 0 decides."""

    def __init__(self):
        self.now = self.asked = False
        self.previous = {}  # signal -> its handler before

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self.ask)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def ask(self, *of_signal) -> None:
        self.asked = True
        self.now = WORLD == 1

    def agree(self) -> None:
        if WORLD > 1:
            self.now = bool(broadcast_from_rank0(self.asked))


# --- device -------------------------------------------------------------------------------------------------

def pick_device(name: str) -> str:
    """`auto` -> cuda, mps or cpu; any other name is checked."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    here = [device for device in have if have[device]]
    if name == "auto":
        return here[0]
    if name.split(":")[0] not in here:
        available = [device for device in ("cpu", "cuda", "mps") if have[device]]
        raise UserError(f"--device {name}: not here; available: {', '.join(available)}")
    kind, colon, index = name.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if colon and index not in map(str, range(count)):
        raise UserError(f"--device {name}: no such device; there are {kind}:0 to {kind}:{count - 1}")
    return name


def cpu() -> tuple[str, list[str]]:
    """Name of the CPU and the instructions that it has (Linux; elsewhere the platform's word, and none)."""
    try:
        first_core = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        info = dict(line.split("\t", 1) for line in first_core.splitlines() if "\t" in line)
        return info["model name"].strip(": \t"), info["flags"].split()
    except (OSError, KeyError):
        return platform.processor() or platform.machine(), []


def hardware(device: str) -> str:
    """What a time was measured on: the GPU, or the CPU with its cores and its instructions for bfloat16
    products."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name, flags = cpu()
    words = [name, f"{cores()} cores"]
    if "avx512_bf16" in flags:
        words.append("AVX512-BF16")
    if "amx_bf16" in flags:
        words.append("AMX-BF16")
    return ", ".join(words)


def memory_mb(device: str) -> float | None:
    """Memory of this process in MB: on a GPU the peak that tensors took, otherwise what is resident now
    (where the system says it)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e6
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def pick_precision(device: str) -> str:
    """bf16 where the processor multiplies it by itself, else fp32. By rule, not by a trial: what a machine is
    doing besides must not decide how a run computes.

    (fp16 overflows where bf16 does not, so it is no candidate; emulated bf16 is slower than fp32.)"""
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    if device.startswith("cpu"):
        return "bf16" if {"avx512_bf16", "amx_bf16"} & set(cpu()[1]) else "fp32"
    return "fp32"  # mps: autocast to bf16 is partial there


# --- time ---------------------------------------------------------------------------------------------------

def ignore(*what) -> None:
    """A timer that measures nothing, a log that writes nothing."""


class Timer:
    """Where a loop's time goes: `start()`, then `timer("part")` after each part.

    A GPU works on after the call that gave it work has returned, so each part must wait for the device to be
    timed; only a profiled run (device given) does that."""

    def __init__(self, device: str = ""):
        self.device = device
        self.seconds = {}  # part -> seconds so far
        self.last = 0.0    # when the part under way began
        self.start()

    def start(self) -> None:
        self.last = time.perf_counter()

    def __call__(self, part: str) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now

    def total(self, without: str = "") -> float:
        """Seconds of all parts but one."""
        return sum(seconds for part, seconds in self.seconds.items() if part != without)

    def table(self) -> str:
        total = self.total()
        lines = [f"{'part':20s} seconds  share"]
        for part, seconds in sorted(self.seconds.items(), key=lambda row: -row[1]):
            lines.append(f"{part:20s} {seconds:7.1f}  {100 * seconds / total:4.1f} %")
        return "\n".join([*lines, f"{'all':20s} {total:7.1f}"])
