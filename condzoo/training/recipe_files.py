"""Where recipes are found: beside the package in a repository, inside it once installed."""

import difflib
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
EXPERIMENTS = "paper"


def recipe_folder() -> Path:
    """The folder of the recipes: `recipes/` of the repository, or `condzoo/_recipes` of the wheel."""
    installed = PACKAGE / "_recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "recipes"


def recipe_files() -> dict[str, Path]:
    """Name ("cifar10/resnet20_lastbn") -> file of every recipe that comes with condzoo.

    Those under paper/ are experiments of many runs (condzoo.experiments), not recipes.
    """
    folder = recipe_folder()
    found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.toml"))}
    return {name: path for name, path in found.items() if not name.startswith(f"{EXPERIMENTS}/")}


def recipe_headers() -> dict[str, str]:
    """Name -> the first line of its header, which says what the recipe reproduces; "" where there is none."""
    return {name: header_of(path.read_text(encoding="utf-8")) for name, path in recipe_files().items()}


def header_of(text: str) -> str:
    """The first line of a file's opening comment that says something."""
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if line.strip("# "):
            return line.strip("# ")
    return ""


def find_recipe(path: str | Path) -> Path:
    """The file of a recipe, given as a path or by its name.

    Raises:
        FileNotFoundError: neither; the closest names are given.
    """
    if Path(path).is_file():
        return Path(path)
    known = recipe_files()
    name = str(path).removeprefix("recipes/").removesuffix(".toml")
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"recipes by name: {', '.join(known)}"
    raise FileNotFoundError(f"no recipe {str(path)!r}: it is neither a file nor the name of a recipe; {hint}")
