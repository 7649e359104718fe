"""Reading a recipe: a TOML file, changed by overrides, checked, and written back as resolved."""

import operator
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from condzoo.training.consistency import problems
from condzoo.training.recipe_errors import RecipeError, describe_errors, shortened
from condzoo.training.recipe_files import ARGUMENTS, read_recipe
from condzoo.training.schema import Recipe


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a TOML file, the name of a recipe that comes with condzoo ("cifar10/resnet20_lastbn"), or one of a
            file's variants ("mine.toml:deep"; see `condzoo.training.recipe_files`).
        overrides: changes like "optim.lr=0.05": a field's path and a TOML value; a bare word is a text,
            `none` takes the field out ('"none"' is the text). Setting `epochs` takes `iterations` out, and the other
            way round.

    Raises:
        FileNotFoundError: no such file or recipe; the closest names are given.
        RecipeError: one line for each fault, with the field's path, what came and what is allowed.
    """
    overrides = [overrides] if isinstance(overrides, str) else overrides
    try:
        given, changes = read_recipe(path)
        for field, value in changes.items():
            set_field(given, field, value)
        for override in overrides:
            override_field(given, *parse_override(override))
        return parse_recipe(given, source=str(path))
    except RecursionError as error:
        raise RecipeError(f"{path}: tables are nested too deep") from error


def parse_recipe(given: dict[str, Any], source: str = "recipe") -> Recipe:
    """A checked recipe from nested tables; `source` stands in front of each fault."""
    try:
        recipe = Recipe.model_validate(given)
    except ValidationError as error:
        raise RecipeError(
            "\n".join(f"{source}: {shortened(line, given)}" for line in describe_errors(error, given))
        ) from error
    check_recipe(recipe, source)
    return recipe


def check_recipe(recipe: Recipe, source: str = "recipe") -> None:
    """Raise a RecipeError where fields contradict each other, the network or the data."""
    faults = problems(recipe)
    if faults:
        tables = recipe.model_dump()
        raise RecipeError("\n".join(f"{source}: {shortened(fault, tables)}" for fault in faults))


def recipe_tables(recipe: Recipe) -> dict[str, Any]:
    """The recipe as resolved, as nested tables that `parse_recipe` takes."""
    return recipe.model_dump(exclude_none=True)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as resolved, as TOML that `load_recipe` reads back to an equal one."""
    return tomli_w.dumps(recipe_tables(recipe))


def parse_override(override: str) -> tuple[str, Any]:
    """("optim.lr", 0.05) of "optim.lr=0.05": a TOML value or a bare word; `none` is None.

    Raises:
        RecipeError: no field or no "=".
    """
    path, equals, text = override.partition("=")
    if not equals or not all(part.strip() for part in path.split(".")):
        raise RecipeError(f"override {override!r}: must be FIELD=VALUE, e.g. optim.lr=0.05")
    return path.strip(), None if text.strip() == "none" else _toml_value(text)


def override_field(given: dict[str, Any], path: str, value: Any) -> None:
    """As `set_field`, but an argument of the network that is taken out must be there: some networks take "none".

    Raises:
        RecipeError: it is not, or the path goes through a value.
    """
    table: Any = given
    for name in path.split("."):
        table = table.get(name.strip()) if isinstance(table, dict) else None
    if value is None and table is None and path.startswith(f"{ARGUMENTS}."):
        raise RecipeError(
            f"override {path}=none: none takes a field out, and {path} is not in the recipe; leave it out, "
            f"or for the text none write {path}='\"none\"'"
        )
    set_field(given, path, value)


def set_field(given: dict[str, Any], path: str, value: Any) -> None:
    """Change one field of nested tables; None takes it out. Of epochs and iterations the new one stays.

    A whole number may be numpy's, which no strict field takes.

    Raises:
        RecipeError: the path goes through a value.
    """
    *tables, field = (part.strip() for part in path.split("."))
    table = given
    for name in tables:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise RecipeError(f"override {path}={value}: {name} is a value, not a table")
    if path in ("epochs", "iterations") and value is not None:
        given.pop("epochs", None)
        given.pop("iterations", None)
    if value is None:
        table.pop(field, None)
    else:
        table[field] = as_int(value)


def as_int(value: Any) -> Any:
    """A whole number of numpy or torch as Python's own; anything else as it is."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def _toml_value(text: str) -> Any:
    """The TOML value of a text; what is none, or more than one, is a text itself (a bare word)."""
    try:
        found = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # tomllib's own, or a number of too many digits
        return text.strip()
    return found["value"] if len(found) == 1 else text.strip()
