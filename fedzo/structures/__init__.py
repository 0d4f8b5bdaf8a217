"""Direction structures: step and seed -> z. A new one is one class in one file and one line in `STRUCTURES`."""

from fedzo.structures.base import Frame, Layout, Structure
from fedzo.structures.block_wise import BlockWise
from fedzo.structures.coordinate import Coordinate
from fedzo.structures.isotropic import IsotropicStructure
from fedzo.structures.layer_wise import LayerWise
from fedzo.structures.low_rank import LowRank
from fedzo.structures.subspace import Subspace

STRUCTURES: dict[str, type[Structure]] = {
    "isotropic": IsotropicStructure,
    "block-wise": BlockWise,
    "layer-wise": LayerWise,
    "low-rank": LowRank,
    "subspace": Subspace,
    "coordinate": Coordinate,
}

__all__ = [
    "STRUCTURES",
    "BlockWise",
    "Coordinate",
    "Frame",
    "IsotropicStructure",
    "LayerWise",
    "Layout",
    "LowRank",
    "Structure",
    "Subspace",
]
