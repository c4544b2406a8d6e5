"""Tables of latency, of runtimes and of whole pipelines."""

from __future__ import annotations

from tables.results import result_of


def int8_latency() -> str:
    """ResNet-56: time, accuracy and bytes of every contestant."""
    result = result_of("int8_peers")
    lines = [
        "| | batch 1, ms | x eager | batch 64, ms | x eager | top-1, % | drop, points [95 % interval] | kB |",
        "|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    for name, small in result["batch_1"].items():
        large, accuracy = result["batch_64"][name], result["accuracy"][name]
        drop = (
            ""
            if "drop_points" not in accuracy
            else (f"{accuracy['drop_points']:+.2f} [{accuracy['low_points']:+.2f}, {accuracy['high_points']:+.2f}]")
        )
        size = result["size_bytes"].get(name)
        lines.append(
            f"| {name} | {small['median']:.2f} | {small['ratio_to_eager']:.1f} | {large['median']:.1f} | "
            f"{large['ratio_to_eager']:.1f} | {accuracy['top1_percent']:.2f} | {drop} | "
            f"{'' if size is None else f'{size / 1000:,.0f}'} |"
        )
    return "\n".join(lines)


def int8_ratios() -> str:
    """Our time over the peers', paired by round."""
    result = result_of("int8_peers")
    lines = ["| time ratio, below 1 means that tersor is faster | batch 1 | batch 64 |", "|---|---:|---:|"]
    for pair, small in result["batch_1_time_ratio"].items():
        lines.append(f"| {pair} | {small:.3f} | {result['batch_64_time_ratio'][pair]:.3f} |")
    return "\n".join(lines)


def int8_compress() -> str:
    """Seconds to compress."""
    result = result_of("int8_peers")
    lines = ["| seconds to compress, export included | median | range | n |", "|---|---:|---|---:|"]
    for name, taken in result["compress_seconds"].items():
        lines.append(f"| {name} | {taken['median']:.1f} | {taken['min']:.1f} to {taken['max']:.1f} | {taken['n']} |")
    ratio = result["compress_ratio"]["tersor / nncf, openvino"]
    return "\n".join([*lines, "", f"Median of the paired ratios tersor / NNCF (OpenVINO): {ratio:.2f}."])


def environment() -> str:
    """Where it was measured."""
    facts = result_of("int8_peers")["environment"]
    has_vnni = any("vnni" in flag for flag in facts["cpu_flags"])
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "onnxruntime", "openvino", "nncf"))
    return (
        f"{facts['cpu']} ({facts['machine']}, {'with' if has_vnni else 'without'} VNNI), {facts['cores']} cores, "
        f"{facts['threads']} threads, {versions}, {facts['date'][:10]}."
    )


def coupling_speed() -> str:
    """Finding, cutting and checking, by size of the model."""
    lines = [
        "| million parameters | coupling s | scoring and surgery s | full verification s "
        "| extra memory per model byte |",
        "|---:|---:|---:|---:|---:|",
    ]
    for row in result_of("coupling_speed")["rows"]:
        lines.append(
            f"| {row['parameters'] / 1e6:.0f} | {row['coupling_s']:.2f} | {row['surgery_s']:.2f} | "
            f"{row['verification_s']:.1f} | {row['extra_memory_per_model_byte']:.2f} |"
        )
    return "\n".join(lines)


def inductor() -> str:
    """A BERT compiled by PyTorch: time and size of every contestant."""
    lines = ["| | ms [quartile distance] | x eager | MB |", "|---|---|---:|---:|"]
    for name, row in result_of("inductor")["models"].items():
        time, size = row["latency_ms"], row.get("size_bytes")
        lines.append(
            f"| {name} | {time['median']:.2f} [{time['iqr']:.2f}] | {row['ratio_to_eager']:.2f} | "
            f"{'' if size is None else f'{size / 1e6:.1f}'} |"
        )
    return "\n".join(lines)


def inductor_layers() -> str:
    """One linear layer with every product that PyTorch has for it."""
    shapes = result_of("inductor")["layers_ms"]
    lines = [f"| | {' | '.join(shapes)} |", f"|---|{'---|' * len(shapes)}"]
    for name in next(iter(shapes.values())):
        rows = [layers[name] for layers in shapes.values()]
        cells = [f"{row['median']:.3f} [{row['best']:.3f}, {row['worst']:.3f}]" for row in rows]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pipelines() -> str:
    """Every preset on ResNet-20."""
    lines = [
        "| preset | drop, points | at most, at 95 % | batch 1, ms (float) | faster | kB (float) | minutes |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in result_of("pipelines")["rows"].items():
        found = row["certificate"]
        lines.append(
            f"| `{name}` | {100 * found['drop']:+.2f} | {100 * found['upper_bound']:.2f} | "
            f"{row['latency_ms']['median']:.2f} ({row['float_latency_ms']:.2f}) | {row['speed_up']:.2f}x | "
            f"{row['size_bytes'] / 1000:,.0f} ({row['float_size_bytes'] / 1000:,.0f}) | {row['seconds'] / 60:.1f} |"
        )
    return "\n".join(lines)
