"""Scores and per-example losses of a model at theta and theta + a z."""

from fedzo.evaluation.batch import Batch, TokenTargets
from fedzo.evaluation.evaluator import EVALUATIONS, Evaluator, LossRequest
from fedzo.evaluation.scores import candidate_scores, losses_from_scores

__all__ = ["EVALUATIONS", "Batch", "Evaluator", "LossRequest", "TokenTargets", "candidate_scores", "losses_from_scores"]
