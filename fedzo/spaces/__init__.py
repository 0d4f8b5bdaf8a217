"""Trainable spaces: full, adapter and sparse; masks."""

from fedzo.spaces.mask import METHODS, Mask, MaskEntry, overlap
from fedzo.spaces.space import Segment, TrainableSpace, adapter, full
from fedzo.spaces.sparse import draw_mask, sparse

__all__ = [
    "METHODS",
    "Mask",
    "MaskEntry",
    "Segment",
    "TrainableSpace",
    "adapter",
    "draw_mask",
    "full",
    "overlap",
    "sparse",
]
