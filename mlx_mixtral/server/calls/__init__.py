"""Calls of tools: how a model is told of functions, how its calls are read, how their results are told."""
