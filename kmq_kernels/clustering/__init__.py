"""One-dimensional k-means of weights: the optimum (or a proven distance from it), exact Lloyd, and the equal-width baseline."""

from .kmeans import kmeans, linear_codebook
from .matrices import cluster_matrices
from .outputs import Clusters, OutputProblem, fit_outputs
from .results import Algorithm, ClusteredMatrix, Init, KMeansResult, Scheme

__all__ = [
    "Algorithm",
    "ClusteredMatrix",
    "Clusters",
    "Init",
    "KMeansResult",
    "OutputProblem",
    "Scheme",
    "cluster_matrices",
    "fit_outputs",
    "kmeans",
    "linear_codebook",
]
