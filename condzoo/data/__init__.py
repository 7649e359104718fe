"""Image data sets: in memory on the device they are trained on, or on disk and decoded by workers."""

from condzoo.data.arrays import LabelledImages, crop_and_resize
from condzoo.data.augment import AUGMENTATIONS
from condzoo.data.batches import Batch, BatchPlan, DataSet, Split, batches_per_epoch, epoch_order
from condzoo.data.counter_random import derived_seed
from condzoo.data.image_folder import check_images
from condzoo.data.memory import ImageData
from condzoo.data.sources import DATASETS, HUB, IMAGE_FOLDER, DataInfo, data_info, folder_view, load_data
from condzoo.data.stored import StoredData, unreadable_images

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "HUB",
    "IMAGE_FOLDER",
    "Batch",
    "BatchPlan",
    "DataInfo",
    "DataSet",
    "ImageData",
    "LabelledImages",
    "Split",
    "StoredData",
    "batches_per_epoch",
    "check_images",
    "crop_and_resize",
    "data_info",
    "derived_seed",
    "epoch_order",
    "folder_view",
    "load_data",
    "unreadable_images",
]
