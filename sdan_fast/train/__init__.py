"""Training SDAN on pairs that are made of pictures: `sdan-fast train`, and the same from Python."""

from .loop import DivergedError, Progress, Settings, TrainingError, train
from .metrics import psnr_y
from .patches import Patches, downscale

__all__ = [
    "DivergedError",
    "Patches",
    "Progress",
    "Settings",
    "TrainingError",
    "downscale",
    "psnr_y",
    "train",
]
