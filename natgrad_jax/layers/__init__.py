"""Rows of a Jacobian in factors: activations and sensitivities, captured from any JAX function."""

from natgrad_jax.layers.capture import BoundRuleError, Captured, Plan, capture, rows

__all__ = ["BoundRuleError", "Captured", "Plan", "capture", "rows"]
