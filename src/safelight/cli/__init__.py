"""The command line. Data goes to stdout; errors go to stderr as one sentence.

Exit codes: 0 done; 1 `doctor` or `verify` found a fault, or `evaluate` too many errors; 2 a wrong call, or
something in the world that is not as it must be; 3 blocked, with --fail-on-block; 130 interrupted, 143 by
SIGTERM, which is an interrupt in all else. Every room is imported inside the command that needs it.
"""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from safelight import __version__
from safelight.cli.build import build
from safelight.cli.bundle import export, inspect, synth, verify
from safelight.cli.calibration import calibrate
from safelight.cli.data import data
from safelight.cli.defence import defend
from safelight.cli.distil import distill
from safelight.cli.evaluation import evaluate
from safelight.cli.generation import generate
from safelight.cli.kernels import kernels
from safelight.cli.measure import bench, doctor, tune
from safelight.cli.quantization import quantize
from safelight.cli.screening import screen
from safelight.errors import SafelightError

# module that is missing -> the extra that brings it
EXTRAS = {
    **dict.fromkeys(("torch", "diffusers", "transformers", "safetensors"), "torch"),
    **dict.fromkeys(("onnx", "onnxscript", "onnx_ir"), "export"),
    **dict.fromkeys(("tqdm", "accelerate", "peft"), "train"),
    **dict.fromkeys(("triton",), "kernels"),
    **dict.fromkeys(("matplotlib",), "plot"),
    **dict.fromkeys(("openvino",), "openvino"),
    **dict.fromkeys(("pyarrow",), "parquet"),
}
INTERRUPTED = 130
TERMINATED = 143


class OneSentence(click.Group):
    """A group whose errors are one line on stderr, and whose exit codes are those of the module's
    docstring.
    """

    def main(self, args: Sequence[str] | None = None, *other: Any, **named: Any) -> Any:
        """Run the command line and exit; parameters as for `click.Command.main`, but always on its own."""
        named["standalone_mode"] = False
        try:
            with warnings.catch_warnings(), _sigterm_interrupts() as terminated:
                warnings.showwarning = _warn(warnings.showwarning)
                code = super().main(args, *other, **named)
        except click.Abort as stop:
            if terminated():
                _fail(str(stop) or "terminated", TERMINATED)
            _fail(str(stop) or "interrupted", INTERRUPTED)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(2)
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else "safelight"
            _fail(f"{error.format_message().rstrip('.')}; see: {where} --help")
        except click.ClickException as error:
            _fail(error.format_message())
        except ModuleNotFoundError as error:
            extra_name = EXTRAS.get((error.name or "").partition(".")[0])
            if extra_name is None:
                raise
            remedy = f"pip install 'safelight[{extra_name}]'"
            _fail(f"this command needs {error.name}, which is not installed; do: {remedy}")
        except OSError as error:
            _fail(_sentence(error))
        except (SafelightError, ValueError) as error:
            _fail(str(error))
        sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def _sigterm_interrupts() -> Iterator[Callable[[], bool]]:
    """Within it SIGTERM does what Ctrl-C does, in the same handler; says whether it came."""
    came = False

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler):  # Ctrl-C is ignored, as in the background of a shell
            raise KeyboardInterrupt
        handler(signal.SIGINT, frame)

    main_thread = threading.current_thread() is threading.main_thread()  # no other may set a handler
    if not main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield lambda: came
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _sentence(error: OSError) -> str:
    """The files, where they are known, and what the system says of them."""
    if not error.strerror:
        return str(error)
    names = [name for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    said = error.strerror[:1].lower() + error.strerror[1:]
    return ": ".join([" -> ".join(map(os.fsdecode, names)), said] if names else [said])


def _warn(shown: Callable[..., None]) -> Callable[..., None]:
    """A runtime warning, of what went on all the same, as one line; any other is `shown` as it was."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, RuntimeWarning):
            click.echo(f"safelight: {' '.join(str(message).split())}", err=True)
        else:
            shown(message, category, *where, **more)

    return show


def _fail(message: str, code: int = 2) -> None:
    click.echo(f"safelight: {' '.join(message.split())}", err=True)
    sys.exit(code)


@click.group(
    "safelight",
    cls=OneSentence,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="safelight")
def main() -> None:
    """Screen prompts for a restricted concept by probing their neighbourhood, and generate what passes."""


for command in (
    screen,
    generate,
    export,
    verify,
    quantize,
    build,
    inspect,
    synth,
    calibrate,
    doctor,
    tune,
    bench,
    evaluate,
    data,
    defend,
    distill,
    kernels,
):
    main.add_command(command)
