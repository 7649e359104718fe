"""Writing a checkpoint's folder: all of it or nothing, and only one that loads again."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
from torch import nn

from condzoo.checkpoints.folder import (
    CARD,
    CONFIG,
    EXPECTED,
    SUMS,
    WEIGHTS,
    CheckpointFolder,
    read_folder,
    write_json,
    write_sums,
)
from condzoo.checkpoints.loading import load_folder
from condzoo.checkpoints.model_card import model_card
from condzoo.checkpoints.overview import TITLE, checkpoints_table
from condzoo.checkpoints.remeasuring import EXPECTED_IMAGES, logits_of
from condzoo.models import released
from condzoo.models.weight_files import as_safetensors
from condzoo.probe.files import expanded, naming, write_whole

TAG = re.compile(r"[a-z0-9][a-z0-9_]*")
KEPT_INPUT = ("input_size", "interpolation", "crop_pct", "mean", "std", "num_classes", "pool_size", "first_conv")


def default_root() -> Path:
    """Where checkpoints are written: the repository's checkpoints/, else checkpoints/ in the working directory."""
    repository = released.PACKAGE.parent / "checkpoints"
    return repository if repository.is_dir() else Path("checkpoints")


def root_of(out: str | Path | None, usual: Path) -> Path:
    """The folder that takes a checkpoint's: the one given, in which ~ is the user's home, else the usual one."""
    return usual if out is None else expanded(out)


def check_tag(tag: str) -> str:
    """The tag, if it can be part of a name.

    Raises:
        ValueError: other than small letters, digits and underscores.
    """
    if not TAG.fullmatch(tag):
        raise ValueError(f"a tag is small letters, digits and underscores, e.g. 'authors', got {tag!r}")
    return tag


def check_free(target: Path) -> Path:
    """The target, if nothing is there and the table beside it can be written.

    Raises:
        FileExistsError: something is there, or beside it a README.md that is not the table of checkpoints.
        ValueError: a checkpoint beside it is damaged.
    """
    if target.exists():
        raise FileExistsError(f"{target} is already there; a release is never overwritten: take another tag")
    check_table(target.parent)
    checkpoints_table(checkpoint_folders_in(target.parent))
    return target


def check_table(root: Path) -> None:
    """FileExistsError where root/README.md is not the table of checkpoints, which would take its place."""
    table = root / CARD
    if table.exists() and not (table.is_file() and table.read_bytes().startswith(TITLE.encode())):
        raise FileExistsError(
            f"{table} is no table of checkpoints, and would be overwritten by one; give another folder by --out"
        )


def serialize(model: nn.Module) -> bytes:
    """The network's state dict as a safetensors file, which timm reads too."""
    return as_safetensors(model.state_dict())


def timm_config(model: Any, tag: str, input_fields: Mapping[str, Any]) -> dict[str, Any]:
    """config.json in timm's layout, of a network that timm (or condzoo) built.

    Args:
        model: with timm's `pretrained_cfg`.
        input_fields: what replaces the model's own input description (mean, std, ...).
    """
    own = {key: model.pretrained_cfg.get(key) for key in (*KEPT_INPUT, "classifier", "license")}
    cfg = {**own, **input_fields, "tag": tag, "num_classes": model.num_classes, "custom_load": False}
    channels = cfg["input_size"][0]
    return {
        "architecture": model.pretrained_cfg["architecture"],
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": {} if channels == own["input_size"][0] else {"in_chans": channels},
        "pretrained_cfg": cfg,
    }


def write_checkpoint(
    target: Path,
    model: nn.Module,
    weights: bytes,
    config: dict[str, Any],
    records: Mapping[str, Any],
    own: bool | None = None,
) -> Path:
    """Write the folder under a temporary name, load it again, then rename it.

    Args:
        target: the folder, `arch.tag`; must not exist.
        weights: of `serialize`.
        records: further files by name: bytes as they are, text, or what is written as JSON.
        own: as for `model_card`.

    Raises:
        FileExistsError: the target is there, or beside it a README.md that is not the table of checkpoints.
        ValueError: the files do not make a checkpoint that loads; logits that are not finite.
    """
    check_free(target)
    shape = (EXPECTED_IMAGES, *config["pretrained_cfg"]["input_size"])
    logits = logits_of(model, shape)
    if not logits.isfinite().all():
        raise ValueError(
            f"{target.name}: the network's logits are not finite on the fixed input; these weights are of a diverged "
            "training, or of another network"
        )
    expected = {"shape": shape, "logits": logits.tolist()}
    target.parent.mkdir(parents=True, exist_ok=True)
    with naming(target), tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as temporary:
        folder = Path(temporary) / target.name
        folder.mkdir()
        for name, content in {**records, WEIGHTS: weights, CONFIG: config, EXPECTED: expected}.items():
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            elif isinstance(content, str):
                (folder / name).write_text(content, encoding="utf-8")
            else:
                write_json(folder / name, content)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        (folder / CARD).write_text(model_card(CheckpointFolder(folder, files), own), encoding="utf-8")
        write_sums(folder)
        load_folder(read_folder(folder))
        folder.rename(target)
    return target


def checkpoint_folders_in(root: Path) -> list[Path]:
    """Every checkpoint's folder right under `root`; others may have a file of sums, too."""
    return sorted(path.parent for path in root.glob(f"*/{SUMS}") if (path.parent / CONFIG).is_file())


def write_table(root: Path) -> None:
    """Write root/README.md, the table of all checkpoints in `root`; FileExistsError where it is something else."""
    check_table(root)
    write_whole(root / CARD, checkpoints_table(checkpoint_folders_in(root)).encode())


def refresh_cards(root: Path) -> None:
    """Make every README.md under `root` again from the other files, after the text that makes them has changed."""
    for path in checkpoint_folders_in(root):
        (path / CARD).write_text(model_card(read_folder(path)), encoding="utf-8")
        write_sums(path)
    write_table(root)


def add_to_index(name: str, weights_sum: str, cfg: dict[str, Any], default: bool) -> None:
    """Write a release's row into the package's index; as default it takes the place of the one before.

    It is the default, too, where it was before or is its model's only one.
    """
    rows: dict[str, dict[str, Any]] = {}
    arch = name.split(".", 1)[0]
    known = released.read_index()
    default = default or (name in known and known[name].default)
    default = default or not any(release.arch == arch and release.name != name for release in known.values())
    for other in known.values():
        rows[other.name] = {"sha256": other.sha256, "default": other.default and not (default and other.arch == arch)}
        rows[other.name] |= other.input
    kept = ("mean", "std", "crop_pct", "interpolation", "num_classes", "input_size")
    rows[name] = {"sha256": weights_sum, "default": default, **{key: cfg[key] for key in kept}}
    lines = released.INDEX.read_text(encoding="utf-8").splitlines(keepends=True)
    header = "".join(line for line in lines if line.startswith("#"))
    text = header + "\n" + tomli_w.dumps(dict(sorted(rows.items())))
    write_whole(released.INDEX, text.encode())
