"""Claims about how a command ends."""
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from parts.errors import Stopped, UserError, run_cli

OOM = ("error: out of memory; use fewer clips a step (--batch), cut each batch (--accumulate 4), "
       "--checkpointing, or a smaller --width and --depth\n")


@pytest.mark.parametrize("error, status, line", [
    (UserError("no\nsuch"), 2, "error: no such\n"),
    (Stopped("stopped at step 3"), 130, "stopped at step 3\n"),
    (OSError("disk full"), 2, "error: disk full\n"),
    (OSError(30, "Read-only file system", "/x/y"), 2, "error: /x/y: Read-only file system\n"),
    (MemoryError(), 2, OOM),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."), 2, OOM),
    (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to ..."), 2, OOM),
    (KeyboardInterrupt(), 130, "\ninterrupted\n"),
])
def test_a_command_ends_in_one_line_and_its_status(error, status, line, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as stop:
        run_cli(main)
    assert stop.value.code == status and capsys.readouterr().err == line


def test_a_command_that_its_machine_ends_says_so():
    code = ("import os, signal, time\nfrom parts.errors import run_cli\n"
            "run_cli(lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "\ninterrupted\n")


def test_negative_control_another_error_keeps_its_traceback():
    def main():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError):
        run_cli(main)


def test_a_terminal_without_the_letters_of_a_name_gets_escapes():
    code = "from parts.errors import run_cli; run_cli(lambda: print('\\u6771\\u4eac.wav'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and done.stdout.strip() == rb"\u6771\u4eac.wav"
