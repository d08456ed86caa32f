"""Exact softmax attention of a block of query rows against the keys that it may see."""
