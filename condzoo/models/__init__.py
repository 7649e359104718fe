"""The model zoo. Importing this package registers every model in timm's registry."""

from condzoo.models import cifar_preresnet, cifar_resnet, cifar_vgg, imagenet_resnet, mlp
from condzoo.models.initializers import init_weights
from condzoo.models.last_bn_insertion import insert_last_bn
from condzoo.models.registry import create_model, describe, unknown_model

__all__ = [
    "cifar_preresnet",
    "cifar_resnet",
    "cifar_vgg",
    "create_model",
    "describe",
    "imagenet_resnet",
    "init_weights",
    "insert_last_bn",
    "mlp",
    "unknown_model",
]
