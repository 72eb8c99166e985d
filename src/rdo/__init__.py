"""Reward Difference Optimization: offline preference optimization that uses how much better a response is."""
