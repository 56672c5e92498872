"""Images and their batches: digits, CIFAR-10, CIFAR-100 and SVHN in memory, ImageNet from its files."""

from stochastic_depth_lab.data.augmentation import Augmentation
from stochastic_depth_lab.data.batches import batches, num_batches, part_of_batch
from stochastic_depth_lab.data.catalog import default_data_root, load
from stochastic_depth_lab.data.image_data import ImageData, Split
from stochastic_depth_lab.data.normalization import Normalization
from stochastic_depth_lab.data.pictures import PictureSplit, import_torchvision
from stochastic_depth_lab.errors import DataError

__all__ = [
    "Augmentation",
    "DataError",
    "ImageData",
    "Normalization",
    "PictureSplit",
    "Split",
    "batches",
    "default_data_root",
    "import_torchvision",
    "load",
    "num_batches",
    "part_of_batch",
]
