"""The network: token ids in, logits out. Axes, throughout these files:

B batch, L tokens of this call, T tokens seen so far, D hidden size, H query heads, KV key-value heads, d head size,
E experts, K experts per token, F width of an expert, V vocabulary, S expert slots in memory, P token-expert pairs.
"""
