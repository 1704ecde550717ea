"""One-dimensional k-means of weights: the optimum (or a proven distance from it), exact Lloyd, and the equal-width baseline."""

from .kmeans import kmeans, linear_codebook
from .matrices import cluster_matrices
from .results import Algorithm, ClusteredMatrix, Init, KMeansResult, Scheme

__all__ = ["Algorithm", "ClusteredMatrix", "Init", "KMeansResult", "Scheme", "cluster_matrices", "kmeans", "linear_codebook"]
