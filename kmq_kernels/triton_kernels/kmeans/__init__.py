"""Clustering on the GPU: histograms, solving their points, whole rows, and the plan that launches them."""

from .plan import UNRESOLVED_FAULT, Plan, kmeans

__all__ = ["UNRESOLVED_FAULT", "Plan", "kmeans"]
