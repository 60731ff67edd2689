"""What all commands share: flags, errors of one sentence and exit status 2."""

import argparse
import math
import os
import sys
import time

from safetensors import SafetensorError

from support.errors import InputError


class Parser(argparse.ArgumentParser):
    """argparse with errors of one sentence, and no abbreviations."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message):
        raise InputError(f"{message} (see --help)")


def given_flags(parser: Parser, argv) -> dict:
    """The flags that were really given, without the defaults of the others."""
    unset = object()
    marked = argparse.Namespace(**{key: unset for key in vars(parser.parse_args([]))})
    return {key: value for key, value in vars(parser.parse_args(argv, marked)).items() if value is not unset}


def positive(kind):
    """An argparse type: a positive finite number."""
    def parse(text):
        value = kind(text)
        if not (math.isfinite(value) and value > 0):
            raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
        return value
    parse.__name__ = kind.__name__
    return parse


def not_negative(kind):
    """An argparse type: a finite number of at least 0."""
    def parse(text):
        value = kind(text)
        if not (math.isfinite(value) and value >= 0):
            raise argparse.ArgumentTypeError(f"must be finite and not negative, got {text}")
        return value
    parse.__name__ = kind.__name__
    return parse


def number(value, digits: int = 4) -> str:
    """For tables: small numbers in powers of ten, None as a dash."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if value == 0 or abs(value) >= 0.001 else f"{value:.{digits}e}"


def run_command(main, name: str):
    """Run a command's `main`. What the user can mend ends in one sentence on stderr and exit status 2, Ctrl-C
    in status 130."""
    try:
        main()
    except InputError as error:
        _end(f"{name}: {error}", 2)
    except (OSError, SafetensorError) as error:  # no room, no right to write
        where = " ".join(str(error).split())
        if getattr(error, "filename", None):
            where = f"{error.filename}: {error.strerror}"
        _end(f"{name}: {where}; need a place with room and the right to write", 2)
    except RuntimeError as error:
        if "closed by peer" not in str(error) and "Connection reset" not in str(error):
            raise
        _end(f"{name}: stopped, because another process has ended; it says why", 1)
    except KeyboardInterrupt:
        _end(f"{name}: interrupted", 130)


def _end(sentence: str, status: int):
    """Say it once: process 0 at once, another only where it hasn't been stopped with the rest some seconds
    later. Then leave without waiting for anyone: the others may be inside a collective operation that will
    never end, and torchrun stops them."""
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(5)
    print(sentence, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)
