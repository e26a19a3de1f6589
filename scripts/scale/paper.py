"""`python -m scripts.scale.paper`: what 8, 64 and 1,024 GPUs would do with two models, for docs/scale.md."""

from __future__ import annotations

from minimoe.inspect.cluster import choose
from minimoe.model.config import num_parameters, with_defaults
from minimoe.train.shares import Work

COMMON = {"head_dim": 128, "max_position_embeddings": 4096, "scoring_func": "sigmoid"}
MODELS = {
    "1B-A200M": COMMON
    | {"vocab_size": 32768, "hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 8}
    | {"num_key_value_heads": 2, "num_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 288},
    "30B-A3B": COMMON
    | {"vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32}
    | {"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    | {"tie_word_embeddings": False},
}
BILLIONS = {"1B-A200M": 20, "30B-A3B": 600}  # tokens: 20 for each parameter


def main() -> None:
    head = "model | GPUs | layout | memory of a GPU | sent a step: weights, replicas, tokens | compute, weights, tokens"
    print(f"| {head} | step | time of all tokens |\n|{'---|' * 8}")
    for name, values in MODELS.items():
        values = with_defaults(values)
        for gpus in (8, 64, 1024):
            rows = max(1024, 2 * gpus) if name == "30B-A3B" else max(512, gpus)
            best = choose(
                values, Work(rows, 4096, 2 if name == "30B-A3B" else 8, "muon", name == "30B-A3B"), gpus, "h100"
            )
            tokens = rows * 4096
            hours = BILLIONS[name] * 1e9 / tokens * best.step_seconds / 3600
            sent = ", ".join(f"{part / 1e9:.2f}" for part in best.traffic)
            seconds = ", ".join(
                f"{part:.2f}" for part in (best.compute_seconds, best.weights_seconds, best.tokens_seconds)
            )
            fits = f"{best.memory_bytes / 1e9:.0f} GB" + ("" if best.fits else ", does not fit")
            print(
                f"| {name} | {gpus:,} | {best.layout} | {fits} | {sent} GB | {seconds} s | {best.step_seconds:.2f} s "
                f"for {tokens / 1e6:.1f}M tokens | {hours:,.1f} h for {BILLIONS[name]}B |"
            )
        total, active = (num_parameters(values, active=choice) for choice in (False, True))
        print(f"<!-- {name}: {total / 1e9:.2f}B parameters, {active / 1e9:.2f}B active -->")


if __name__ == "__main__":
    main()
