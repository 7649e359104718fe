"""What a release says of its runs: metrics.json, the input's description, the picture."""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from condzoo.catalog import model_info
from condzoo.checkpoints.folder import PICTURE
from condzoo.data import DataSet, folder_view
from condzoo.probe import Conditioning, plot_records
from condzoo.training import Recipe, Run, load_recipe
from condzoo.training.data_sets import STORED, centre_share
from condzoo.training.recipe_files import read_tables, recipe_sources
from condzoo.training.run_directory import CONDITIONING as STEPS
from condzoo.training.run_directory import ENVIRONMENT, SUMMARY, read_json
from condzoo.training.schema import DataSection

RULE = "the lowest seed, fixed before any was trained"
LABEL = re.compile(r"#\s*(Source|Departs):\s*(.*)")


def input_fields(recipe: Recipe, data: DataSet) -> dict[str, Any]:
    """What timm is to know of the input: size, constants of images in [0, 1], the share that a crop keeps."""
    info = model_info(recipe.model.name)
    if info.family == "mlp" and data.image_shape != info.input_size:
        said = f"{info.name} takes {info.input_size} by its name, the recipe's data is {data.image_shape}"
        resized = data.image_shape[0] == info.input_size[0] and recipe.data.name not in STORED
        raise ValueError(said + f"; train it with data.resize = {info.input_size[1]}" * resized)
    view = (
        {"interpolation": folder_view(interpolation=recipe.data.interpolation).interpolation}
        if recipe.data.name in STORED
        else {}
    )
    return {
        **view,
        "input_size": list(data.image_shape),
        "mean": [value / 255 for value in data.mean],
        "std": [value / 255 for value in data.std],
        "crop_pct": centre_share(recipe.data),
    }


def collect_metrics(
    run: Run, paths: Sequence[Path], tag: str, weights_sum: str, correct: int, images: int
) -> dict[str, Any]:
    """metrics.json: see `condzoo.checkpoints.records.Metrics`."""
    parts = read_json(run.path / ENVIRONMENT)
    environment = parts[-1]
    commits = dict.fromkeys(part["source"]["commit"] for part in parts if part["source"])
    name, header = repository_recipe(run.recipe)
    section = run.recipe.data
    threads = f"{environment['threads']} thread" + "s" * (environment["threads"] > 1)
    return {
        "model": run.recipe.model.name,
        "tag": tag,
        "sha256": weights_sum,
        "parameters": run.summary["parameters"],
        "released_seed": run.recipe.seed,
        "rule": RULE,
        "test_correct": correct,
        "test_images": images,
        "seeds": seed_results(paths),
        "recipe": name,
        "source": header.get("Source", "not stated"),
        "departs": header.get("Departs", "not stated"),
        "data": described_data(section),
        "hardware": f"{environment['processor']}, {threads}, {environment['device']}",
        "packages": environment["packages"],
        "commit": ", ".join(commits) or None,
        "date": run.summary["finished"][:10],
    }


def described_data(section: DataSection) -> dict[str, str | int | None]:
    """The data set, and how its images were prepared."""
    fields: dict[str, str | int | None] = {
        "name": section.name,
        "crop": section.crop,
        "resize": section.resize,
        "augment": section.augment,
    }
    if section.cutout is not None:
        fields["cutout"] = section.cutout
    if section.name in STORED:
        view = folder_view(section.image_size, section.eval_resize, section.interpolation)
        fields |= {"image_size": view.size, "eval_resize": view.resize, "interpolation": view.interpolation}
    return fields


def seed_results(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Each training's last epoch, by seed."""
    return sorted((seed_result(path) for path in paths), key=lambda seed: seed["seed"])


def seed_result(path: Path) -> dict[str, Any]:
    """One training's last epoch."""
    summary = read_json(path / SUMMARY)
    return {
        "seed": summary["seed"],
        "status": summary["status"],
        "test_error": summary["test_error"] if summary["status"] == "done" else None,
        "train_loss": summary.get("train_loss"),
        "epochs": float(summary["epochs"]),
        "steps": summary["steps"],
        "seconds": float(summary["seconds"]),
        "precision": summary["precision"],
    }


def repository_recipe(recipe: Recipe) -> tuple[str | None, dict[str, str]]:
    """(name, its header's Source and Departs) of condzoo's own recipe that equals this one but for the seed."""
    for name, source in recipe_sources().items():
        tables, variants = read_tables(source.path)
        changes = variants[source.variant] if source.variant else {}
        if changes.get("model.name", tables["model"]["name"]) != recipe.model.name:
            continue  # loading a recipe builds its network, and all of them take seconds
        if load_recipe(name).model_copy(update={"seed": recipe.seed}) == recipe:
            return name, header_fields(source.path.read_text(encoding="utf-8"))
    return None, {}


def header_fields(text: str) -> dict[str, str]:
    """The labelled paragraphs of a recipe's leading comment."""
    fields: dict[str, str] = {}
    label = None
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        match = LABEL.match(line)
        if match:
            label = match[1]
            fields[label] = match[2].strip()
        elif label and line.startswith("#   "):
            fields[label] += " " + line.lstrip("# ").strip()
        else:
            label = None
    return fields


def picture(run: Run, title: str, end: Conditioning) -> bytes:
    """The run's conditioning over its steps, as PNG; of the record at the end where the run was not probed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / PICTURE
        if (run.path / STEPS).is_file():
            plot_records(run.path / STEPS, file, title=title)
        else:
            end.plot(file)
        return file.read_bytes()
