"""Generalisation measures in logarithms, and the report that computes them from a model."""
