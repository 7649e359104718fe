"""README.md of the folder of all checkpoints: a table of all, and of each plain network beside its twin with BatchNorm.

Made from the checkpoints' own files, never written by hand.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from condzoo.checkpoints.folder import CONFIG, CONVERSION, METRICS, CheckpointFolder, read_folder
from condzoo.checkpoints.loading import read_recipe
from condzoo.checkpoints.model_card import error_of, is_released, kappa
from condzoo.checkpoints.records import Config, Conversion, Metrics, read_conditioning, read_record

TITLE = "# Released checkpoints"
NOT_MEASURED = "-"
TWINS = ("_lastbn", "_bn")  # what a twin's name has after its plain network's; an MLP has both
# fields of a recipe that decide a result, beside network, seed and data set
DECIDING = re.compile(
    r"epochs|iterations|precision|ema|grad_clip|accumulate|freeze|model\.(init|drop_rate)|(data|optim|schedule|loss)\..*"
)
PLACES = ("data.root", "data.download", "data.workers")


@dataclass(frozen=True)
class Row:
    """One checkpoint. The numbers are of the last layer's input, of the released weights, as text.

    `folder` is its folder's name where that is not its own, `own` whether it is one of condzoo's releases, `trained_by`
    what of its recipe decides the result, by field.
    """

    arch: str
    tag: str
    data: str
    error: str = NOT_MEASURED
    seeds: str = NOT_MEASURED
    lambda_max: str = NOT_MEASURED
    kappa_half: str = NOT_MEASURED
    kappa_full: str = NOT_MEASURED
    folder: str = ""
    own: bool = False
    trained_by: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """arch.tag."""
        return f"{self.arch}.{self.tag}"

    @property
    def link(self) -> str:
        """The name, leading to its model card."""
        return f"[{self.name}]({quote(self.folder or self.name)}/README.md)"


def checkpoints_table(folders: Iterable[Path]) -> str:
    """README.md of the folder of all checkpoints.

    Raises:
        ValueError: a folder that is no checkpoint.
    """
    rows = sorted((row_of(read_folder(folder)) for folder in folders), key=lambda row: natural_order(row.name))
    columns = ("checkpoint", "data", "test error, %", "seeds", "lambda_max", "kappa p = 0.5", "kappa p = 1")
    made = (
        "Made by `condzoo release`; `condzoo verify --all` measures all of it again, `condzoo validate --all` holds "
        "each against what its family promises."
        if all(row.own for row in rows)
        else "Made by condzoo of the checkpoints beside it; `condzoo verify FOLDER` checks one of them again."
    )
    lines = [
        TITLE,
        "",
        f"{made} Test error: mean over all seeds trained, +- their standard deviation. "
        "lambda_max and kappa: of the last layer's input, of the released weights, in train mode on training images.",
        "",
        table_head(columns),
        *(line((r.link, r.data, r.error, r.seeds, r.lambda_max, r.kappa_half, r.kappa_full)) for r in rows),
    ]
    return "\n".join([*lines, *pairs_section(rows)]) + "\n"


def pairs_section(rows: Iterable[Row]) -> list[str]:
    """Each plain network beside its twins of the same tag and data, as lines; none where there is no pair."""
    by_name = {row.name: row for row in rows if row.lambda_max != NOT_MEASURED}
    columns = ("plain -> with BatchNorm", "test error, %", "lambda_max", "kappa p = 0.5", "kappa p = 1")
    cells = []
    for twin in by_name.values():
        suffix = next((suffix for suffix in TWINS if twin.arch.endswith(suffix)), None)
        plain = by_name.get(f"{twin.arch.removesuffix(suffix)}.{twin.tag}") if suffix else None
        if plain is not None and plain.data == twin.data:
            names = ("error", "lambda_max", "kappa_half", "kappa_full")
            beside = [f"{getattr(plain, name)} -> {getattr(twin, name)}" for name in names]
            cells.append((f"{plain.name} -> {twin.arch}{differences(plain, twin)}", *beside))
    if not cells:
        return []
    return [
        "",
        "## What BatchNorm does to the last layer's input",
        "",
        "Each plain network -> its twin of the same tag: `_lastbn` has one BatchNorm more, before the last linear "
        "layer, `_bn` one in every hidden layer. In brackets: what else their recipes differ in.",
        "",
        table_head(columns),
        *map(line, cells),
    ]


def differences(plain: Row, twin: Row) -> str:
    """What decides their results beside the network: ` (optim.lr 0.01 -> 0.1)`; empty where it is the same."""
    names = sorted(plain.trained_by.keys() | twin.trained_by.keys())
    pairs = {name: [row.trained_by.get(name, "none") for row in (plain, twin)] for name in names}
    said = [f"{name} {' -> '.join(pair)}" for name, pair in pairs.items() if pair[0] != pair[1]]
    return f" ({', '.join(said)})" if said else ""


def deciding_fields(recipe: Mapping[str, Any]) -> dict[str, str]:
    """What of a recipe decides its result beside network, seed and data set, by field."""
    tables = {name: value if isinstance(value, dict) else {"": value} for name, value in recipe.items()}
    flat = {f"{name}.{key}".removesuffix("."): value for name, table in tables.items() for key, value in table.items()}
    return {name: str(value) for name, value in flat.items() if DECIDING.fullmatch(name) and name not in PLACES}


def table_head(columns: tuple[str, ...]) -> str:
    """A Markdown table's first two lines."""
    return line(columns) + "\n|" + "---|" * len(columns)


def line(cells: tuple[str, ...]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def row_of(folder: CheckpointFolder) -> Row:
    """One checkpoint's row; of a converted one nothing was measured."""
    config = read_record(folder, CONFIG, Config)
    arch, tag, name = config.architecture, config.pretrained_cfg.tag, folder.path.name
    if not folder.trained:
        return Row(arch, tag, f"from {read_record(folder, CONVERSION, Conversion).origin}", folder=name)
    metrics = read_record(folder, METRICS, Metrics)
    s = read_conditioning(folder)["at_end"].last.input
    return Row(
        arch,
        tag,
        data=str(metrics.data["name"]),
        error=error_of(metrics),
        seeds=str(len(metrics.seeds)),
        lambda_max=f"{s.lambda_max:.4g}",
        kappa_half=kappa(s, 0.5),
        kappa_full=kappa(s, 1.0),
        folder=name,
        own=is_released(f"{arch}.{tag}", metrics),
        trained_by=deciding_fields(read_recipe(folder)),
    )


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sorting key: numbers by their size, so that a network stands above its deeper ones and its twins."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
