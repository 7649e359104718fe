"""A finished run: its summary, its network, and its accuracy measured again."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from condzoo import exit_codes
from condzoo.data import Split
from condzoo.models.weight_files import check_state, parse_weights, read_plain_file, sha256
from condzoo.probe.files import expanded
from condzoo.training.data_sets import class_count, class_names, image_shape, read_data, renamed
from condzoo.training.evaluation import Evaluation, evaluate
from condzoo.training.networks import network_of
from condzoo.training.precision import resolve_device, resolve_numerics, usual_torch
from condzoo.training.preparation import place
from condzoo.training.recipe import dump_recipe, load_recipe
from condzoo.training.run_directory import MODEL, RECIPE, SUMMARY, read_summary
from condzoo.training.schema import Recipe


class Diverged(RuntimeError):
    """A run whose loss, gradient or running statistics stopped being finite; `summary` says where."""

    exit_code = exit_codes.DIVERGED
    shared = True  # raised in every process of a run alike

    def __init__(self, message: str, summary: dict[str, Any]) -> None:
        super().__init__(message)
        self.summary = summary


@dataclass(frozen=True)
class Run:
    """A run that came to its end.

    `summary` is its summary.json; `test_error` is that of the last step, as a share of the test images: of a
    diverged run by the weights before the bad step, None where the run was never evaluated or failed.
    """

    path: Path
    recipe: Recipe
    summary: dict[str, Any]

    @property
    def test_error(self) -> float | None:
        """Share of the test images classified wrongly after the last step."""
        return self.summary.get("test_error")

    @usual_torch()
    def load_model(self, *, checked: bool = True) -> nn.Module:
        """The trained network, on the CPU, in eval mode.

        Args:
            checked: its weights must be those that its summary is of.

        Raises:
            ValueError: its weights are damaged, or others.
        """
        section = self.recipe.data
        classes = class_count(section) or self.summary["num_classes"]
        model = network_of(self.recipe.model, image_shape(section), classes)
        path = self.path / MODEL
        content = read_plain_file(path)
        state = parse_weights(content, str(path), finite=False)  # a diverged run's need not be
        digest = sha256(content)
        if checked and self.summary.get("weights_sha256", digest) != digest:  # an old summary has none
            raise ValueError(
                f"{path} is damaged, or of another run: {SUMMARY} has another SHA-256 of it; delete it, and give the "
                "`condzoo train` command of the run again, which writes it from the last checkpoint"
            )
        check_state(state, model.state_dict(), str(path))
        model.load_state_dict(state)
        return model.eval()


def load_run(path: str | Path) -> Run:
    """The run in a run directory, or the one a file of it belongs to.

    Raises:
        FileNotFoundError: no finished run there, or a folder of several.
    """
    path = expanded(path)
    folder = path.parent if path.is_file() else path
    if runs := runs_within(folder):
        raise FileNotFoundError(f"{folder} is a folder of several runs; name one of them: {', '.join(runs)}")
    missing = [name for name in (RECIPE, SUMMARY, MODEL) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} holds no finished run: it has no {missing[0]}; finish it by `condzoo train`")
    return Run(folder, load_recipe(folder / RECIPE), read_summary(folder))


def runs_within(folder: Path) -> list[str]:
    """The names of the finished runs in a folder that is none itself."""
    return sorted(each.parent.name for each in folder.glob(f"*/{SUMMARY}") if not (folder / RECIPE).is_file())


@usual_torch()
def evaluate_run(
    path: str | Path,
    data_root: str | Path | None = None,
    device: str | None = None,
    split: Split = "test",
    *,
    checked: bool = True,
) -> Evaluation:
    """Measure a finished run's accuracy again, in the arithmetic it was trained in, whatever `auto` would pick here.

    On the device it was trained on, the result equals the recorded one to the last image. `checked`: see `load_model`.

    Raises:
        FileNotFoundError: no finished run; no data.
        ValueError: damaged weights; data of another number of classes; a run in fp16, and no GPU.
    """
    run = load_run(path)
    model = run.load_model(checked=checked)
    trained_in = {"precision": run.summary.get("precision", run.recipe.precision)}
    numerics = resolve_numerics(run.recipe.model_copy(update=trained_in), model, resolve_device(device))
    data = read_data(run.recipe, data_root, test_only=split == "test").to(numerics.device)
    classes = run.summary.get("num_classes", data.num_classes)
    if data.num_classes != classes:
        raise ValueError(
            f"{run.path} was trained on {classes} classes, and the data here have {data.num_classes}; name its own "
            "data by --data-root"
        )
    here = class_names(data)
    if changed := renamed(run.summary.get("class_names", here), here):
        raise ValueError(
            f"{run.path} was trained on classes of other names: {changed}, and names say which output is whose; name "
            "its own data by --data-root"
        )
    return evaluate(place(model, numerics), data, numerics, split)


def is_complete(recipe: Recipe, summary: Mapping[str, Any], max_steps: int | None = None) -> bool:
    """Whether a run came to the last step of its recipe, or to `max_steps`, and was not cut short before."""
    if max_steps is not None and summary["steps"] >= max_steps:
        return True
    if recipe.iterations is not None:
        return bool(summary["steps"] >= recipe.iterations)
    return bool(summary["epochs"] >= recipe.epochs)


def default_run_directory(recipe: Recipe) -> Path:
    """runs/<data>-<model>-<six digits of the recipe's SHA-256>-seed<seed>, under the working directory."""
    folder = default_seeds_directory(recipe)
    return folder.with_name(f"{folder.name}-seed{recipe.seed}")


def default_seeds_directory(recipe: Recipe) -> Path:
    """The same without the seed, for several of them."""
    digest = hashlib.sha256(dump_recipe(recipe.model_copy(update={"seed": 0})).encode()).hexdigest()
    return Path("runs") / f"{recipe.data.name}-{recipe.model.name}-{digest[:6]}"
