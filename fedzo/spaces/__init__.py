"""Trainable spaces: full, adapter and sparse."""

from fedzo.spaces.space import Segment, TrainableSpace, adapter, full
from fedzo.spaces.sparse import METHODS, load_mask, save_mask, sparse

__all__ = ["METHODS", "Segment", "TrainableSpace", "adapter", "full", "load_mask", "save_mask", "sparse"]
