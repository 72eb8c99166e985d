"""Measuring scorers and policies: plain numbers with their uncertainty, never a bare percentage."""
