"""What all commands share: flags, errors of one sentence and exit status 2."""

import argparse
import math
import os
import re
import signal
import sys
import time
from functools import partial

from safetensors import SafetensorError

from support.errors import InputError, cause_of


class Help(argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and behind a flag's help its default, unless the help names it."""

    def _get_help_string(self, action):
        has_none = action.default is False or action.default in (None, "", argparse.SUPPRESS)
        told = has_none or "default" in action.help
        return action.help if told else f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse with errors of one sentence, and no abbreviations."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=Help, **kwargs)

    def parse_args(self, args=None, namespace=None):
        given = sys.argv[1:] if args is None else args
        if "" in given or any(re.fullmatch("--[^=]*=", str(word)) for word in given):
            raise InputError("a flag's value is empty, as of a variable that is not set: leave the flag out")
        return super().parse_args(args, namespace)

    def error(self, message):
        raise InputError(f"{message} (see --help)")


def given_flags(parser: Parser, argv) -> dict:
    """The flags that were really given, without the defaults of the others."""
    unset = object()
    marked = argparse.Namespace(**{key: unset for key in vars(parser.parse_args([]))})
    return {key: value for key, value in vars(parser.parse_args(argv, marked)).items() if value is not unset}


def positive(kind, or_zero: bool = False):
    """An argparse type: a positive finite number, or 0 where that is allowed."""
    needed = "finite and not negative" if or_zero else "positive and finite"

    def parse(text):
        value = kind(text)
        if not math.isfinite(value) or value < 0 or (value == 0 and not or_zero):
            raise argparse.ArgumentTypeError(f"must be {needed}, got {text}")
        return value
    parse.__name__ = kind.__name__
    return parse


not_negative = partial(positive, or_zero=True)


def cores() -> int:
    """Of this machine, those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def number(value, digits: int = 4) -> str:
    """For tables: small numbers in powers of ten, None as a dash."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if value == 0 or abs(value) >= 0.001 else f"{value:.{digits}e}"


def markdown_table(head: list, rows) -> list[str]:
    """Its lines; none where there is no row."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in [head, *rows]]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]] if lines[1:] else []


def run_command(main, name: str):
    """Run `main`. What the user can mend ends in a sentence on stderr and exit status 2, Ctrl-C in 130."""
    try:
        result = main()
        sys.stdout.flush()
        return result
    except InputError as error:
        sentence, status = str(error), 2
    except BrokenPipeError:  # whoever reads, such as head, has seen enough
        os._exit(128 + signal.SIGPIPE)
    except (OSError, SafetensorError) as error:  # no room, no right to write; or a torn file
        sentence, status = (f"cannot write, or read what is torn ({cause_of(error)}); need a place with room "
                            "and the right to write, or the file again"), 2
    except RuntimeError as error:
        sentence, status = "stopped, because another process has ended; it says why", 1
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which this file does not import
            sentence, status = (f"the device's memory is full ({cause_of(error)}): take smaller batches or "
                                "another device; train_npo.py --dry-run says what fits"), 2
        elif "closed by peer" not in str(error) and "Connection reset" not in str(error):
            raise
    except KeyboardInterrupt:
        sentence, status = "interrupted", 130
    # Process 0 says it at once, another only where it hasn't been stopped with the rest some seconds later.
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(5)
    print(f"{name}: {sentence}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Wait for nobody: the others may be inside a collective operation that never ends; torchrun stops them.
    os._exit(status)
