"""Figures of a search, each from what its run folder holds."""
