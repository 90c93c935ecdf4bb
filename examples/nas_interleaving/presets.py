"""Settings by name, for searches, retraining and data alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # Sizes and lengths at which a table of eight rows and three seeds takes about half an hour on two cores.
    "cpu-table": {
        "image_size": 8,
        "images_per_class": 100,
        "test_images_per_class": 500,
        "augment": False,
        "steps": 100,
        "warmup": 20,
        "channels": 4,
        "cells": 2,
        "nodes": 3,
        "batch_size": 32,
        "validate_every": 25,
        "retrain_channels": 8,
        "retrain_cells": 3,
        "retrain_epochs": 10,
    },
}
