"""Data sets by name: where they lie, how they are read, split and augmented."""
