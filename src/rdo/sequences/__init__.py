"""Token sequences with shared prefixes, through a model: layouts, attention, read-outs."""
