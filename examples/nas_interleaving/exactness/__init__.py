"""How exact the hypergradients of an interleaving search are: `python -m examples.nas_interleaving.exactness`."""
