"""Our sampler against transformers' ``generate``: the same prompts and lengths, interleaved in one run.

python benchmarks/sampling.py [--device cuda] [--rounds 5]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from lightning_modules.generation import sample_completions

NO_TOKEN = 10**9  # a stop token that no model has, so that both sides write to the limit


def random_model(device: str) -> PreTrainedModel:
    """A Qwen2 of 19 million parameters with random weights."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32_768,
        hidden_size=256,
        intermediate_size=1_024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model: PreTrainedModel = Qwen2ForCausalLM(config)
    return model.to(device).eval()  # type: ignore[arg-type]


def seconds(work: Callable[[], object], device: str) -> float:
    """How long the work takes, the device's queue included."""
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Print tokens a second of both sides for each round, and the ratio's median and range."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    options = parser.parse_args()
    model = random_model(options.device)
    prompts = list(torch.randint(0, 32_768, (options.rows, 48), generator=torch.Generator().manual_seed(1)))
    batch = torch.stack(prompts).to(options.device)

    def ours() -> object:
        return sample_completions(
            model,
            prompts,
            max_completion_length=options.length,
            stop_token_ids=[NO_TOKEN],
            seeds=range(options.rows),
        )

    def theirs() -> object:
        return model.generate(  # type: ignore[operator]
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=options.length,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            eos_token_id=None,
            pad_token_id=0,
        )

    for warm_up in (ours, theirs):
        warm_up()
    tokens = options.rows * options.length
    print(f"{tokens} tokens a round, {torch.get_num_threads()} threads, torch {torch.__version__}, {options.device}")
    ratios = []
    for round_ in range(options.rounds):
        first, second = seconds(ours, options.device), seconds(theirs, options.device)
        ratios.append(second / first)
        rates = f"ours {tokens / first:7.0f} tokens/s, generate {tokens / second:7.0f}"
        print(f"round {round_ + 1}: {rates}, ratio {ratios[-1]:.2f}")
    print(f"ratio: median {statistics.median(ratios):.2f}, range {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
