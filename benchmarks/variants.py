"""Who takes part: the options of each side beside its common ones. The first of a side is its default and its best."""

from typing import Any

Variants = dict[str, dict[str, Any]]

SUITE: dict[str, Variants] = {
    "sft": {
        "suite": {},
        "suite, gradient checkpointing": {"model": {"gradient_checkpointing": True}},
    },
    "dpo": {
        "suite": {},
        "suite, gradient checkpointing": {"model": {"gradient_checkpointing": True}},
    },
    "rloo": {
        "suite": {},
        "suite, gradient checkpointing": {"model": {"gradient_checkpointing": True}},
    },
    "generation": {
        "suite": {},
    },
}

TRL: dict[str, Variants] = {
    "sft": {
        "TRL, packing": {"packing": True, "max_length": 1_024},
        "TRL, packing, a block at a time": {"packing": True, "max_length": 1_024, "per_device_train_batch_size": 1},
        "TRL, batches of 4 of like length": {"per_device_train_batch_size": 4},
        "TRL, one padded batch": {},
        "TRL, packing and checkpointing": {"packing": True, "max_length": 1_024, "gradient_checkpointing": True},
    },
    "dpo": {
        "TRL, precomputed reference": {"precompute_ref_log_probs": True},
        "TRL, reference in each step": {},
    },
    "rloo": {
        "TRL": {},
        "TRL, static cache": {"cache_implementation": "static"},
    },
    "generation": {
        "generate": {},
        "generate, static cache": {"cache_implementation": "static"},
    },
}
