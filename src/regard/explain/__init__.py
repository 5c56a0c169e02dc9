"""Explanations, one file each: which tokens and heads caused what a model says."""

from regard.explain.explanation import Explanation
from regard.explain.generic_relevance import GenericRelevance
from regard.explain.rollout import Rollout

__all__ = ["Explanation", "GenericRelevance", "Rollout"]
