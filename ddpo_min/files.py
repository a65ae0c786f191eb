"""The few things every file needs: one error for bad input, and writing that never leaves half a file."""
import argparse
import errno
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY = ".ddpo_min-"        # how the names of files begin that are still being written
# Signals that ask to stop; Windows has no SIGHUP
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
OUT_OF_MEMORY = ("out of memory; try a smaller --batch (train.py: also --batch auto, --checkpointing), or another "
                 "--device")


class InputError(Exception):
    """Something the user gave is wrong; the message is one line that names it and says what to do."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C, or a signal that asks to stop; number: the signal's."""

    def __init__(self, number):
        super().__init__()
        self.number = number


class NotFinite(InputError):
    """The network's numbers overflowed or are no numbers any more: nothing it says from here on is of use."""

    def __init__(self, what):
        super().__init__(f"{what} are not finite numbers; if --dtype is float16, it overflows: take float32, or "
                         "bfloat16 on a GPU that has it; if not, the weights or the LoRA are damaged, or --lr is "
                         "too large")


@contextmanager
def atomic(path):
    """Give a temporary path to write to; it replaces `path` when the block ends without an error.

    Raises InputError if the disk or the folder, which must be there already, does not take it.
    """
    path, temporary = Path(path), None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY, suffix=path.suffix)
        os.close(handle)
        yield Path(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())     # else a power cut could leave the new name without its content
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except Exception as error:
        reason = disk_trouble(error)
        if not reason:
            raise
        with suppress(OSError):
            reason += f"; its disk has {shutil.disk_usage(path.parent).free / 1e6:,.0f} MB free"
        raise InputError(f"{path}: cannot be written ({reason}); it needs room, in a folder that can be written to")
    finally:
        if temporary:
            with suppress(OSError):
                os.unlink(temporary)


def disk_trouble(error):
    """What the system said where writing a file failed, in its words; "" if the error is of another kind.

    Libraries raise errors of their own: torch from the system's, safetensors with its number in the text.
    """
    while error and not isinstance(error, InputError):
        number = re.search(r"os error (\d+)", str(error))
        if isinstance(error, OSError) and error.errno or number:
            return os.strerror(int(number[1]) if number else error.errno)
        error = error.__context__
    return ""


class Lock:
    """A file that this process holds until it ends, however it ends; another process is told that it is held."""

    def __init__(self, path):
        """Raises InputError if another process holds it. Where the system knows no such locks, nothing is held."""
        self.path, self.file = Path(path), None
        try:
            import fcntl
        except ImportError:     # Windows
            return
        while self.file is None:
            file = open(self.path, "w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.stat(self.path).st_ino == os.fstat(file.fileno()).st_ino:
                    self.file = file
            except BlockingIOError:
                raise InputError(f"{self.path.parent}: another run is writing to it; wait for its end, stop it, or "
                                 "choose another folder with --out")
            except FileNotFoundError:       # released in between, as where the numbers differ: try again
                pass
            except OSError:         # a file system without locks
                return

    def release(self):
        """Let go of it, and take it away."""
        if self.file:
            with suppress(OSError):
                self.path.unlink()
            self.file.close()
            self.file = None


def make_folder(path):
    """Make a folder, and those above it, unless it is there. Raises InputError."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made a folder ({error.strerror}); choose another place")


def stop(number, frame):
    """The handler of signals that ask to stop."""
    raise Stopped(number)


def ask_again(unraisable, otherwise=sys.unraisablehook):
    """What sys.unraisablehook is set to: a stop that was heard in a __del__, where it cannot be raised, comes again."""
    if isinstance(unraisable.exc_value, Stopped):
        timer = threading.Timer(0.05, os.kill, [os.getpid(), unraisable.exc_value.number])
        timer.daemon = True
        timer.start()
    else:
        otherwise(unraisable)


@contextmanager
def uninterrupted():
    """Ctrl-C, or another signal that would stop a command of run_main(), takes effect only when the block is over."""
    main = threading.current_thread() is threading.main_thread()        # no other thread hears signals
    usual = {number: signal.getsignal(number) for number in STOPS if main}
    usual = {number: handler for number, handler in usual.items() if handler in (stop, signal.default_int_handler)}
    heard = []
    for number in usual:
        signal.signal(number, lambda *given: heard.append(given))
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
    if heard:
        usual[heard[0][0]](*heard[0])


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def first_line(error):
    """The first line of an exception's message, for a message of one line: what of it can be printed."""
    line = (str(error).strip().splitlines() or [""])[0]
    return "".join(c for c in line if c.isprintable()) or "no message"


def shown(value, length=80):
    """A value from a file, for a message of one line: without unprintable characters, cut to `length`."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value)[:length + 1])
    return text if len(text) <= length else text[:length - 3] + "..."


def is_out_of_memory(error):
    """Whether an error of torch's says that memory ran out: the GPU's, or the computer's."""
    texts = ("out of memory", "can't allocate memory", "alloc_failed", "invalid buffer size",    # the last: on mps
             "unable to find an engine")                                                       # cuDNN without room
    return any(text in str(error).lower() for text in texts)


def run_main(main):
    """Call a command's main() and leave with its exit status, without a traceback for what is no mistake of the code.

    2, with one line on stderr: bad input, no memory, a disk that refuses; 128 and the signal's number after one that
    asks to stop: 130 after Ctrl-C; 141: nobody reads what is printed any more.
    """
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:       # as nohup has it for SIGHUP
            signal.signal(number, stop)
    sys.unraisablehook = ask_again
    if hasattr(sys.stdout, "reconfigure"):      # neither a closed one nor a notebook's
        sys.stdout.reconfigure(errors="backslashreplace")       # names that the terminal cannot show
    try:
        status = _status(main)
        print(end="", flush=True)
    except OSError as error:        # from printing, or one that names no file
        if not error.errno:
            raise
        status = 141 if error.errno == errno.EPIPE else 2
        with suppress(OSError):
            if status == 2:
                print(f"error: {error.strerror}: something could not be written or read that has no name; look at the "
                      "room on the disk, at the connection, and at where the output goes", file=sys.stderr)
        for stream in filter(None, (sys.stdout, sys.stderr)):       # so that what they still hold is dropped in silence
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    stopped, in_a_shell = status in range(129, 160), hasattr(sys, "ps1")
    if stopped and threading.active_count() > 1 and not in_a_shell:
        os._exit(status)        # sys.exit would wait for the threads: for ever, if a reward hangs in one
    sys.exit(status)


def run_script(main, doc):
    """run_main() for a script without flags: --help prints its docstring, anything else is refused."""
    argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    run_main(main)


def _status(main):
    """Call main(); returns its exit status, the message printed. Raises OSError where printing fails."""
    try:
        main()
        return 0
    except SystemExit as stop:
        return stop.code
    except InputError as error:
        message = str(error)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        message = f"{OUT_OF_MEMORY} or --dtype"
    except OSError as error:
        if error.filename is None:
            raise
        message = f"{error.filename}: {error.strerror}; expected a file or folder that can be used"
    except KeyboardInterrupt as stopped:
        print(str(stopped) or "stopped", file=sys.stderr, flush=True)
        return 128 + getattr(stopped, "number", signal.SIGINT)
    print(f"error: {message}", file=sys.stderr)
    return 2
