"""Tables of pruned accuracy."""

from __future__ import annotations

from tables.results import drop_of, result_of


def pruning_one_shot() -> str:
    """ResNet-56 with fewer channels, not trained."""
    lines = ["| one shot, no training | MACs, % | top-1 | drop |", "|---|---:|---:|---:|"]
    for row in result_of("pruning_accuracy")["rows"]:
        lines.append(
            f"| {row['name']} | {100 * row['macs']:.1f} | {row['one_shot_top1']:.2f} | {drop_of(row, 'one_shot')} |"
        )
    return "\n".join(lines)


def pruning_trained() -> str:
    """The best of both sides after two epochs."""
    lines = ["| after two epochs | learns from | seed | top-1 | drop |", "|---|---|---:|---:|---:|"]
    for row in sorted(result_of("pruning_training")["rows"], key=lambda row: (row["lesson"], row["seed"], row["side"])):
        drop = drop_of(row, "trained")
        lines.append(f"| {row['name']} | {row['lesson']} | {row['seed']} | {row['trained_top1']:.2f} | {drop} |")
    return "\n".join(lines)
