"""Settings by name, for searches, retraining and data alike.

What a preset leaves out keeps its default: the method and λ of interleaving, and the device, which no paper can tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_DARTS_SEARCH = {
    "cells": 8,
    "channels": 16,
    "nodes": 4,
    "epochs": 50,
    "momentum": 0.9,
    "weight_decay": 3e-4,
    "grad_clip": 5.0,
    "architecture_weight_decay": 1e-3,
}
_CIFAR_EVALUATION = {
    "retrain_cells": 20,
    "retrain_channels": 36,
    "retrain_epochs": 600,
    "retrain_batch_size": 96,
    "retrain_learning_rate": 0.025,
    "retrain_weight_decay": 3e-4,
    "retrain_auxiliary": 0.4,
    "retrain_cutout": 16,
}

#: The papers' settings are those of their sections on experiments and of the code that their authors published.
#: Steps between validations are about one epoch each.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # For trying things out: a search, and two networks retrained on two tasks each, in a quarter of a minute.
    "cpu-tiny": {
        "cells": 2,
        "channels": 2,
        "nodes": 2,
        "steps": 20,
        "warmup": 5,
        "batch_size": 16,
        "retrain_channels": 4,
        "retrain_cells": 2,
        "retrain_epochs": 2,
    },
    # Everything that DARTS has in small, for images of about 8×8 pixels.
    "cpu-small": {
        "cells": 3,
        "channels": 4,
        "nodes": 4,
        "steps": 200,
        "warmup": 40,
        "batch_size": 32,
        "validate_every": 40,
        "retrain_channels": 8,
        "retrain_cells": 6,
        "retrain_epochs": 20,
        "retrain_auxiliary": 0.4,
        "retrain_drop_path": 0.1,
    },
    # Sizes and lengths at which a table of eight rows and three seeds takes about half an hour on two cores.
    "cpu-table": {
        "image_size": 8,
        "images_per_class": 30,
        "test_images_per_class": 500,
        "augment": False,
        "steps": 140,
        "warmup": 25,
        "channels": 4,
        "cells": 2,
        "nodes": 3,
        "batch_size": 32,
        "validate_every": 35,
        "method": ("finite-difference:epsilon=0.1",),
        "eigenvalue_steps": 5,
        "retrain_channels": 8,
        "retrain_cells": 3,
        "retrain_epochs": 20,
        "retrain_batch_size": 20,
    },
    # Liu, Simonyan and Yang, ICLR 2019, appendix A.
    "darts-cifar": {
        "tasks": ("cifar10", "cifar100"),
        **_DARTS_SEARCH,
        "space": "darts",
        "batch_size": 64,
        "learning_rate": 0.025,
        "min_learning_rate": 0.001,
        "architecture_learning_rate": 3e-4,
        "validate_every": 390,
        **_CIFAR_EVALUATION,
        "retrain_drop_path": 0.2,
    },
    # Xu et al., ICLR 2020, section 4.2.
    "pcdarts-cifar": {
        "tasks": ("cifar10", "cifar100"),
        **_DARTS_SEARCH,
        "space": "pc-darts",
        "partial_channels": 4,
        "warmup_epochs": 15,
        "batch_size": 256,
        "learning_rate": 0.1,
        "min_learning_rate": 0.001,
        "architecture_learning_rate": 6e-4,
        "validate_every": 97,
        **_CIFAR_EVALUATION,
        "retrain_drop_path": 0.3,
    },
    # Chen et al., ICCV 2019, section 4.2; the lengths are those of each of the three phases.
    "pdarts-cifar": {
        "tasks": ("cifar10", "cifar100"),
        **_DARTS_SEARCH,
        "space": "darts",
        "epochs": 25,
        "warmup_epochs": 10,
        "shrink_cells": (5, 11, 17),
        "shrink_operations": (8, 5, 3),
        "skip_dropout": (0.0, 0.4, 0.7),
        "max_skips": 2,
        "batch_size": 96,
        "learning_rate": 0.025,
        "min_learning_rate": 0.0,
        "architecture_learning_rate": 6e-4,
        "validate_every": 260,
        **_CIFAR_EVALUATION,
        "retrain_batch_size": 128,
        "retrain_drop_path": 0.3,
    },
    # Xu et al., ICLR 2020, section 4.3. They search on 160 of the 1300 images of each class, 128 to train the weights
    # and 32 for the architecture, and warm the learning rate up over 5 epochs: for the former images_per_class = 160,
    # in two halves, comes near, but for the search alone.
    "imagenet": {
        "tasks": ("imagenet",),
        "rounds": 1,
        **_DARTS_SEARCH,
        "space": "pc-darts",
        "partial_channels": 2,
        "warmup_epochs": 35,
        "batch_size": 1024,
        "learning_rate": 0.5,
        "min_learning_rate": 0.0,
        "architecture_learning_rate": 6e-3,
        "validate_every": 78,
        "retrain_cells": 14,
        "retrain_channels": 48,
        "retrain_epochs": 250,
        "retrain_batch_size": 1024,
        "retrain_learning_rate": 0.5,
        "retrain_schedule": "linear",
        "retrain_warmup_epochs": 5,
        "retrain_weight_decay": 3e-5,
        "retrain_label_smoothing": 0.1,
        "retrain_auxiliary": 0.4,
    },
}
