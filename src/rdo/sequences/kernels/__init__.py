"""Attention over a prefix tree, by device."""
