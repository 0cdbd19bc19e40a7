"""The `endor` command: parse, call the library, print."""

import os
import signal
import sys
from importlib import import_module
from typing import Any

import click

from endor import __version__
from endor.cli.terminal import (
    Interrupted,
    ReaderGone,
    finish,
    mute,
    prepare,
    say,
    show,
    tell_more_or_less,
)
from endor.errors import EndorError

COMMANDS = {
    "pack": "Pack a Hugging Face checkpoint, pruning it first if asked.",
    "prune": "Prune a checkpoint; write an ordinary dense one.",
    "quantize": "Quantise a checkpoint; write an ordinary dense one.",
    "unpack": "Turn a packed checkpoint back into an ordinary one, bit for bit.",
    "inspect": "Show what a packed checkpoint holds, tensor by tensor.",
    "verify": "Check checksums, structure and, if given, equality with a model.",
    "card": "Print the model card of a packed checkpoint.",
    "push": "Upload a packed checkpoint to the Hub, with a model card.",
    "generate": "Generate text from a packed checkpoint.",
    "serve": "Serve a packed checkpoint to OpenAI's clients over HTTP.",
    "eval": "Measure perplexity, and agreement with a dense model.",
    "plan": "Place a packed checkpoint in VRAM, RAM and on disk; predict its speed.",
    "bench": "Measure decoding, packing, products, reading and generation.",
    "info": "Show versions, devices, and which kernels and readers will run.",
}
"""Command name to its one-line help; `cli/<name>.py` holds the command, loaded when used."""


class LazyGroup(click.Group):
    """A group whose commands are imported only when one of them runs or shows its help."""

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        # click would end the process with 1 when the reader of a help text goes away
        try:
            return super().make_context(*arguments, **options)
        except BrokenPipeError:
            mute(sys.stdout)
            raise ReaderGone from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            mute(sys.stdout)
            raise ReaderGone from None

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(import_module(f"endor.cli.{cmd_name}"), f"{cmd_name}_command")
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="endor")
@click.option(
    "-v",
    "--verbose",
    count=True,
    help="Say what is decided on standard error; -vv says details.",
)
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@click.option("--debug", is_flag=True, help="Show the Python trace of an error.")
def cli(debug: bool, verbose: int, quiet: bool) -> None:
    """Pack, verify, stream and run language models that do not fit in your GPU.

    Typical use: `endor pack MODEL OUT`, `endor verify OUT`, `endor generate OUT --prompt "..."`.
    """
    if verbose and quiet:
        raise click.UsageError("--verbose and --quiet contradict each other")
    tell_more_or_less(verbose=verbose, quiet=quiet)


def main() -> None:
    """Run the command line; exit 0 on success, 1 on bad data, 2 on wrong usage, 130 on Ctrl-C."""
    prepare()
    debug = "--debug" in sys.argv[1:]
    # Torch's idle threads spin by default and take the cores from the packed kernels' own threads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code: object = 1
    try:
        code = cli.main(prog_name="endor", standalone_mode=False)
        finish()
    except click.exceptions.Exit as exit_:
        code = exit_.exit_code
    except Interrupted as error:
        say(error.message)
        code = error.exit_code
    except click.ClickException as error:
        show("\n".join(_usage(error)), err=True)
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        say("interrupted")
        code = 128 + signal.SIGINT
    except (ReaderGone, BrokenPipeError):
        code = 0  # of our output went away (`endor generate ... | head`): not an error of ours
    except Exception as error:
        message = _one_line(error)
        if debug or message is None:
            raise
        say(message)
    try:
        finish()
    except OSError as error:
        say(f"the output cannot be written: {error.strerror}")
        mute(sys.stdout)
        code = code or 1
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: click.ClickException) -> list[str]:
    """Return the lines of a usage error, as click would print them."""
    lines = []
    context = getattr(error, "ctx", None)
    if context is not None:
        lines = [context.get_usage(), f"Try '{context.command_path} --help' for help.", ""]
    return [*lines, f"Error: {error.format_message()}"]


def _one_line(error: Exception) -> str | None:
    """Return what to say about an error, or None for one that nobody foresaw: a bug of ours."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    if isinstance(error, (EndorError, OSError)):
        return str(error) or type(error).__name__
    text = " ".join(str(error).split())[:200]
    if isinstance(error, MemoryError):
        return f"not enough memory{f': {text}' if text else ''}; close something, or give --ram"
    if isinstance(error, ImportError) and ("map segment" in text or "allocate memory" in text):
        return f"not enough memory to load a library: {text}"
    if isinstance(error, RuntimeError):
        if "can't start new thread" in text:
            return "the system allows no more threads; give --threads 1, or raise ulimit -u"
        if "allocate memory" in text or "out of memory" in text:
            return f"not enough memory: {text}"
    if isinstance(error, RecursionError):
        return "the input is nested too deeply; is it damaged?"
    if isinstance(error, UnicodeError):
        return f"text that is not UTF-8, or half of a surrogate pair: {text}"
    return None


if __name__ == "__main__":
    main()
