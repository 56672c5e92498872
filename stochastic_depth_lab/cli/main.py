"""The command line: finds the command, and turns errors into one line and an exit code.

PyTorch takes seconds to import. Modules that need it are imported where they are used, so help and error messages are
instant.
"""

import errno
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence

from stochastic_depth_lab.cli import model_commands, run_commands, training_commands
from stochastic_depth_lab.cli.arguments import did_you_mean, options_of, summary
from stochastic_depth_lab.cli.completion import completion
from stochastic_depth_lab.cli.options import (
    PROGRAM,
    Bench,
    Completion,
    Evaluate,
    Export,
    Inspect,
    Report,
    Reproduce,
    Schedule,
    Sweep,
    Train,
    parse,
)
from stochastic_depth_lab.cli.output import fail, show, warnings_in_one_line
from stochastic_depth_lab.experiments import EXPERIMENTS, PAIRS, STUDIES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: None: those of the command line.

    Returns:
        The exit code: 0; 1 if some of many runs failed or a package is missing; 2 for wrong input; 130 and 143 after an
        interruption.
    """
    command, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    try:
        if command in ("-h", "--help"):
            show(_overview())
            return 0
        if command == "--version":
            from importlib.metadata import version

            show(version("stochastic-depth"))
            return 0
        if command not in COMMANDS:
            kind = "option" if command.startswith("-") else "command"
            hint = did_you_mean(command, [*COMMANDS, "--help", "--version"])
            return fail(f"Unknown {kind} {command!r}.{hint} See {PROGRAM} --help.")
        with warnings_in_one_line():
            return COMMANDS[command][1](rest)
    except KeyboardInterrupt:
        return fail("Interrupted.", code=128 + signal.SIGINT)
    except BrokenPipeError:  # the reader closed our output; Python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:  # a full disk, a folder without write permission
        reason = ": ".join(str(part) for part in (error.strerror or error, error.filename) if part)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return fail(f"{reason}. Make room, then resume the run with --resume." if full else f"{reason}.")
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] in ("stochastic_depth", "stochastic_depth_lab"):
            raise
        return fail(
            f"{PROGRAM} {command} needs the package {error.name}: run pip install '.[lab]' in a clone of the project.",
            code=1,
        )
    except ImportError as error:
        if error.name != "stochastic_depth":  # the library says which PyTorch it needs
            raise
        return fail(str(error), code=1)
    except (ValueError, ArithmeticError) as error:
        return fail(str(error))


def _complete(arguments: Sequence[str]) -> int:
    options = parse(Completion, "completion", arguments)
    names = {
        "train": [*EXPERIMENTS],
        "reproduce": [*STUDIES, *(name for name in PAIRS if name not in STUDIES)],
        "sweep": [*EXPERIMENTS, *STUDIES],
    }
    words = {
        command: [*names.get(command, ()), *(each.flag for each in options_of(kind) if not each.positional), "--help"]
        for command, (kind, _) in COMMANDS.items()
    }
    show(completion(options.shell, PROGRAM, words))
    return 0


COMMANDS: dict[str, tuple[type, Callable[[Sequence[str]], int]]] = {
    "train": (Train, training_commands.train),
    "reproduce": (Reproduce, training_commands.reproduce),
    "sweep": (Sweep, training_commands.sweep),
    "evaluate": (Evaluate, run_commands.evaluate),
    "export": (Export, run_commands.export),
    "report": (Report, run_commands.report),
    "schedule": (Schedule, model_commands.schedule),
    "inspect": (Inspect, model_commands.inspect),
    "bench": (Bench, model_commands.bench),
    "completion": (Completion, _complete),
}


def _overview() -> str:
    width = min(shutil.get_terminal_size().columns, 100) - 1
    lines = [
        textwrap.fill(f"  {name:<12}{summary(kind)}", width, subsequent_indent=" " * 14)
        for name, (kind, _) in COMMANDS.items()
    ]
    return "\n".join(
        [
            f"Usage: {PROGRAM} COMMAND ...",
            "",
            "Train networks with stochastic depth, and compare them with constant depth.",
            "",
            "Commands:",
            *lines,
            "",
            "Options:",
            "  -h, --help  Show this help; COMMAND --help explains a command.",
            "  --version   Show the version.",
            "",
            "Examples:",
            f"  {PROGRAM} reproduce digits --out runs/digits",
            f"  {PROGRAM} train digits-stochastic --out runs/one",
            f"  {PROGRAM} report runs/one",
        ]
    )
