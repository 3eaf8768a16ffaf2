"""Errors that a user can mend, and how a command ends.

A command raises UserError where something outside the program is wrong: a flag, a file, a row. `run_cli`
turns it into one line on stderr and exit status 2, so nobody has to read a traceback to learn that a file
name was misspelt. A command that was asked to stop, and did, is no error: status 130.

Public: UserError, Stopped, run_cli, out_of_memory, printable, quoted.
"""
import shlex
import signal
import sys
import threading


class UserError(Exception):
    """Something the user can fix. Entry points print it as one line and exit with status 2."""


class Stopped(UserError):
    """Ctrl-C or SIGTERM: the step was finished, all is saved, the run can be continued."""


def run_cli(main) -> None:
    """Run `main()` as a command: a UserError becomes one clear line on stderr and exit status 2, Ctrl-C and
    SIGTERM status 130."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a letter of a file name shows an escape instead of ending the command.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    # A job that is ended by its machine says so, and tidies up, like one that is stopped by Ctrl-C.
    if threading.current_thread() is threading.main_thread():      # others may not ask for signals
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except Stopped as e:
        print(printable(str(e)), file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError) as e:
        # OSError: a full disk, a folder where a file should be.
        of_file = isinstance(e, OSError) and e.filename is not None
        said = f"{e.filename}: {e.strerror}" if of_file else str(e)
        print(f"error: {printable(said)}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        print("error: out of memory; use fewer clips a step (--batch), cut each batch (--accumulate 4), "
              "--checkpointing, or a smaller --width and --depth", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def out_of_memory(e: Exception) -> bool:
    """Of the device (torch.OutOfMemoryError) or of the machine. (No torch here: workers import this.)"""
    return isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError" or "can't allocate" in str(e)


def quoted(path) -> str:
    """A path as it can be pasted into a command."""
    return shlex.quote(str(path))


def printable(text: str) -> str:
    """For the terminal: control characters become spaces. A caption or a file name from elsewhere could
    otherwise move the cursor or retitle the window. Joiners stay: in Hindi or Persian they stand inside
    words."""
    return "".join(c if c.isprintable() or c in "\u200c\u200d" else " " for c in text)
