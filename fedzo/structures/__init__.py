"""Direction structures: step and seed -> z. A new one is one class in one file and one line in `STRUCTURES`."""

from fedzo.structures.base import Frame, Layout, Structure
from fedzo.structures.isotropic import IsotropicStructure

STRUCTURES: dict[str, type[Structure]] = {"isotropic": IsotropicStructure}

__all__ = ["STRUCTURES", "Frame", "IsotropicStructure", "Layout", "Structure"]
