"""Checks the documentation: links lead somewhere, and numbers stand in the benchmark results they claim to come from.

    python docs/check.py            # fails if something is wrong
    python docs/check.py --write    # renders the numbers anew from benchmarks/results

A block between `<!-- numbers: NAME -->` and `<!-- end -->` is rendered by the function of that name below.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
LINK = re.compile(r"\[[^\]]*\]\((?!https?://|#|mailto:)([^)#\s]+)")
BLOCK = re.compile(r"(<!-- numbers: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def _result(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def int8_latency() -> str:
    """ResNet-56: time, accuracy and bytes of every contestant."""
    result = _result("int8_peers")
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
    result = _result("int8_peers")
    lines = ["| time ratio, below 1 means that tersor is faster | batch 1 | batch 64 |", "|---|---:|---:|"]
    for pair, small in result["batch_1_time_ratio"].items():
        lines.append(f"| {pair} | {small:.3f} | {result['batch_64_time_ratio'][pair]:.3f} |")
    return "\n".join(lines)


def int8_compress() -> str:
    """Seconds to compress."""
    result = _result("int8_peers")
    lines = ["| seconds to compress, export included | median | range | n |", "|---|---:|---|---:|"]
    for name, taken in result["compress_seconds"].items():
        lines.append(f"| {name} | {taken['median']:.1f} | {taken['min']:.1f} to {taken['max']:.1f} | {taken['n']} |")
    ratio = result["compress_ratio"]["tersor / nncf, openvino"]
    return "\n".join([*lines, "", f"Median of the paired ratios tersor / NNCF (OpenVINO): {ratio:.2f}."])


def environment() -> str:
    """Where it was measured."""
    facts = _result("int8_peers")["environment"]
    has_vnni = any("vnni" in flag for flag in facts["cpu_flags"])
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "onnxruntime", "openvino", "nncf"))
    return (
        f"{facts['cpu']} ({facts['machine']}, {'with' if has_vnni else 'without'} VNNI), {facts['cores']} cores, "
        f"{facts['threads']} threads, {versions}, {facts['date'][:10]}."
    )


def _drop(row: dict[str, Any], prefix: str) -> str:
    low, high = row[f"{prefix}_interval_points"]
    return f"{row[f'{prefix}_drop_points']:+.2f} [{low:+.2f}, {high:+.2f}]"


def pruning_one_shot() -> str:
    """ResNet-56 with fewer channels, not trained."""
    lines = ["| one shot, no training | MACs, % | top-1 | drop |", "|---|---:|---:|---:|"]
    for row in _result("pruning_accuracy")["rows"]:
        lines.append(
            f"| {row['name']} | {100 * row['macs']:.1f} | {row['one_shot_top1']:.2f} | {_drop(row, 'one_shot')} |"
        )
    return "\n".join(lines)


def pruning_trained() -> str:
    """The best of both sides after two epochs."""
    lines = ["| after two epochs | learns from | seed | top-1 | drop |", "|---|---|---:|---:|---:|"]
    for row in sorted(_result("pruning_training")["rows"], key=lambda row: (row["lesson"], row["seed"], row["side"])):
        lines.append(
            f"| {row['name']} | {row['lesson']} | {row['seed']} | {row['trained_top1']:.2f} | {_drop(row, 'trained')} |"
        )
    return "\n".join(lines)


def coupling_speed() -> str:
    """Finding, cutting and checking, by size of the model."""
    lines = [
        "| million parameters | coupling s | scoring and surgery s | full verification s "
        "| extra memory per model byte |",
        "|---:|---:|---:|---:|---:|",
    ]
    for row in _result("coupling_speed")["rows"]:
        lines.append(
            f"| {row['parameters'] / 1e6:.0f} | {row['coupling_s']:.2f} | {row['surgery_s']:.2f} | "
            f"{row['verification_s']:.1f} | {row['extra_memory_per_model_byte']:.2f} |"
        )
    return "\n".join(lines)


def number_formats() -> str:
    """Signal to noise and bytes of rounded weights, by format, granularity and bits."""
    result = _result("number_formats")
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
        f"| limit, bits | widths | average bits | top-1 (float {_result('mixed_precision')['float_top1']:.2f}) | drop "
        "| better than uniform by |",
        "|---:|---|---:|---:|---|---|",
    ]
    for row in _result("mixed_precision")["rows"]:
        low, high = row["over_uniform_interval_points"]
        better = f"{row['over_uniform_points']:+.2f} [{low:+.2f}, {high:+.2f}]" if row["widths"] != "uniform" else ""
        lines.append(
            f"| {row['limit']} | {row['widths']} | {row['average_bits']:.2f} | {row['quantized_top1']:.2f} | "
            f"{_drop(row, 'quantized')} | {better} |"
        )
    return "\n".join(lines)


def mixed_precision_seconds() -> str:
    """Processor time of sensitivity."""
    lines = ["| network, measure | seconds |", "|---|---:|"]
    for name, seconds in _result("mixed_precision")["sensitivity_seconds"].items():
        lines.append(f"| {name} | {seconds['processor']:.1f} |")
    return "\n".join(lines)


def ptq_accuracy() -> str:
    """Every contestant of post-training quantization, a column per network."""
    rows = _result("ptq_accuracy")["rows"]
    names = list(dict.fromkeys(name for found in rows.values() for name in found))
    lines = [f"| | {' | '.join(f'{depth}, % | drop, points' for depth in rows)} |", "|---|" + "---:|---|" * len(rows)]
    for name in names:
        cells = []
        for found in rows.values():
            row = found.get(name)
            cells.append(f"{row['top1_percent']:.2f} | {_interval(row)}" if row else "not run | ")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(row: dict[str, Any]) -> str:
    if "drop_points" not in row:
        return ""
    return f"{row['drop_points']:+.2f} [{row['low_points']:+.2f}, {row['high_points']:+.2f}]"


def qat_accuracy() -> str:
    """ResNet-20 at few bits, after training and trained."""
    result = _result("qat_accuracy")
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
            f"{_drop(row, 'quantized')} | {_minutes(row)} |"
        )
    return "\n".join(lines)


def _minutes(row: dict[str, Any]) -> str:
    return f"{row['processor_seconds'] / 60:.0f}" if "processor_seconds" in row else "not noted"


def charlstm() -> str:
    """The character LSTM: loss and time of every contestant."""
    contestants = _result("charlstm")["contestants"]
    lines = ["| | bits per character | loss | kB | ms |", "|---|---:|---:|---:|---:|"]
    for name, row in contestants.items():
        if "loss_bits_per_character" in row:
            time = row.get("latency_ms")
            lines.append(
                f"| {name} | {row['bits_per_character']:.4f} | {row['loss_bits_per_character']:+.4f} | "
                f"{row['size_bytes'] / 1000:,.0f} | {_milliseconds(time)} |"
            )
    return "\n".join(lines)


def inductor() -> str:
    """A BERT compiled by PyTorch: time and size of every contestant."""
    lines = ["| | ms [quartile distance] | x eager | MB |", "|---|---|---:|---:|"]
    for name, row in _result("inductor")["models"].items():
        time, size = row["latency_ms"], row.get("size_bytes")
        lines.append(
            f"| {name} | {time['median']:.2f} [{time['iqr']:.2f}] | {row['ratio_to_eager']:.2f} | "
            f"{'' if size is None else f'{size / 1e6:.1f}'} |"
        )
    return "\n".join(lines)


def inductor_layers() -> str:
    """One linear layer with every product that PyTorch has for it."""
    shapes = _result("inductor")["layers_ms"]
    lines = [f"| | {' | '.join(shapes)} |", f"|---|{'---|' * len(shapes)}"]
    for name in next(iter(shapes.values())):
        rows = [layers[name] for layers in shapes.values()]
        cells = [f"{row['median']:.3f} [{row['best']:.3f}, {row['worst']:.3f}]" for row in rows]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _milliseconds(time: dict[str, Any] | None) -> str:
    return f"{time['median']:.2f}" if time else "not timed"


def minilm() -> str:
    """MiniLM on SST-2: time, accuracy and bytes of every contestant."""
    result = _result("minilm_int8")
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
    result = _result("minilm_int8")
    lines = ["| time ratio, below 1 means that tersor is faster | 1 x 32 | 8 x 64 |", "|---|---:|---:|"]
    for pair, small in result["1x32_time_ratio"].items():
        lines.append(f"| {pair} | {small:.3f} | {result['8x64_time_ratio'][pair]:.3f} |")
    return "\n".join(lines)


def quantize_memory() -> str:
    """Memory and time for a BERT of 100 million parameters."""
    rows = _result("quantize_memory")["rows"]
    size = next(iter(rows.values()))["parameters"] / 1e6
    lines = [f"| BERT, {size:.0f} million parameters | peak memory over the model's own | seconds |", "|---|---:|---:|"]
    lines += [f"| {name} | {row['peak_over_model']:.2f} | {row['seconds']:.1f} |" for name, row in rows.items()]
    return "\n".join(lines)


def _range(found: dict[str, Any], digits: int) -> str:
    return f"{found['median']:,.{digits}f} [{found['min']:,.{digits}f}, {found['max']:,.{digits}f}]"


def training_overhead() -> str:
    """The training loop against a bare one."""
    lines = [
        "| ms per step, median [range] | bare loop | `fit` | ratio, paired | of processor time | added, µs |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in _result("training_loop")["overhead"].items():
        lines.append(
            f"| {name}, batch {row['batch']} | {_range(row['bare'], 2)} | {_range(row['fit'], 2)} | "
            f"{_range(row['ratio'], 3)} | {_range(row['processor_ratio'], 3)} | {_range(row['added_us'], 0)} |"
        )
    return "\n".join(lines)


def training_speed() -> str:
    """Images a second with each option of the schedule."""
    speeds = _result("training_loop")["images_per_second"]
    base = speeds["float32"]["median"]
    lines = ["| ResNet-20 | images/s, median [range] | x float32 |", "|---|---|---:|"]
    lines += [f"| {name} | {_range(found, 0)} | {found['median'] / base:.2f} |" for name, found in speeds.items()]
    return "\n".join(lines)


def training_machine() -> str:
    """Where the training loop was measured."""
    facts = _result("training_loop")["environment"]
    flags = [flag for flag in facts["cpu_flags"] if flag.startswith("amx") or "bf16" in flag]
    return (
        f"{facts['cpu']}, {facts['threads']} thread{'s' * (facts['threads'] > 1)}, torch {facts['versions']['torch']}, "
        f"{facts['date'][:10]}; instructions for bfloat16: {', '.join(flags) or 'none'}."
    )


def quantization_summary() -> str:
    """What each way to fewer bits costs, in one table."""
    lines = ["| model | bits | how | result |", "|---|---|---|---|"]
    post = _result("ptq_accuracy")["rows"]["ResNet-20"]
    for bits, how, name in (
        ("W8A8", "no data at all", "tersor W8A8 data-free"),
        ("W4A8", "GPTQ, corrected", "tersor W4A8 gptq, mean and variance"),
        ("W4A4", "GPTQ, corrected", "tersor W4A4 gptq, mean and variance"),
    ):
        lines.append(f"| ResNet-20, CIFAR-10 | {bits} | {how} | drop {_interval(post[name])} points |")
    for row in _result("qat_accuracy")["rows"]:
        if row["name"] == "lsq":
            low, high = row["quantized_interval_points"]
            epochs = row["step"]["schedule"]["epochs"]
            lines.append(
                f"| ResNet-20, CIFAR-10 | W{row['bits']}A{row['bits']} | trained, {epochs} epoch{'s' * (epochs > 1)} | "
                f"drop {row['quantized_drop_points']:+.2f} [{low:+.2f}, {high:+.2f}] points |"
            )
    text = _result("minilm_int8")
    for runtime, peer in (("onnxruntime", "quantize_dynamic int8"), ("openvino", "nncf openvino int8")):
        name = f"tersor {runtime} static int8"
        ratio = text["1x32_time_ratio"][f"{name} / {peer}"]
        lines.append(
            f"| MiniLM, SST-2 | int8, {runtime} | static | drop {_interval(text['accuracy'][name])} points, time "
            f"{ratio:.2f}x of {peer.removesuffix(' int8')} |"
        )
    lstm, ratios = (_result("charlstm")[key] for key in ("contestants", "time_ratio"))
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


def distillation() -> str:
    """Students from scratch with each loss."""
    result = _result("distillation")
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


def _spread(values: list[float], form: str) -> str:
    """The mean, and smallest to largest if there are several."""
    mean = f"{sum(values) / len(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def distillation_summary() -> str:
    """The rows that the README shows."""
    images, texts = _result("distillation"), _result("distillation_text")
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
        f"| ResNet-56 without half of its MACs | the whole one | drop {_drop(pruned['kd'], 'recovered')} points after "
        f"an epoch; labels alone {_drop(pruned['none'], 'recovered')} |"
    )
    return "\n".join(lines)


def distillation_recovery() -> str:
    """ResNet-56 without half of its work, trained with and without its original."""
    lines = ["| learns from | pruned, untrained | after training | drop [95 % interval] |", "|---|---:|---:|---|"]
    for row in _result("distillation")["rows"]:
        if row["kind"] == "recovery":
            label = "labels alone" if row["name"] == "none" else "labels and original"
            lines.append(
                f"| {label} | {row['pruned_top1']:.2f} | {row['recovered_top1']:.2f} | {_drop(row, 'recovered')} |"
            )
    return "\n".join(lines)


def distillation_speed() -> str:
    """The teacher asked each time, and its answers kept."""
    found = _result("distillation")["speed"]
    medians = {how: sorted(values)[len(values) // 2] for how, values in found["examples_per_second"].items()}
    return (
        f"ResNet-56 teaches ResNet-20: {medians['asked']:.0f} examples per second asked each time, "
        f"{medians['kept']:.0f} with answers kept: {found['ratio']:.2f}x "
        f"({found['ratio_low']:.2f} to {found['ratio_high']:.2f}, "
        f"n = {found['n']} pairs of processes, {found['threads']} thread(s))."
    )


def distillation_text() -> str:
    """MiniLM with fewer layers."""
    result = _result("distillation_text")
    lines = [
        f"| layers | learns from | top-1, % (teacher {result['teacher_top1']:.2f}) | of the teacher's | "
        "drop [95 % interval] |",
        "|---:|---|---:|---:|---|",
    ]
    for row in result["rows"]:
        label = "labels alone" if row["name"] == "none" else f"labels, {row['name']}"
        share = row["student_top1"] / result["teacher_top1"]
        top1, drop = row["student_top1"], _drop(row, "student")
        lines.append(f"| {row['layers']} | {label} | {top1:.2f} | {share:.1%} | {drop} |")
    return "\n".join(lines)


def pipelines() -> str:
    """Every preset on ResNet-20."""
    lines = [
        "| preset | drop, points | at most, at 95 % | batch 1, ms (float) | faster | kB (float) | minutes |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in _result("pipelines")["rows"].items():
        found = row["certificate"]
        lines.append(
            f"| `{name}` | {100 * found['drop']:+.2f} | {100 * found['upper_bound']:.2f} | "
            f"{row['latency_ms']['median']:.2f} ({row['float_latency_ms']:.2f}) | {row['speed_up']:.2f}x | "
            f"{row['size_bytes'] / 1000:,.0f} ({row['float_size_bytes'] / 1000:,.0f}) | {row['seconds'] / 60:.1f} |"
        )
    return "\n".join(lines)


RENDERERS: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        int8_latency,
        int8_ratios,
        int8_compress,
        environment,
        pruning_one_shot,
        pruning_trained,
        coupling_speed,
        number_formats,
        mixed_precision,
        mixed_precision_seconds,
        qat_accuracy,
        ptq_accuracy,
        charlstm,
        inductor,
        inductor_layers,
        quantization_summary,
        minilm,
        minilm_ratios,
        quantize_memory,
        training_overhead,
        training_speed,
        training_machine,
        distillation,
        distillation_summary,
        distillation_recovery,
        distillation_speed,
        distillation_text,
        pipelines,
    )
}


def check(path: Path, *, write: bool) -> list[str]:
    """Problems of one document; with `write`, its number blocks are rendered anew first."""
    text = path.read_text()
    rendered = BLOCK.sub(lambda block: f"{block[1]}{RENDERERS[block[2]]()}\n{block[4]}", text)
    if write and rendered != text:
        path.write_text(rendered)
        text = rendered
    name = path.relative_to(ROOT)
    problems = [] if rendered == text else [f"{name}: numbers differ from benchmarks/results; run with --write"]
    for target in LINK.findall(text):
        if not (path.parent / target).exists():
            problems.append(f"{name}: {target} does not exist")
    return problems


def main() -> None:
    """Checks every Markdown file outside hidden and generated directories."""
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    problems = [problem for path in sorted(documents) for problem in check(path, write="--write" in sys.argv)]
    print("\n".join(problems) or f"{len(documents)} documents are in order")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
