"""Trainable spaces: full, adapter, sparse, scales and codes; masks."""

from fedzo.spaces.mask import METHODS, Mask, MaskEntry, overlap
from fedzo.spaces.quantised import codes, scales
from fedzo.spaces.space import Segment, TrainableSpace, adapter, full
from fedzo.spaces.sparse import draw_mask, sparse

__all__ = [
    "METHODS",
    "Mask",
    "MaskEntry",
    "Segment",
    "TrainableSpace",
    "adapter",
    "codes",
    "draw_mask",
    "full",
    "overlap",
    "scales",
    "sparse",
]
