"""Explanations, one file each: which tokens and heads caused what a model says."""

from regard.explain._faithfulness import Faithfulness, faithfulness
from regard.explain.attn_lrp import AttnLRP
from regard.explain.captum import Captum
from regard.explain.explanation import Explanation
from regard.explain.flow import Flow
from regard.explain.generic_relevance import GenericRelevance
from regard.explain.rollout import Rollout

__all__ = ["AttnLRP", "Captum", "Explanation", "Faithfulness", "Flow", "GenericRelevance", "Rollout", "faithfulness"]
