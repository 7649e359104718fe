"""The commands of `condzoo` that make and check checkpoints; `condzoo.cli` adds them to its own."""

from pathlib import Path
from typing import Annotated

import typer

from condzoo.exit_codes import CHECK_FAILED

Tag = Annotated[str, typer.Option(help="What tells the model's checkpoints apart: the name is MODEL.TAG.")]
Out = Annotated[
    Path | None,
    typer.Option(help="The folder that takes MODEL.TAG/. Default: checkpoints/, here or in the repository."),
]
DataRoot = Annotated[
    Path | None, typer.Option(help="Folder with the data sets. Default: CONDZOO_DATA, then ~/.cache/condzoo/data.")
]


def release(
    runs: Annotated[list[Path], typer.Argument(help="Finished run directories of one recipe, a seed each.")],
    tag: Tag,
    out: Out = None,
    data_root: DataRoot = None,
    default: Annotated[bool, typer.Option("--default", help="Let the model's bare name stand for this one.")] = False,
    push: Annotated[bool, typer.Option("--push", help="Upload the folder to the Hugging Face Hub afterwards.")] = False,
    owner: Annotated[str | None, typer.Option(help="With --push: user or organization. Default: condzoo.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --push: list what would be uploaded.")] = False,
) -> None:
    """Make a checkpoint of finished runs: weights, recipe, results of every seed, conditioning, model card.

    Refuses a run that is unfinished, diverged, of uncommitted source, or whose evaluation differs from its record.
    """
    from condzoo.checkpoints.hub import push as upload
    from condzoo.models.released import HUB_OWNER
    from condzoo.release import is_listed, released_before
    from condzoo.release import release as make_release

    if not push and (dry_run or owner is not None):
        raise ValueError("--dry-run and --owner say how to --push; give that too, or leave them out")
    made = released_before(runs, tag, out=out) if push else None
    if made and not default and is_listed(made):
        folder = made
    else:  # also of one that was stopped before index and table had it
        folder = make_release(runs, tag, out=out, data_root=data_root, default=default)
    typer.echo(f"{'released before: ' if made else 'released '}{folder}")
    if push:
        uploaded = upload(folder, owner=owner or HUB_OWNER, dry_run=dry_run)
        typer.echo(
            f"{'uploaded' if uploaded.done else 'would upload'} {len(uploaded.files)} files to {uploaded.repository}"
        )
        if not uploaded.done:
            typer.echo("\n".join(uploaded.files))


def verify(
    name: Annotated[str | None, typer.Argument(help="A released name (MODEL or MODEL.TAG) or a folder.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every released checkpoint.")] = False,
    data_root: DataRoot = None,
) -> None:
    """Check a checkpoint: hashes, keys, logits, model card; with its data, accuracy and conditioning too.

    One line a check; exit 1 where one fails.
    """
    from condzoo.checkpoints import verify_checkpoint, verify_released

    if every == (name is not None):
        raise ValueError("verify takes a checkpoint's name or folder, or --all")
    failed = False
    for verification in verify_released(data_root) if name is None else [verify_checkpoint(name, data_root)]:
        for row in verification.rows:
            state = {True: "ok  ", False: "FAIL", None: "-   "}[row.ok]
            typer.echo(f"{verification.name}  {state}  {row.check:12} {row.detail}")
        failed |= not verification.ok
    if failed:
        raise typer.Exit(CHECK_FAILED)


def convert(
    source: Annotated[
        str, typer.Argument(help="A file with a state dict; with --last-bn a timm model: timm/resnet50.")
    ],
    model: Annotated[str | None, typer.Option(help="Which network of the zoo the file's weights are for.")] = None,
    last_bn: Annotated[
        bool, typer.Option("--last-bn", help="Make timm's model's last-BN twin, same function.")
    ] = False,
    weights: Annotated[Path | None, typer.Option(help="With --last-bn: weights from this file, not timm's.")] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="With --last-bn: folder of images, one folder a class, to take statistics from.")
    ] = None,
    tag: Tag = "converted",
    out: Annotated[Path | None, typer.Option(help="The folder that takes MODEL.TAG/. Default: converted/.")] = None,
    license: Annotated[str | None, typer.Option(help="Of the weights, for config and model card.")] = None,
    mean: Annotated[
        str | None, typer.Option(help="Of each channel of images in [0, 1], e.g. 0.4914,0.4822,0.4465; with --std.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="As --mean.")] = None,
) -> None:
    """Make a checkpoint of weights from elsewhere; pickled files are read without running what they hold."""
    from condzoo.conversion import convert as convert_file
    from condzoo.conversion import convert_last_bn

    shift, scale = numbers("--mean", mean), numbers("--std", std)
    if last_bn and model is None:
        folder = convert_last_bn(
            source,
            weights=weights,
            calibrate=calibrate,
            tag=tag,
            out=out,
            license=license,
            mean=shift,
            std=scale,
        )
    elif not last_bn and model is not None and weights is None and calibrate is None:
        folder = convert_file(source, model, tag=tag, out=out, license=license or "unknown", mean=shift, std=scale)
    else:
        raise ValueError(
            "convert takes FILE --model NAME, or timm/NAME --last-bn [--weights FILE] [--calibrate FOLDER]"
        )
    typer.echo(f"wrote {folder}")


def numbers(option: str, text: str | None) -> list[float] | None:
    """Numbers with commas between them; None for an option that was not given."""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} takes numbers with commas between them, got {text!r}") from None
