"""condzoo: why does this network train badly, and which layer is it?

A model zoo in timm's registry, a layer-wise conditioning probe for any PyTorch network, training recipes, and
released checkpoints with their measured conditioning (arXiv:2002.10801).

Names are imported when they are first used, so that `import condzoo` stays fast and does not import torch.
"""

from importlib import import_module

TYPE_CHECKING = False  # as typing's, without the time that importing typing takes

__version__ = "0.1.0"

# public name -> the module that defines it
_DEFINED_IN = {
    "list_models": "condzoo.catalog",
    "model_info": "condzoo.catalog",
    "ModelInfo": "condzoo.catalog",
    "create_model": "condzoo.models",
    "init_weights": "condzoo.models",
    "insert_last_bn": "condzoo.models",
    "measure": "condzoo.probe",
    "Probe": "condzoo.probe",
    "curvature": "condzoo.probe",
    "spectrum": "condzoo.probe",
    "condition_number": "condzoo.probe",
    "Conditioning": "condzoo.probe",
    "LayerConditioning": "condzoo.probe",
    "Spectrum": "condzoo.probe",
    "validate": "condzoo.validation",
    "Validation": "condzoo.validation",
    "load_recipe": "condzoo.training",
    "train": "condzoo.training",
    "load_checkpoint": "condzoo.checkpoints",
    "verify_checkpoint": "condzoo.checkpoints",
    "list_checkpoints": "condzoo.checkpoints",
}

# `condzoo.probe.top_curvature` needs no import of its own
_PACKAGES = ("checkpoints", "data", "integrations", "models", "probe", "training", "validation")

__all__ = [*_DEFINED_IN, "__version__"]

if TYPE_CHECKING:
    from condzoo.catalog import ModelInfo, list_models, model_info
    from condzoo.checkpoints import list_checkpoints, load_checkpoint, verify_checkpoint
    from condzoo.models import create_model, init_weights, insert_last_bn
    from condzoo.probe import (
        Conditioning,
        LayerConditioning,
        Probe,
        Spectrum,
        condition_number,
        curvature,
        measure,
        spectrum,
    )
    from condzoo.training import load_recipe, train
    from condzoo.validation import Validation, validate


def __getattr__(name: str) -> object:
    if name in _PACKAGES:
        return import_module(f"condzoo.{name}")
    if name not in _DEFINED_IN:
        raise AttributeError(f"module 'condzoo' has no attribute {name!r}")
    value = getattr(import_module(_DEFINED_IN[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_PACKAGES])
