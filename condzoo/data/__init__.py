"""Image data sets held in memory, augmented and batched on the device they are on."""

from condzoo.data.arrays import ImageData, LabelledImages, crop_and_resize
from condzoo.data.augment import AUGMENTATIONS
from condzoo.data.batches import BatchPlan, batches_per_epoch, epoch_order, ordered_batches, train_batches
from condzoo.data.counter_random import derived_seed
from condzoo.data.sources import DATASETS, DataInfo, data_info, load_data

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "BatchPlan",
    "DataInfo",
    "ImageData",
    "LabelledImages",
    "batches_per_epoch",
    "crop_and_resize",
    "data_info",
    "derived_seed",
    "epoch_order",
    "load_data",
    "ordered_batches",
    "train_batches",
]
