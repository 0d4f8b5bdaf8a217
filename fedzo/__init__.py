"""fedzo: federated, private zeroth-order fine-tuning of language models.

A direction is a 64-bit seed, a client's answer is one scalar for each direction, and the fine-tuned model is a pure
function of the base model and the ledger of (seed, scalar) records.
"""

import os

# MKL's default code paths give other bits with one thread than with two; read once, at MKL's first call.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
# Read when torch loads: OpenMP threads that spin between two layers hold the cores that the next direction needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
