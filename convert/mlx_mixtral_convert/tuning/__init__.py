"""Codes, scales and biases by gradient: each part of a layer learns to give what the unquantised model gives there."""
