"""Who takes part: the options of each side beside its common ones. The first of a side is its default and its best."""

from typing import Any

Variants = dict[str, dict[str, Any]]

SUITE: dict[str, Variants] = {
    "sft": {
        "suite": {},
        "suite, 3 conversations at a time": {"data": {"batch_size": 3}, "trainer": {"accumulate_grad_batches": 4}},
        "suite, gradient checkpointing": {"model": {"gradient_checkpointing": True}},
    },
    "dpo": {
        "suite": {},
        "suite, a pair at a time": {"data": {"batch_size": 1}, "trainer": {"accumulate_grad_batches": 4}},
        "suite, reference in each step": {"model": {"precompute_reference": False}},
        "suite, gradient checkpointing": {"model": {"gradient_checkpointing": True}},
        "suite, a pair at a time, checkpointing, reference in each step": {
            "data": {"batch_size": 1},
            "trainer": {"accumulate_grad_batches": 4},
            "model": {"precompute_reference": False, "gradient_checkpointing": True},
        },
    },
    "rloo": {
        "suite": {},
        "suite, a prompt at a time": {"data": {"batch_size": 1}, "trainer": {"accumulate_grad_batches": 4}},
        "suite, gradient checkpointing": {"model": {"gradient_checkpointing": True}},
    },
    "generation": {
        "suite": {},
    },
}

BLOCKS = {"packing": True, "max_length": 1_024}
BY_FOUR = {"gradient_accumulation_steps": 4}

TRL: dict[str, Variants] = {
    "sft": {
        "TRL, packing, a block at a time": {**BLOCKS, "per_device_train_batch_size": 1},
        "TRL, packing, shorter blocks": {"packing": True, "max_length": 512, "per_device_train_batch_size": 1},
        "TRL, packing": BLOCKS,
        "TRL, packing and checkpointing": {**BLOCKS, "gradient_checkpointing": True},
        "TRL, batches of 4 of like length": {"per_device_train_batch_size": 4},
        "TRL, one padded batch": {},
    },
    "dpo": {
        "TRL, precomputed reference": {"precompute_ref_log_probs": True},
        "TRL, precomputed reference, a pair at a time": {
            "precompute_ref_log_probs": True,
            "per_device_train_batch_size": 1,
            **BY_FOUR,
        },
        "TRL, reference in each step": {},
    },
    "rloo": {
        "TRL": {},
        "TRL, a prompt at a time": {"per_device_train_batch_size": 4, **BY_FOUR},
        "TRL, static cache": {"cache_implementation": "static"},
    },
    "generation": {
        "generate": {},
        "generate, static cache": {"cache_implementation": "static"},
    },
}
