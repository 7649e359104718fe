"""What the zoo holds, by name: read from the family tables, without torch, so that listing is instant."""

import functools
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

TABLES = Path(__file__).parent / "models" / "tables"
RELEASED = Path(__file__).parent / "models" / "released.toml"
SIZES = ("input_size", "num_classes", "params", "macs")  # what weights of a tag may have of their own


@dataclass(frozen=True)
class ModelInfo:
    """What a model is, before it is built.

    Attributes:
        name: as `create_model` takes it.
        family: the table it stands in, e.g. "cifar_resnet".
        dataset: the data it is made for; `input_size` (C, H, W) and `num_classes` are that data's.
        depth: weight layers, as the name counts them.
        norm: normalization of the body: "bn" or "none"; of timm's own models also "ln" (LayerNorm, RMSNorm) or "gn"
            (GroupNorm), whichever most of its layers are.
        last_bn: whether a BatchNorm stands before the last linear layer.
        params: parameters; `macs`: multiply-adds of convolutions and linear layers for one image.
        source: where the architecture is from.
    """

    name: str
    family: str
    dataset: str
    depth: int
    norm: str
    last_bn: bool
    input_size: tuple[int, int, int]
    num_classes: int
    params: int
    macs: int
    source: str


@functools.cache
def read_catalog() -> tuple[dict[str, ModelInfo], dict[str, ModelInfo]]:
    """The zoo's models, and timm's own plain networks that the zoo's have as twins."""
    ours: dict[str, ModelInfo] = {}
    plain: dict[str, ModelInfo] = {}
    for path in sorted(TABLES.glob("*.toml")):
        table = tomllib.loads(path.read_text())
        for rows, into in ((table["models"], ours), (table.get("plain", {}), plain)):
            for name, row in rows.items():
                into[name] = ModelInfo(
                    name=name,
                    family=path.stem,
                    dataset=table["dataset"],
                    depth=row["depth"],
                    norm=row["norm"],
                    last_bn=row["last_bn"],
                    input_size=tuple(row.get("input_size", table["input_size"])),
                    num_classes=table["num_classes"],
                    params=row["params"],
                    macs=row["macs"],
                    source=table["source"],
                )
    return ours, plain


def list_models(filter: str | Iterable[str] = "", *, family: str | None = None, pretrained: bool = False) -> list[str]:
    """Names of the zoo's registered models, family by family, by depth.

    Args:
        filter: a wildcard pattern as timm's, e.g. "*resnet20*", or several of which one must fit; "" is all.
        family: one family's only, e.g. "cifar_vgg".
        pretrained: only those with a released checkpoint, as "arch.tag".

    Raises:
        ValueError: no such family.
    """
    ours, _ = read_catalog()
    families = sorted({info.family for info in ours.values()})
    if family is not None and family not in families:
        raise ValueError(f"unknown family {family!r}; one of: {', '.join(families)}")
    names = [n for n, info in ours.items() if family is None or info.family == family]
    if pretrained:
        tagged = tomllib.loads(RELEASED.read_text(encoding="utf-8"))
        names = [release for n in names for release in tagged if release.split(".", 1)[0] == n]
    patterns = [filter] if isinstance(filter, str) else list(filter)
    return [n for n in names if not any(patterns) or any(_fits(n, pattern) for pattern in patterns)]


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.split(".", 1)[0], pattern)


def model_info(name: str) -> ModelInfo:
    """What `create_model(name)` builds: family, sizes, cost, source.

    Registered models answer from the tables; other sizes of the MLPs and CIFAR nets, and timm's own models, are
    built on the meta device and counted. Like all that takes a name it registers the models with timm.

    Raises:
        ValueError: an unknown name or tag, with the closest ones.
    """
    from condzoo import models  # noqa: F401  registers them

    return look_up(name)


def look_up(name: str) -> ModelInfo:
    """`model_info`, without importing what the tables do not need."""
    arch, _, tag = name.partition(".")
    ours, plain = read_catalog()
    row = ours.get(arch) or plain.get(arch)
    if row is not None and not tag:
        return row
    from timm.models import is_model

    from condzoo.models import describe
    from condzoo.models.released import find_release

    if arch in ours:
        own = find_release(arch, tag).input
        if all(own.get(key, getattr(row, key)) == getattr(row, key) for key in ("input_size", "num_classes")):
            return ours[arch]
    if row is None and tag and not is_model(arch):
        describe(arch)  # says what is wrong with the name
        raise ValueError(f"no weights are released for {arch!r}: it is not one of the registered models")
    built = describe(name)  # the tag's weights may be of other images or classes than the architecture's
    return ModelInfo(name=arch, **built) if row is None else replace(row, **{key: built[key] for key in SIZES})


def released_names(name: str) -> list[str]:
    """The released weights of a model as "arch.tag", the one that its bare name stands for first."""
    arch, rows = name.partition(".")[0], tomllib.loads(RELEASED.read_text(encoding="utf-8"))
    return sorted((r for r in rows if r.split(".", 1)[0] == arch), key=lambda r: not rows[r].get("default", False))


def markdown_table() -> str:
    """The README's table of models: a row a depth or size, the variants beside it."""
    lines = ["| model | variants | data | parameters | multiply-adds |", "|---|---|---|---|---|"]
    names = list_models()
    for name in names:
        info = look_up(name)
        base = next((b for b in names if b != name and name.startswith(f"{b}_")), None)
        if base is not None:
            continue
        variants = [f"`{n.removeprefix(name)}`" for n in names if n.startswith(f"{name}_")]
        cells = (f"`{name}`", " ".join(variants), info.dataset, f"{info.params:,}", f"{info.macs:,}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table())
