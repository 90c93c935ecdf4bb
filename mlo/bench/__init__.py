"""The benchmark of hypergradient approximations, beside other libraries: `python -m mlo.bench`."""
