"""The few things every file needs: one error for bad input, and writing that never leaves half a file."""
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path


class InputError(Exception):
    """Something the user gave is wrong; the message is one line that names it and says what to do."""


class NotFinite(InputError):
    """The network's numbers overflowed or are no numbers any more: nothing it says from here on is of use."""

    def __init__(self, what):
        super().__init__(f"{what} are not finite numbers; if --dtype is float16, it overflows: take float32, or "
                         "bfloat16 on a GPU that has it; if not, the weights or the LoRA are damaged, or --lr is "
                         "too large")


@contextmanager
def atomic(path):
    """Give a temporary path to write to; it replaces `path` when the block ends without an error."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    except OSError as error:
        raise InputError(f"{path}: cannot be written there ({error.strerror}); choose another place")
    os.close(handle)
    try:
        yield Path(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def first_line(error):
    """The first line of an exception's message, for a message of one line."""
    return (str(error).strip().splitlines() or ["no message"])[0]


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
    """Call a command's main(); an InputError becomes one line on stderr and exit status 2, Ctrl-C status 130."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print("error: out of memory; try a smaller --batch (train.py: also --batch auto, --checkpointing), "
              "or another --device or --dtype", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
