"""Reward Difference Optimization (RDO): offline preference optimization that also uses how much better a response is."""
