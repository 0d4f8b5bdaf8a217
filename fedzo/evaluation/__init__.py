"""Scores and per-example losses of a model at theta and theta + a z, and their exact derivatives."""

from fedzo.evaluation.batch import Batch, TokenTargets
from fedzo.evaluation.evaluator import EVALUATIONS, Evaluator, LossRequest, Request
from fedzo.evaluation.gradients import DerivativeRequest, GradientRequest
from fedzo.evaluation.scores import candidate_scores, losses_from_scores

__all__ = [
    "EVALUATIONS",
    "Batch",
    "DerivativeRequest",
    "Evaluator",
    "GradientRequest",
    "LossRequest",
    "Request",
    "TokenTargets",
    "candidate_scores",
    "losses_from_scores",
]
