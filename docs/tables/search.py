"""Tables of searches."""

from __future__ import annotations

from tables.results import result_of


def search_resnet56() -> str:
    """The planner's winner beside both peers and the whole model."""
    compared = result_of("search_resnet56")["compared"]
    lines = [
        f"| batch 1, n = {compared['n']:,} images | ms | of the fastest peer | top-1, % "
        "| drop, points [95 % interval] |",
        "|---|---:|---:|---:|---|",
    ]
    for name, row in compared["rows"].items():
        interval = f"{row['drop_points']:+.2f} [{row['low_points']:+.2f}, {row['high_points']:+.2f}]"
        lines.append(
            f"| {name} | {row['latency_ms']['median']:.2f} | {row['of_fastest_peer']:.2f}x | "
            f"{row['top1_percent']:.2f} | {interval} |"
        )
    return "\n".join(lines)


def search_resnet56_told() -> str:
    """What the search was allowed, what it proved, and how well its table predicted."""
    found = result_of("search_resnet56")
    record, proof = found["search"], found["certificate"]
    finished = [trial for trial in record["trials"] if trial["status"] == "finished"]
    first = [trial for trial in finished if trial["rung"] == 0 and trial["predicted_ms"]]  # later rungs are timed once
    errors = sorted(abs(trial["predicted_ms"] / trial["latency_ms"] - 1) for trial in first)
    tested = f"at most {100 * proof['upper_bound']:.2f} at {proof['confidence']:.0%} confidence"
    tested += f", tested at {proof['level']:.2%} ({found['verdict']} at {100 * found['max_drop']:g})"
    return (
        f"{record['seconds'] / 60:.0f} minutes of search, {len(finished)} trials, {record['decisions']} decisions. "
        f"Drop on the certify split {100 * proof['drop']:+.2f} points, {tested}. Latency predicted before it was "
        f"measured: median error {errors[len(errors) // 2]:.1%}, n = {len(errors)}."
    )
