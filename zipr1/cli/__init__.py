"""The command line: `zipr1 COMMAND`. One thin file per command; torch is imported when a command runs.

Exit codes: 0, 1 for a failure, 2 for wrong input, 130 after Ctrl-C, 143 after SIGTERM. What goes wrong is told in
one line on stderr; a traceback means a bug.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from functools import partial
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

import zipr1
from zipr1.cli.compare import compare
from zipr1.cli.env import env
from zipr1.cli.eval import evaluate
from zipr1.cli.export import export
from zipr1.cli.profile import profile
from zipr1.cli.train import train
from zipr1.core import signals, terminal, watch
from zipr1.core.errors import InputError, ZipError, out_of_memory
from zipr1.core.text import one_line


def _without_types(params: list[Any]) -> list[Any]:
    """What `--help` lists, without Python's types: a flag takes no value, and an argument's name says what it is."""
    for param in params:
        if param.param_type_name == "argument":
            param.display_type_rich = lambda ctx: ""
        elif param.is_flag:
            param.metavar = ""
    return params


class _Command(TyperCommand):
    """In the line of its usage a word that must be given stands as it is; typer puts braces around it."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types(super().get_params(ctx))


class _Group(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types(super().get_params(ctx))


app = typer.Typer(
    name="zipr1",
    cls=_Group,
    help="Reinforcement learning that teaches a vision-language model to look at fewer tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


app.command("train", cls=_Command)(train)
app.command("eval", cls=_Command)(evaluate)
app.command("profile", cls=_Command)(profile)
app.command("export", cls=_Command)(export)
app.command("compare", cls=_Command)(compare)
app.command("env", cls=_Command)(env)

# What a stopped command leaves behind.
LEFT = {
    "train": "saved checkpoints are complete: go on with --resume DIR",
    "eval": "finished benchmarks are kept: the same command goes on",
    "profile": "nothing was written",
    "export": "nothing was written: the folder is made whole or not at all",
    "compare": "nothing was written",
}

# What a disk or a file's owner can refuse; any other OSError is ours to explain, with a traceback.
REFUSED = {
    errno.ENOSPC: "free some space, then resume",
    errno.EDQUOT: "free some of your quota, then resume",
    errno.EROFS: "give a folder that can be written",
    errno.EACCES: "give a path that you may use",
    errno.EPERM: "give a path that you may use",
    errno.EIO: "check the disk",
    errno.ENAMETOOLONG: "give a shorter path",
}
WRONG = {errno.ENAMETOOLONG}  # input, of these


def _version(asked: bool) -> None:
    if asked:
        print(f"zipr1 {zipr1.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            "-V",
            callback=_version,
            is_eager=True,
            help="Print the version; zipr1 env tells more.",
        ),
    ] = False,
) -> None:
    pass


def program() -> None:
    """What the command `zipr1` runs: `main`, and then the process ends, which no signal disturbs."""
    main(last=True)


def main(last: bool = False) -> None:
    """One command. Always leaves by SystemExit; the handlers of signals are then those of before, unless the process
    ends now (`last`)."""
    # As it is known now: a benchmark hides what the launcher says.
    watch.say = partial(_say, who=_who())
    with signals.handled(last):
        _run()


def _run() -> None:
    try:
        sys.exit(app(standalone_mode=False))
    except TyperException as error:
        if len(sys.argv) == 1:  # its message is the help
            print(error.format_message())
            sys.exit(error.exit_code)
        _leave(_usage(error), error.exit_code)
    except ZipError as error:
        signals.hold()  # another signal, such as a launcher's, is not the reason
        _leave(str(error), error.exit_code)
    except signals.Stopped as stop:
        signals.hold()  # a second one while leaving changes nothing
        name = "stopped by SIGTERM" if stop.number == signal.SIGTERM else "interrupted"
        left = stop.note or LEFT.get(sys.argv[1] if len(sys.argv) > 1 else "", LEFT["train"])
        if "--dry-run" in sys.argv:
            left = "nothing was written"
        _leave(f"{name}; {left}", 128 + stop.number)
    except BrokenPipeError:
        sys.stderr.close()  # the reader left: nobody to tell
        sys.exit(1)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        path = f"{one_line(error.filename, 400)}: " if error.filename else ""
        code = InputError.exit_code if error.errno in WRONG else 1
        _leave(f"{path}{error.strerror}; {REFUSED[error.errno]}", code)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        _leave("out of memory; use a smaller train.micro_batch, evaluation.batch or model.lora", 1)


def _usage(error: TyperException) -> str:
    """What is wrong with the command line, and which command tells more."""
    command = " ".join(word for word in sys.argv[1:2] if word in LEFT)
    said = error.format_message().rstrip(".")
    return f"{said}; {' '.join(f'zipr1 {command}'.split())} --help lists all"


def _leave(message: str, code: int) -> None:
    _say(message, code, _who())
    sys.exit(code)


def _who() -> str:
    """This process among several, as a launcher starts them."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return f"rank {os.environ.get('RANK')}: " if several else ""


def _say(message: str, code: int, who: str) -> None:
    """One line on stderr, and with --json one on stdout: `{"error": ..., "exit_code": ...}`. Of several processes the
    first alone prints the latter; if it is the one that died, there is none."""
    if "--json" in sys.argv and who in ("", "rank 0: "):
        print(json.dumps({"error": one_line(message), "exit_code": code}), flush=True)
    line = Text.assemble(("error:", "bold red"), f" {who}{one_line(message)}")
    terminal.console(stderr=True).print(line, soft_wrap=True)
