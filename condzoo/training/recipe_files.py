"""Where recipes are found: beside the package in a repository, inside it once installed; and their variants.

A file is a complete recipe. Its [variants] are named recipes that differ from it in a few fields:

    [variants]
    resnet56 = { "model.name" = "cifar_resnet56", about = "the paper has ..." }

They may also be written as tables ([variants.resnet56.model]), which change the fields that they name. A variant of
condzoo's own is called by its folder and name (cifar10/resnet56), any by FILE:VARIANT.
"""

import difflib
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from condzoo.probe.files import expanded
from condzoo.training.recipe_errors import RecipeError, shown

PACKAGE = Path(__file__).parents[1]
EXPERIMENTS = "paper"
VARIANTS, ABOUT = "variants", "about"
ENCODING = "utf-8-sig"  # UTF-8, with or without the mark that editors of Windows put in front
ARGUMENTS = "model.args"  # of the network: what they are called and hold is its own


@dataclass(frozen=True)
class RecipeSource:
    """A recipe: a file, and the variant of it; None is the file itself."""

    path: Path
    variant: str | None = None


def recipe_folder() -> Path:
    """The folder of the recipes: `recipes/` of the repository, or `condzoo/_recipes` of the wheel."""
    installed = PACKAGE / "_recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "recipes"


def recipe_files() -> dict[str, Path]:
    """Name ("cifar10/resnet20_lastbn") -> file of every recipe that comes with condzoo; variants share one.

    Those under paper/ are experiments of many runs (condzoo.experiments), not recipes.
    """
    return {name: source.path for name, source in recipe_sources().items()}


def recipe_sources() -> dict[str, RecipeSource]:
    """Name -> file and variant of every recipe that comes with condzoo."""
    folder = recipe_folder()
    sources: dict[str, RecipeSource] = {}
    for path in sorted(folder.rglob("*.toml")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if not name.startswith(f"{EXPERIMENTS}/"):
            sources[name] = RecipeSource(path)
            group = name.rpartition("/")[0]
            sources |= {f"{group}/{variant}": RecipeSource(path, variant) for variant in read_tables(path)[1]}
    return sources


def recipe_headers() -> dict[str, str]:
    """Name -> what the recipe reproduces: the first line of its header, or what a variant changes in its file."""
    sources = recipe_sources()
    names = {source.path: name for name, source in sources.items() if source.variant is None}
    return {name: described(source, names[source.path]) for name, source in sources.items()}


def described(source: RecipeSource, file_name: str) -> str:
    """A line on a recipe; `file_name` is what its file is called."""
    if source.variant is None:
        return header_of(source.path.read_text(encoding=ENCODING))
    changes = dict(read_tables(source.path)[1][source.variant])
    about = changes.pop(ABOUT, "")
    fields = ", ".join(f"{field} = {value}" for field, value in changes.items())
    return f"{file_name} with {fields}" + (f"; {about}" if about else "")


def header_of(text: str) -> str:
    """The first line of a file's opening comment that says something."""
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if line.strip("# "):
            return line.strip("# ")
    return ""


def read_recipe(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tables, changes) of a recipe by its path or name: the file's, and field -> value of the variant.

    Raises:
        FileNotFoundError: no such file or recipe; the closest names are given.
        RecipeError: not TOML, or no such variant.
    """
    source = find_recipe(path)
    tables, variants = read_tables(source.path)
    if source.variant is None:
        return tables, {}
    if source.variant not in variants:
        close = difflib.get_close_matches(source.variant, variants, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        known = f"it has: {', '.join(variants)}" if variants else "it has none"
        raise RecipeError(f"{source.path}: no variant {source.variant!r}; {hint}{known}")
    return tables, {field: value for field, value in variants[source.variant].items() if field != ABOUT}


def read_tables(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(tables without [variants], variants) of a file: of each variant field -> value.

    Raises:
        RecipeError: not TOML, or variants that are not tables.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding=ENCODING))
    except (ValueError, RecursionError) as error:  # tomllib's own, UnicodeDecodeError, a number of too many digits
        raise RecipeError(f"{path}: not a TOML file: {error}") from error
    variants = tables.pop(VARIANTS, {})
    if not isinstance(variants, dict):
        raise RecipeError(f"{path}: {VARIANTS}: got {shown(variants)}, must be a table of variants")
    for fault in variant_faults(variants):
        raise RecipeError(f"{path}: {VARIANTS}.{fault}")
    return tables, {name: dict(fields_in(changes)) for name, changes in variants.items()}


def fields_in(tables: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("model.name", value) of {"model": {"name": value}}: the fields that nested tables name, by their paths.

    A table without entries is a value, as is one that is an argument of the network.
    """
    for name, value in tables.items():
        field = prefix + name
        if isinstance(value, dict) and value and not field.startswith(f"{ARGUMENTS}."):
            yield from fields_in(value, f"{field}.")
        else:
            yield field, value


def variant_faults(variants: dict[str, Any]) -> Iterator[str]:
    """What is wrong with [variants], by name."""
    for name, changes in variants.items():
        if not isinstance(changes, dict):
            yield f'{name}: got {shown(changes)}, must be a table of changes, {{ "optim.lr" = 0.05 }}'
        elif not isinstance(changes.get(ABOUT, ""), str):
            yield f"{name}.{ABOUT}: got {shown(changes[ABOUT])}, must be a text in quotes"
        elif not set(changes) - {ABOUT}:
            yield f"{name}: changes nothing"
        elif not name or ":" in name:
            yield f"{name!r}: a variant is called by FILE:NAME, so its name must not be empty or have a colon"


def find_recipe(path: str | Path) -> RecipeSource:
    """The file and variant of a recipe, given as a path, as FILE:VARIANT, or by its name.

    Raises:
        FileNotFoundError: none of them; the closest names are given.
    """
    if expanded(path).is_file():
        return RecipeSource(expanded(path))
    file, colon, variant = str(path).rpartition(":")
    if colon and expanded(file).is_file():
        return RecipeSource(expanded(file), variant)
    name = str(path).removeprefix("recipes/").removesuffix(".toml")
    own = recipe_folder() / f"{name}.toml"
    if own.is_file() and not name.startswith(f"{EXPERIMENTS}/"):
        return RecipeSource(own)
    known = recipe_sources()
    if name in known:
        return known[name]
    if (within := expanded(path) / "recipe.toml").is_file():
        raise FileNotFoundError(f"{path} is a run directory, no recipe; `condzoo train {within} --out {path}` goes on")
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "`condzoo recipes` lists them"
    raise FileNotFoundError(f"no recipe {str(path)!r}: it is neither a file nor the name of a recipe; {hint}")
