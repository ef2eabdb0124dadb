"""Weights: read files of any origin safely, load them into networks, and find the released ones."""

from engine.weights.load import load_weights, save_weights

__all__ = ["load_weights", "save_weights"]
