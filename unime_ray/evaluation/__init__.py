"""Measuring: every embedder and reranker of a run on its test splits, and the judges against a truth table."""

from unime_ray.evaluation.evaluate import run_evaluate
from unime_ray.evaluation.results import render_results, results_table

__all__ = ["render_results", "results_table", "run_evaluate"]
