"""Interleaving NAS (arXiv 2103.07018): K learners over M rounds share one searched architecture."""
