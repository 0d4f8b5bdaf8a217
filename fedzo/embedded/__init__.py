"""The embedded default: the toy model "fedzo-toy" and its toy data set of generated reviews (see README.md here)."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
DATA = Path(__file__).parent / "data"
