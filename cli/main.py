"""The `endor` command: parse, call the library, print."""

import os
import signal
import sys
from importlib import import_module

import click

from endor import __version__
from endor.errors import EndorError

COMMANDS = {
    "pack": "Pack a Hugging Face checkpoint, pruning it first if asked.",
    "prune": "Prune a checkpoint; write an ordinary dense one.",
    "quantize": "Quantise a checkpoint; write an ordinary dense one.",
    "unpack": "Turn a packed checkpoint back into an ordinary one, bit for bit.",
    "inspect": "Show what a packed checkpoint holds, tensor by tensor.",
    "verify": "Check checksums, structure and, if given, equality with a model.",
    "generate": "Generate text from a packed checkpoint.",
    "eval": "Measure perplexity, and agreement with a dense model.",
    "plan": "Place a packed checkpoint in VRAM, RAM and on disk; predict its speed.",
    "bench": "Measure decoding, packing, products, reading and generation.",
    "info": "Show versions, devices, and which kernels and readers will run.",
}
"""Command name to its one-line help; `cli/<name>.py` holds the command, loaded when used."""


class LazyGroup(click.Group):
    """A group whose commands are imported only when one of them runs or shows its help."""

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
@click.option("--debug", is_flag=True, help="Show the Python trace of an error.")
def cli(debug: bool) -> None:
    """Pack, verify, stream and run language models that do not fit in your GPU.

    Typical use: `endor pack MODEL OUT`, `endor verify OUT`, `endor generate OUT --prompt "..."`.
    """


def main() -> None:
    """Run the command line; exit 0 on success, 1 on bad data, 2 on wrong usage, 130 on Ctrl-C."""
    debug = "--debug" in sys.argv[1:]
    # Torch's idle threads spin by default and take the cores from the packed kernels' own threads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = cli.main(prog_name="endor", standalone_mode=False)
    except click.exceptions.Exit as exit_:
        code = exit_.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted; a conversion goes on with --resume")
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output went away (`endor inspect ... | head`): not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (EndorError, OSError) as error:
        if debug:
            raise
        _say(_one_line(error))
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return str(error) or type(error).__name__


def _say(message: str) -> None:
    click.echo(f"endor: {message}", err=True)


if __name__ == "__main__":
    main()
