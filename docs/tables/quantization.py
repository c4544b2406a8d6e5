"""Tables of number formats and quantized models."""

from __future__ import annotations

from typing import Any

from tables.results import drop_of, result_of


def _interval(row: dict[str, Any]) -> str:
    if "drop_points" not in row:
        return ""
    return f"{row['drop_points']:+.2f} [{row['low_points']:+.2f}, {row['high_points']:+.2f}]"


def _minutes(row: dict[str, Any]) -> str:
    return f"{row['processor_seconds'] / 60:.0f}" if "processor_seconds" in row else "not noted"


def _milliseconds(time: dict[str, Any] | None) -> str:
    return f"{time['median']:.2f}" if time else "not timed"


def number_formats() -> str:
    """Signal to noise and bytes of rounded weights, by format, granularity and bits."""
    result = result_of("number_formats")
    bits = sorted({row["bits"] for row in result["rows"]})
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for row in result["rows"]:
        cell = f"{row['sqnr_db']:.1f} ({row['bytes'] / 1000:,.0f})"
        cells.setdefault((row["name"], row["granularity"]), {})[row["bits"]] = cell
    head = f"dB (kB); float32: {result['float32_bytes'] / 1000:,.0f} kB"
    lines = [
        f"| {head} | per | {' | '.join(f'{count} bits' for count in bits)} |",
        f"|---|---|{'---:|' * len(bits)}",
    ]
    for (name, granularity), found in cells.items():
        lines.append(f"| {name} | {granularity} | {' | '.join(found.get(count, '') for count in bits)} |")
    return "\n".join(lines)


def mixed_precision() -> str:
    """ResNet-20 with one width for all layers, and with widths by sensitivity."""
    lines = [
        f"| limit, bits | widths | average bits | top-1 (float {result_of('mixed_precision')['float_top1']:.2f}) "
        "| drop | better than uniform by |",
        "|---:|---|---:|---:|---|---|",
    ]
    for row in result_of("mixed_precision")["rows"]:
        low, high = row["over_uniform_interval_points"]
        better = f"{row['over_uniform_points']:+.2f} [{low:+.2f}, {high:+.2f}]" if row["widths"] != "uniform" else ""
        lines.append(
            f"| {row['limit']} | {row['widths']} | {row['average_bits']:.2f} | {row['quantized_top1']:.2f} | "
            f"{drop_of(row, 'quantized')} | {better} |"
        )
    return "\n".join(lines)


def mixed_precision_seconds() -> str:
    """Processor time of sensitivity."""
    lines = ["| network, measure | seconds |", "|---|---:|"]
    for name, seconds in result_of("mixed_precision")["sensitivity_seconds"].items():
        lines.append(f"| {name} | {seconds['processor']:.1f} |")
    return "\n".join(lines)


def ptq_accuracy() -> str:
    """Every contestant of post-training quantization, a column per network."""
    rows = result_of("ptq_accuracy")["rows"]
    names = list(dict.fromkeys(name for found in rows.values() for name in found))
    lines = [f"| | {' | '.join(f'{depth}, % | drop, points' for depth in rows)} |", "|---|" + "---:|---|" * len(rows)]
    for name in names:
        cells = []
        for found in rows.values():
            row = found.get(name)
            cells.append(f"{row['top1_percent']:.2f} | {_interval(row)}" if row else "not run | ")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def qat_accuracy() -> str:
    """ResNet-20 at few bits, after training and trained."""
    result = result_of("qat_accuracy")
    names = {
        "static": "post-training",
        "lsq": "learned steps, distillation",
        "ste+kd": "fixed ranges, distillation",
        "ste": "fixed ranges, labels",
    }
    lines = [
        f"| bits | | epochs | top-1 (float {result['float_top1']:.2f}) | drop | processor minutes |",
        "|---|---|---:|---:|---|---:|",
    ]
    for row in result["rows"]:
        epochs = row["step"].get("schedule", {}).get("epochs", "")
        lines.append(
            f"| W{row['bits']}A{row['bits']} | {names[row['name']]} | {epochs} | {row['quantized_top1']:.2f} | "
            f"{drop_of(row, 'quantized')} | {_minutes(row)} |"
        )
    return "\n".join(lines)


def charlstm() -> str:
    """The character LSTM: loss and time of every contestant."""
    contestants = result_of("charlstm")["contestants"]
    lines = ["| | bits per character | loss | kB | ms |", "|---|---:|---:|---:|---:|"]
    for name, row in contestants.items():
        if "loss_bits_per_character" in row:
            time = row.get("latency_ms")
            lines.append(
                f"| {name} | {row['bits_per_character']:.4f} | {row['loss_bits_per_character']:+.4f} | "
                f"{row['size_bytes'] / 1000:,.0f} | {_milliseconds(time)} |"
            )
    return "\n".join(lines)


def minilm() -> str:
    """MiniLM on SST-2: time, accuracy and bytes of every contestant."""
    result = result_of("minilm_int8")
    lines = [
        "| | 1 x 32 tokens, ms | 8 x 64 tokens, ms | top-1, % | drop, points [95 % interval] | MB |",
        "|---|---:|---:|---:|---|---:|",
    ]
    for name, small in result["1x32"].items():
        accuracy = result["accuracy"][name]
        lines.append(
            f"| {name} | {small['median']:.2f} | {result['8x64'][name]['median']:.1f} | "
            f"{accuracy['top1_percent']:.2f} | {_interval(accuracy)} | {result['size_bytes'][name] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def minilm_ratios() -> str:
    """Our time over the peers', paired by round."""
    result = result_of("minilm_int8")
    lines = ["| time ratio, below 1 means that tersor is faster | 1 x 32 | 8 x 64 |", "|---|---:|---:|"]
    for pair, small in result["1x32_time_ratio"].items():
        lines.append(f"| {pair} | {small:.3f} | {result['8x64_time_ratio'][pair]:.3f} |")
    return "\n".join(lines)


def quantize_memory() -> str:
    """Memory and time for a BERT of 100 million parameters."""
    rows = result_of("quantize_memory")["rows"]
    size = next(iter(rows.values()))["parameters"] / 1e6
    lines = [f"| BERT, {size:.0f} million parameters | peak memory over the model's own | seconds |", "|---|---:|---:|"]
    lines += [f"| {name} | {row['peak_over_model']:.2f} | {row['seconds']:.1f} |" for name, row in rows.items()]
    return "\n".join(lines)


def quantization_summary() -> str:
    """What each way to fewer bits costs, in one table."""
    lines = ["| model | bits | how | result |", "|---|---|---|---|"]
    post = result_of("ptq_accuracy")["rows"]["ResNet-20"]
    for bits, how, name in (
        ("W8A8", "no data at all", "tersor W8A8 data-free"),
        ("W4A8", "GPTQ, corrected", "tersor W4A8 gptq, mean and variance"),
        ("W4A4", "GPTQ, corrected", "tersor W4A4 gptq, mean and variance"),
    ):
        lines.append(f"| ResNet-20, CIFAR-10 | {bits} | {how} | drop {_interval(post[name])} points |")
    for row in result_of("qat_accuracy")["rows"]:
        if row["name"] == "lsq":
            low, high = row["quantized_interval_points"]
            epochs = row["step"]["schedule"]["epochs"]
            lines.append(
                f"| ResNet-20, CIFAR-10 | W{row['bits']}A{row['bits']} | trained, {epochs} epoch{'s' * (epochs > 1)} | "
                f"drop {row['quantized_drop_points']:+.2f} [{low:+.2f}, {high:+.2f}] points |"
            )
    text = result_of("minilm_int8")
    for runtime, peer in (("onnxruntime", "quantize_dynamic int8"), ("openvino", "nncf openvino int8")):
        name = f"tersor {runtime} static int8"
        ratio = text["1x32_time_ratio"][f"{name} / {peer}"]
        lines.append(
            f"| MiniLM, SST-2 | int8, {runtime} | static | drop {_interval(text['accuracy'][name])} points, time "
            f"{ratio:.2f}x of {peer.removesuffix(' int8')} |"
        )
    lstm, ratios = (result_of("charlstm")[key] for key in ("contestants", "time_ratio"))
    dynamic = lstm["tersor onnxruntime int8-dynamic"]["loss_bits_per_character"]
    faster = 1 / ratios["tersor onnxruntime int8-dynamic / onnxruntime float32"]
    lines.append(
        f"| character LSTM | int8, onnxruntime | dynamic | {dynamic:+.4f} bits per character, {faster:.1f}x faster |"
    )
    losses = [lstm[f"tersor onnxruntime int4-weights, {how}"]["loss_bits_per_character"] for how in ("gptq", "nearest")]
    lines.append(
        f"| character LSTM | int4 weights | GPTQ | {losses[0]:+.4f} bits per character; rounded to nearest "
        f"{losses[1]:+.4f} |"
    )
    return "\n".join(lines)
