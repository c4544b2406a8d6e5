"""Tables of training and distillation."""

from __future__ import annotations

from typing import Any

from tables.results import drop_of, result_of


def _range(found: dict[str, Any], digits: int) -> str:
    return f"{found['median']:,.{digits}f} [{found['min']:,.{digits}f}, {found['max']:,.{digits}f}]"


def _spread(values: list[float], form: str) -> str:
    """The mean, and smallest to largest if there are several."""
    mean = f"{sum(values) / len(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def training_overhead() -> str:
    """The training loop against a bare one."""
    lines = [
        "| ms per step, median [range] | bare loop | `fit` | ratio, paired | of processor time | added, µs |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result_of("training_loop")["overhead"].items():
        lines.append(
            f"| {name}, batch {row['batch']} | {_range(row['bare'], 2)} | {_range(row['fit'], 2)} | "
            f"{_range(row['ratio'], 3)} | {_range(row['processor_ratio'], 3)} | {_range(row['added_us'], 0)} |"
        )
    return "\n".join(lines)


def training_speed() -> str:
    """Images a second with each option of the schedule."""
    speeds = result_of("training_loop")["images_per_second"]
    base = speeds["float32"]["median"]
    lines = ["| ResNet-20 | images/s, median [range] | x float32 |", "|---|---|---:|"]
    lines += [f"| {name} | {_range(found, 0)} | {found['median'] / base:.2f} |" for name, found in speeds.items()]
    return "\n".join(lines)


def training_machine() -> str:
    """Where the training loop was measured."""
    facts = result_of("training_loop")["environment"]
    flags = [flag for flag in facts["cpu_flags"] if flag.startswith("amx") or "bf16" in flag]
    return (
        f"{facts['cpu']}, {facts['threads']} thread{'s' * (facts['threads'] > 1)}, torch {facts['versions']['torch']}, "
        f"{facts['date'][:10]}; instructions for bfloat16: {', '.join(flags) or 'none'}."
    )


def distillation() -> str:
    """Students from scratch with each loss."""
    result = result_of("distillation")
    rows = [row for row in result["rows"] if row["kind"] == "student"]
    plain = {row["seed"]: row["top1"] for row in rows if row["name"] == "none"}
    lines = [
        "| loss | seeds | top-1, % | gain over labels alone, same seed | processor minutes |",
        "|---|---:|---|---|---:|",
    ]
    for name in dict.fromkeys(row["name"] for row in rows):
        of_name = sorted((row for row in rows if row["name"] == name), key=lambda row: row["seed"])
        gains = [row["top1"] - plain[row["seed"]] for row in of_name]
        gain = "" if name == "none" else _spread(gains, "+.2f")
        minutes = sum(row["processor_seconds"] for row in of_name) / len(of_name) / 60
        label = "labels alone" if name == "none" else name
        top1 = _spread([row["top1"] for row in of_name], ".2f")
        lines.append(f"| {label} | {len(of_name)} | {top1} | {gain} | {minutes:.1f} |")
    return "\n".join(lines)


def distillation_summary() -> str:
    """The rows that the README shows."""
    images, texts = result_of("distillation"), result_of("distillation_text")
    students = [row for row in images["rows"] if row["kind"] == "student"]
    plain = {row["seed"]: row["top1"] for row in students if row["name"] == "none"}
    gains = [row["top1"] - plain[row["seed"]] for row in students if row["name"] == "kd"]
    lines = [
        "| student | teacher | result |",
        "|---|---|---|",
        f"| ResNet-20, new | ResNet-56 | {_spread(gains, '+.2f')} points over labels only (n = {len(gains)}) |",
    ]
    for row in texts["rows"]:
        if row["name"] == "kd":
            alone = next(r for r in texts["rows"] if r["layers"] == row["layers"] and r["name"] == "none")
            shares = [found["student_top1"] / texts["teacher_top1"] for found in (row, alone)]
            lines.append(
                f"| MiniLM, {row['layers']} of 6 layers | MiniLM, SST-2 | {shares[0]:.1%} of the teacher's accuracy; "
                f"without it {shares[1]:.1%} |"
            )
    pruned = {row["name"]: row for row in images["rows"] if row["kind"] == "recovery"}
    lines.append(
        "| ResNet-56 without half of its MACs | the whole one | drop "
        f"{drop_of(pruned['kd'], 'recovered')} points after an epoch; "
        f"labels alone {drop_of(pruned['none'], 'recovered')} |"
    )
    return "\n".join(lines)


def distillation_recovery() -> str:
    """ResNet-56 without half of its work, trained with and without its original."""
    lines = ["| learns from | pruned, untrained | after training | drop [95 % interval] |", "|---|---:|---:|---|"]
    for row in result_of("distillation")["rows"]:
        if row["kind"] == "recovery":
            label = "labels alone" if row["name"] == "none" else "labels and original"
            lines.append(
                f"| {label} | {row['pruned_top1']:.2f} | {row['recovered_top1']:.2f} | {drop_of(row, 'recovered')} |"
            )
    return "\n".join(lines)


def distillation_speed() -> str:
    """The teacher asked each time, and its answers kept."""
    found = result_of("distillation")["speed"]
    medians = {how: sorted(values)[len(values) // 2] for how, values in found["examples_per_second"].items()}
    return (
        f"ResNet-56 teaches ResNet-20: {medians['asked']:.0f} examples per second asked each time, "
        f"{medians['kept']:.0f} with answers kept: {found['ratio']:.2f}x "
        f"({found['ratio_low']:.2f} to {found['ratio_high']:.2f}, "
        f"n = {found['n']} pairs of processes, {found['threads']} thread(s))."
    )


def distillation_text() -> str:
    """MiniLM with fewer layers."""
    result = result_of("distillation_text")
    lines = [
        f"| layers | learns from | top-1, % (teacher {result['teacher_top1']:.2f}) | of the teacher's | "
        "drop [95 % interval] |",
        "|---:|---|---:|---:|---|",
    ]
    for row in result["rows"]:
        label = "labels alone" if row["name"] == "none" else f"labels, {row['name']}"
        share = row["student_top1"] / result["teacher_top1"]
        top1, drop = row["student_top1"], drop_of(row, "student")
        lines.append(f"| {row['layers']} | {label} | {top1:.2f} | {share:.1%} | {drop} |")
    return "\n".join(lines)
