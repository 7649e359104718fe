"""Experiments made small: two steps on the embedded digits, shallow networks, one seed."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest

from condzoo.experiments import Experiment, load_experiment
from condzoo.experiments.loading import parse_experiment, training_of

SHALLOW = [
    (r"^resnet\d+", "cifar_resnet8"),
    (r"(mlp)\d+x\d+", r"\g<1>4x24"),
    (r"(cifar_(?:pre)?(?:resnet|vgg))\d{2,}(?!\d)", r"\g<1>8"),
]
TINY_SCALE = {
    "minutes": 0.1,
    "hardware": "any",
    "seeds": [1],
    "reductions": ["two steps on digits"],
    "recipe": {"iterations": 2, "data.name": "digits", "data.batch_size": 32, "log_every": 1, "precision": "fp32"},
}


def shallow(value: Any) -> Any:
    """Names of deep networks, anywhere in nested tables, made those of shallow ones; the 16-layer VGG stays."""
    if isinstance(value, dict):
        return {key: shallow(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shallow(item) for item in value]
    if isinstance(value, str) and value != "cifar_vgg16":
        for pattern, replacement in SHALLOW:
            value = re.sub(pattern, replacement, value)
    return value


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Experiment]:
    """Makes an experiment of recipes/paper/ tiny, and with it the one whose runs it shows."""

    def shrink(experiment: Experiment) -> Experiment:
        tables = experiment.model_dump(exclude_none=True)
        tables["scales"] = {"cpu": copy.deepcopy(TINY_SCALE)}
        if "training" in tables:
            training = tables["training"] = {**tables["training"], "runs": shallow(tables["training"]["runs"])}
            training["recipe"] = shallow(training["recipe"])
            if training["recipe"].get("probe"):
                tables["scales"]["cpu"]["recipe"]["probe.every"] = 1
            if training["recipe"].get("model", {}).get("name") == "cifar_vgg16":  # its five poolings need 32 pixels
                tables["scales"]["cpu"]["recipe"] |= {"data.resize": 32, "data.batch_size": 8}
                monkeypatch.setattr("condzoo.models.cifar_vgg.GROUP_WIDTHS", (4, 4, 4, 4, 4))
            training["recipe"].get("model", {}).pop("args", None)  # of timm's networks
            for run in training["runs"]:
                run["grid"] = {field: values[:1] for field, values in run["grid"].items()}
                own = {"data.name", "data.batch_size", "model.args"} & set(run["set"])
                run["set"] = {field: value for field, value in run["set"].items() if field not in own}
        elif "initialization" in tables:
            tables["scales"]["cpu"]["settings"] = {"examples": 24, "data": {"name": "digits", "resize": 4}}
            tables["scales"]["cpu"]["recipe"] = {}
            models = tables["initialization"]["models"]  # a Hessian costs as many backward passes as weights
            models |= {label: re.sub(r"mlp\d+x\d+", "mlp3x8", model) for label, model in models.items()}
        elif "theory" in tables:
            tables["scales"]["cpu"] |= {"settings": {"trials": 2}, "recipe": {}}
        else:
            sizes = {"examples": [4, 8], "layers": [3, 4], "widths": [4, 8], "repeats": 1}
            tables["scales"]["cpu"] |= {"settings": sizes, "recipe": {}}
        return parse_experiment(tables, experiment.id)

    def make(name: str) -> Experiment:
        experiment = load_experiment(name)
        owner = shrink(training_of(experiment))
        monkeypatch.setattr("condzoo.experiments.loading.load_experiment", lambda _: owner)
        return shrink(experiment)

    return make
