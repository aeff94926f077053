"""What weights and optimiser take on a GPU, computed: full fine-tuning, LoRA and QLoRA under bf16-mixed, by method.

python -m benchmarks.memory [--rank 16]

Activations, the KV cache of samples and fragmentation come on top: some 1 to 4 GB at the configs' lengths. In Markdown.
"""

import argparse

from benchmarks.shapes import Shape

MODELS = {
    "0.5B": (Shape(vocabulary=151_936, hidden=896, layers=24, heads=14, key_value_heads=2, mlp=4_864), 1),
    "1.5B": (Shape(vocabulary=151_936, hidden=1_536, layers=28, heads=12, key_value_heads=2, mlp=8_960), 1),
    "3B": (Shape(vocabulary=151_936, hidden=2_048, layers=36, heads=16, key_value_heads=2, mlp=11_008), 1),
    "7B": (Shape(vocabulary=152_064, hidden=3_584, layers=28, heads=28, key_value_heads=4, mlp=18_944), 2),
}
"""Qwen2.5's shapes, and how many matrices of embeddings each has: one where they are tied."""
TRAINED = 16
"""Bytes of a trained weight: itself, its gradient and AdamW's two moments in float32."""
WHOLE, HALF, QUARTER = 4.0, 2.0, 0.5 + 1 / 64 + 1 / 4096
"""Bytes of a weight in float32, in bfloat16, and in NF4 with its constants in eight bits."""


def adapter(shape: Shape, rank: int) -> int:
    """Weights of an adapter on all linear layers."""
    widths = [(shape.hidden, shape.hidden)] * 2 + [(shape.hidden, shape.key_value_width)] * 2
    widths += [(shape.hidden, shape.mlp)] * 3
    return shape.layers * rank * sum(map(sum, widths))


def gigabytes(shape: Shape, embeddings: int, *, method: str, way: str, rank: int) -> float:
    """Of weights and optimiser; the reward model of RLOO is not in it."""
    body, head = shape.body, embeddings * shape.head
    kept = {"full": WHOLE, "LoRA": HALF, "QLoRA": QUARTER}[way]
    total = body * kept + head * WHOLE
    total += (TRAINED - WHOLE) * (body + head) if way == "full" else TRAINED * adapter(shape, rank)
    if way == "full" and method in (
        "DPO",
        "RLOO",
    ):  # DPO at its validations
        total += WHOLE * (body + head)
    if way != "QLoRA" and method == "RLOO":  # the sampler's copy in bfloat16
        total += HALF * (body + head)
    return total / 1e9


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    rank = parser.parse_args().rank
    ways, methods = ("full", "LoRA", "QLoRA"), ("SFT", "DPO", "RLOO")
    print("| GB | " + " | ".join(f"{method} {way}" for method in methods for way in ways) + " |")
    print("|---" * 10 + "|")
    for name, (shape, embeddings) in MODELS.items():
        cells = [gigabytes(shape, embeddings, method=m, way=w, rank=rank) for m in methods for w in ways]
        print(f"| {name} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
