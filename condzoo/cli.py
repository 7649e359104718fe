"""The `condzoo` command: parses, calls, prints. What it calls is the public API; each command imports only
what it needs, so that `condzoo --help` answers at once."""

import atexit
import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from condzoo import __version__, exit_codes
from condzoo.commands import checkpoints, plotting, reproduce, sweep, training
from condzoo.commands.error_texts import lack_of_memory, not_compiled, one_line
from condzoo.commands.training import AsJson, DataRoot, Device

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # a paragraph of help is one, however its source is broken into lines
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Why does this network train badly, and which layer is it?\n\n"
    "A zoo of networks in timm's registry, a probe of each layer's conditioning, training recipes, checkpoints.\n\n"
    "Exit codes: 0 done, 1 a check did not hold, 2 bad input, 3 the training diverged, "
    "75 stopped on a signal with everything saved (run the same command again to go on).",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"condzoo {__version__}")
        raise typer.Exit


@app.callback()
def condzoo(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that stand before a command."""


MOST = 10**9  # beyond any use: the product of two still is a number of torch's
SEEDS: Any = dict(min=-(2**63), max=2**63 - 1)  # torch's

Name = Annotated[str, typer.Argument(help="A model's name, e.g. cifar_resnet20_lastbn; `condzoo list` shows them.")]


@app.command("list")
def list_command(
    pattern: Annotated[
        str, typer.Argument(metavar="[PATTERN]", help="Wildcards, e.g. `'*resnet20*'`; default: all.")
    ] = "",
    family: Annotated[
        str | None,
        typer.Option(
            help="One family only: cifar_resnet, cifar_preresnet, cifar_vgg, cifar_vgg16, imagenet_resnet, "
            "imagenet_preresnet or mlp."
        ),
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Only models with released weights.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the models of the zoo with their sizes."""
    from condzoo.catalog import list_models, look_up
    from condzoo.commands import display

    infos = [(name, look_up(name)) for name in list_models(pattern, family=family, pretrained=pretrained)]
    if not infos:
        around = f"*{pattern.strip('*')}*"
        hint = f"; {around!r} does" if pattern and list_models(around, family=family, pretrained=pretrained) else ""
        raise ValueError(f"no model matches {pattern!r}{hint}" if pattern else "no model matches")
    display.print_models(infos, as_json)


@app.command()
def info(name: Name, as_json: AsJson = False) -> None:
    """Show what a model is: family, depth, input, parameters, multiply-adds, source, released weights."""
    from condzoo.catalog import look_up, released_names
    from condzoo.commands import display

    display.print_info(look_up(name), released_names(name), as_json)


for command in (training.recipes, training.train, sweep.sweep):
    app.command()(command)
app.command("eval")(training.eval_command)


@app.command()
def probe(
    target: Annotated[
        str,
        typer.Argument(
            metavar="NAME_OR_RUN",
            help="A model's name: measured at its initialization; a released MODEL.TAG, a checkpoint's folder or a run "
            "directory: as trained.",
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Data set: digits, mnist, fashion_mnist, cifar10, cifar100 or imagefolder. Default: the model's; "
            "a run knows its own."
        ),
    ] = None,
    data_root: DataRoot = None,
    batches: Annotated[int, typer.Option(min=1, max=MOST, help="Training batches to measure.")] = 4,
    batch_size: Annotated[int, typer.Option(min=2, max=MOST, help="Examples in a batch.")] = 128,
    labels: Annotated[
        str,
        typer.Option(
            help="Labels of the gradients: data: the true ones; model: expected over the model's softmax; "
            "sample: drawn of it."
        ),
    ] = "data",
    conv: Annotated[
        str,
        typer.Option(help="A row of a convolution's input: channels (a pixel's), or patches (all that a kernel sees)."),
    ] = "channels",
    precision: Annotated[
        str,
        typer.Option(
            help="float64: of all products; fast: float32 products, float64 sums; auto: fast where that suffices."
        ),
    ] = "auto",
    init: Annotated[
        str | None,
        typer.Option(
            help="Initializer, for a model by name: random, lecun_normal, xavier, he, orthogonal or scaled:FACTOR."
        ),
    ] = None,
    eval_mode: Annotated[bool, typer.Option("--eval-mode", help="Measure in eval mode, not train mode.")] = False,
    seed: Annotated[int, typer.Option(**SEEDS, help="Of the initialization and the measurement.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the measurement here, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the measurement here, as PNG.")] = None,
    device: Device = None,
) -> None:
    """Measure each layer's conditioning: second moments, lambda_max, kappa, dying and full neurons."""
    from condzoo.probing import Question, answer

    conditioning = answer(
        Question(target, data, data_root, batches, batch_size, labels, conv, precision, init, eval_mode, seed, device)
    )
    typer.echo(conditioning.table())
    if out is not None:
        conditioning.to_json(out)
        typer.echo(f"wrote {out}")
    if plot is not None:
        conditioning.plot(plot)
        typer.echo(f"wrote {plot}")


@app.command()
def validate(
    name: Annotated[
        str | None, typer.Argument(help="A model's name, a released MODEL.TAG, or a checkpoint's folder; or --all.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every model of the zoo, and every released checkpoint (minutes).")
    ] = False,
    seed: Annotated[int, typer.Option(**SEEDS, help="Of the initialization and the images.")] = 0,
) -> None:
    """Hold a model against what its family promises.

    Size, cost and function as recorded, initial weights, signals over depth, finite gradients, eval mode, scale
    invariance (or Theorem 1), the last BN's bound, and conditioning at initialization against the record shipped for
    the model; of trained weights those that training does not end. One line a check: ok, FAIL, or skip with the
    reason why it does not apply; exit 1 where one does not hold.
    """
    from condzoo.catalog import list_models
    from condzoo.checkpoints import list_checkpoints
    from condzoo.validation import validate as validate_model

    if every == (name is not None):
        raise ValueError("validate takes a model's name, or --all")
    failed = False
    for each in [*list_models(), *list_checkpoints()] if name is None else [name]:
        try:
            validation = validate_model(each, seed=seed)
        except (OSError, ValueError) as error:  # a checkpoint that is not here; the others are none the worse
            if name is not None:
                raise
            typer.echo(f"{each:32} FAIL  {'loading':12} {error}")
            failed = True
            continue
        typer.echo(validation.table())
        failed |= not validation.ok
    if failed:
        raise typer.Exit(exit_codes.CHECK_FAILED)


for other in (
    plotting.plot,
    checkpoints.release,
    checkpoints.verify,
    checkpoints.convert,
    reproduce.reproduce,
):
    app.command()(other)


def main(args: list[str] | None = None) -> None:
    """Run the command line; every foreseen failure is one line on stderr and an exit code, not a traceback."""
    make_writable()
    given = [with_home(text) for text in (sys.argv[1:] if args is None else args)]
    try:
        with first_of_processes_speaks():
            run_command(given)
    finally:  # what Python does as it ends answers Ctrl-C by a traceback, and there is nothing left to stop
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def run_command(given: list[str]) -> NoReturn:
    """Run a command line, and leave with its exit code."""
    try:
        result = app(given, standalone_mode=False)
    except Exception as error:
        code = exit_code(error)
        if code is None or os.environ.get("CONDZOO_TRACEBACK"):
            raise
        if not said_elsewhere(error):
            print(one_line(error, code, next(iter(given), "")), file=sys.stderr)
        leave_together(error)
        sys.exit(code)
    if code := result if isinstance(result, int) else 0:
        leave_together()
    sys.exit(code)


def make_writable() -> None:
    """See that whatever is printed can be: a path may have letters that the encoding has not.

    A stream that was closed before the process began (`>&-`, as some daemons start theirs) leads nowhere.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  it stays for the process
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def with_home(text: str) -> str:
    """An argument with ~ as the home, which shells leave in quotes and in --out=~/x."""
    option, equals, value = text.partition("=") if text.startswith("--") else ("", "", text)
    return option + equals + (os.path.expanduser(value) if value.startswith("~/") else value)


@contextlib.contextmanager
def first_of_processes_speaks() -> Iterator[None]:
    """Under torchrun only the first process prints."""
    if os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def said_elsewhere(error: Exception) -> bool:
    """Whether another of torchrun's processes prints this error."""
    if os.environ.get("RANK", "0") == "0":
        return False
    from condzoo.training.distributed import said_elsewhere

    return said_elsewhere(error)


def leave_together(error: Exception | None = None) -> None:
    """Wait, where several processes have met, until the first has spoken, which would not outlive the others."""
    if "condzoo.training.distributed" in sys.modules:  # else they have not met, and torch need not be imported
        from condzoo.training.distributed import leave_together

        with contextlib.suppress(OSError):  # nobody reads it any more, which Python says as it ends
            sys.stdout.flush()
        leave_together(error)


def exit_code(error: Any) -> int | None:
    """The exit code an error stands for; None for one that nobody foresaw, which deserves its traceback."""
    code = getattr(error, "exit_code", None)  # Diverged and Stopped bring their own
    if isinstance(code, int):
        return code
    if isinstance(error, ModuleNotFoundError) and error.name is None:  # an extra that is not installed, in words
        return exit_codes.BAD_INPUT
    foreseen = isinstance(error, ValueError | TypeError | OSError) or lack_of_memory(error) or not_compiled(error)
    return exit_codes.BAD_INPUT if foreseen else None
