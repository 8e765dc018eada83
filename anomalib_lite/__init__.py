"""Experiments in visual anomaly detection: Lightning methods, Hydra sweeps, exact metrics."""

__version__ = "0.1.0"
