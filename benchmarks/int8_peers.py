"""ResNet-56 in int8: tersor against NNCF (OpenVINO) and onnxruntime.quantization, in one interleaved run.

    python benchmarks/int8_peers.py --data DIR --out benchmarks/results/int8_peers.json

Measures latency at batch 1 and 64 (every contestant in its own process, interleaved round by round), accuracy on
all 10,000 JPEG test images with paired intervals, bytes on disk, and the time that compressing takes (each repetition
in a fresh process, peers alternating). Calibration: the same 300 training images for everyone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from environment import describe

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import tersor
from cifar_resnet import CifarResNet, JpegImages, pretrained
from tersor.core.batch import Batch
from tersor.core.candidate import Candidate
from tersor.core.context import Context
from tersor.core.signature import Signature, input_names, signature_of
from tersor.measure import Contestant, Protocol, certify, latency, paired_ratio
from tersor.quantize import Static
from tersor.runtimes import Loaded, get_runtime
from tersor.runtimes.eager import TorchSession

CALIBRATION = 300
BATCHES = (1, 64)
SEED = 0


def calibration_images(data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The same 300 training images for every contestant."""
    train = JpegImages(data / "cifar10/jpeg_train.npz")
    chosen: list[Any] = np.random.default_rng(SEED).permutation(len(train))[:CALIBRATION].tolist()
    images, labels = next(iter(DataLoader(Subset(train, chosen), CALIBRATION)))
    return images, labels


def signature(model: CifarResNet, target: tersor.Target) -> Signature:
    """The model's signature."""
    example = Batch((torch.zeros(2, 3, 32, 32),), {}, None)
    return signature_of(input_names(model, example), example, model(example.args[0]), target, None)


def with_tersor(runtime: str, threads: int, model: CifarResNet, data: Path, out: Path) -> None:
    """Post-training int8 and export."""
    target = tersor.Target(runtime, threads=threads)
    task = tersor.Task(calibrate=calibration_images(data))
    step = Static(samples=CALIBRATION)
    candidate = step.apply(Candidate(model), Context(task, target, model, SEED))
    get_runtime(runtime).export(candidate, task.example(2), out, signature=signature(model, target), target=target)


def with_float(runtime: str, threads: int, model: CifarResNet, data: Path, out: Path) -> None:
    """The uncompressed model in the same runtime."""
    target = tersor.Target(runtime, threads=threads)
    example = Batch((torch.zeros(2, 3, 32, 32),), {}, None)
    get_runtime(runtime).export(Candidate(model), example, out, signature=signature(model, target), target=target)


def with_nncf(threads: int, model: CifarResNet, data: Path, out: Path) -> None:
    """`nncf.quantize` with its defaults."""
    import nncf
    import openvino

    images, _ = calibration_images(data)
    converted = openvino.convert_model(model, example_input=torch.zeros(2, 3, 32, 32))
    quantized = nncf.quantize(converted, nncf.Dataset(list(images.split(1))), subset_size=CALIBRATION)
    openvino.save_model(quantized, str(out / "model.xml"), compress_to_fp16=False)


def with_quantize_static(threads: int, model: CifarResNet, data: Path, out: Path, *, reduce_range: bool) -> None:
    """`onnxruntime.quantization.quantize_static`: QUInt8 activations, per-channel QInt8 weights."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, images: torch.Tensor) -> None:
            self.batches = iter([{"images": image.numpy()} for image in images.split(1)])

        def get_next(self) -> Any:
            return next(self.batches, None)

    images, _ = calibration_images(data)
    with_float("onnxruntime", threads, model, data, out)
    float_model, prepared = out / "model.onnx", out / "prepared.onnx"
    quant_pre_process(str(float_model), str(prepared))
    quantize_static(
        str(prepared),
        str(float_model),
        Reader(images),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=reduce_range,
    )
    prepared.unlink()


MAKERS: dict[str, tuple[str, Callable[..., None]]] = {
    "tersor openvino int8": ("openvino", partial(with_tersor, "openvino")),
    "nncf openvino int8": ("openvino", with_nncf),
    "openvino float32": ("openvino", partial(with_float, "openvino")),
    "tersor onnxruntime int8": ("onnxruntime", partial(with_tersor, "onnxruntime")),
    "quantize_static int8": ("onnxruntime", partial(with_quantize_static, reduce_range=False)),
    "quantize_static int8, reduce_range": ("onnxruntime", partial(with_quantize_static, reduce_range=True)),
    "onnxruntime float32": ("onnxruntime", partial(with_float, "onnxruntime")),
}
TIMED = ("tersor openvino int8", "nncf openvino int8", "tersor onnxruntime int8", "quantize_static int8")


def make(name: str, arguments: argparse.Namespace, out: Path) -> float:
    """Compresses in this process; returns the seconds, imports and data loading left out."""
    import nncf  # noqa: F401 - imported before the clock starts, as for the others
    import onnxruntime.quantization  # noqa: F401
    import openvino  # noqa: F401

    torch.set_num_threads(arguments.threads)
    model = pretrained(arguments.data, arguments.depth)
    calibration_images(arguments.data)  # warms the page cache
    started = time.perf_counter()
    MAKERS[name][1](arguments.threads, model, arguments.data, out)
    return time.perf_counter() - started


def make_in_process(name: str, arguments: argparse.Namespace, out: Path) -> float:
    """The same in a fresh process."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--data", str(arguments.data), "--depth", str(arguments.depth)]
    command += ["--threads", str(arguments.threads), "--make", name, "--out", str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    return float(done.stdout.strip().splitlines()[-1])


def loaders(arguments: argparse.Namespace, scratch: Path) -> dict[str, Contestant]:
    """A way to open every contestant in a process of its own."""
    model = pretrained(arguments.data, arguments.depth)
    target = tersor.Target("eager", threads=arguments.threads)
    found = {"pytorch eager float32": Contestant(partial(TorchSession, model, signature(model, target), target))}
    for name, (runtime, _) in MAKERS.items():
        place = tersor.Target(runtime, threads=arguments.threads)
        loaded = Loaded(get_runtime(runtime), scratch / name, _names_of(scratch / name, model, place), place)
        found[name] = Contestant(loaded, (runtime,))
    return found


def _names_of(directory: Path, model: CifarResNet, target: tersor.Target) -> Signature:
    """OpenVINO's converter names inputs on its own; ours keep the model's."""
    found = signature(model, target)
    if target.runtime == "openvino":
        import openvino

        names = [port.get_any_name() for port in openvino.Core().read_model(directory / "model.xml").inputs]
        inputs = [spec.model_copy(update={"name": name}) for spec, name in zip(found.inputs, names, strict=True)]
        return found.model_copy(update={"inputs": inputs})
    return found


def right_answers(contestant: Contestant, test: JpegImages) -> np.ndarray[Any, Any]:
    """Whether each of the test images is classified correctly, `[N]`."""
    session = contestant.factory()
    answers = []
    with torch.no_grad():
        for images, labels in DataLoader(test, 100):
            answers.append((torch.as_tensor(session(images)).argmax(1) == labels).double())
    return torch.cat(answers).numpy()


def paired_interval(before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]) -> dict[str, float]:
    """Drop in points with an exact 95 % interval (two one-sided bounds of 97.5 %)."""
    upper = certify(before, after, max_drop=1.0, confidence=0.975)
    lower = certify(after, before, max_drop=1.0, confidence=0.975)
    return {
        "drop_points": 100 * upper.drop,
        "low_points": -100 * lower.upper_bound,
        "high_points": 100 * upper.upper_bound,
        "losses": float(upper.losses or 0),
        "gains": float(upper.gains or 0),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark."""
    result: dict[str, Any] = {"benchmark": "int8_peers", "model": f"ResNet-{arguments.depth}, JPEG-tuned weights"}
    result["environment"] = describe(threads=arguments.threads, seed=SEED, packages=("nncf",))
    with tempfile.TemporaryDirectory() as path:
        scratch = Path(path)
        seconds: dict[str, list[float]] = {name: [] for name in TIMED}
        for repetition in range(arguments.repetitions):
            for name in MAKERS:
                if name in TIMED or repetition == 0:
                    taken = make_in_process(name, arguments, scratch / name)
                    if name in TIMED:
                        seconds[name].append(taken)
                    print(f"compressed: {name}, {taken:.1f} s", file=sys.stderr)
        result["compress_seconds"] = {
            name: {"median": statistics.median(taken), "min": min(taken), "max": max(taken), "n": len(taken)}
            for name, taken in seconds.items()
        }
        result["compress_ratio"] = {
            "tersor / nncf, openvino": statistics.median(
                ours / theirs for ours, theirs in zip(seconds[TIMED[0]], seconds[TIMED[1]], strict=True)
            )
        }
        contestants = loaders(arguments, scratch)
        result["size_bytes"] = {
            name: sum(file.stat().st_size for file in (scratch / name).iterdir()) for name in MAKERS
        }
        protocol = Protocol(rounds=arguments.rounds, round_seconds=0.4, warmup_calls=20)
        for size in BATCHES:
            images = torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(SEED))
            found = latency(
                contestants, Batch((images,), {}, None), threads=arguments.threads, protocol=protocol,
                progress=lambda done, total: print(f"round {done} of {total}", file=sys.stderr),
            )  # fmt: skip
            times = {name: measured.latency for name, measured in found.items()}
            result[f"batch_{size}"] = {
                name: {
                    **time.model_dump(exclude={"histogram"}),
                    "ratio_to_eager": paired_ratio(times["pytorch eager float32"], time),
                }
                for name, time in times.items()
            }  # fmt: skip
            result[f"batch_{size}_time_ratio"] = {
                f"{ours} / {theirs}": paired_ratio(times[ours], times[theirs])
                for ours, theirs in (
                    ("tersor openvino int8", "nncf openvino int8"),
                    ("tersor onnxruntime int8", "quantize_static int8"),
                    ("tersor onnxruntime int8", "quantize_static int8, reduce_range"),
                )
            }
        test = JpegImages(arguments.data / "cifar10/jpeg_test.npz")
        before = right_answers(contestants["pytorch eager float32"], test)
        result["accuracy"] = {"n": len(test), "pytorch eager float32": {"top1_percent": 100 * before.mean()}}
        for name in MAKERS:
            after = right_answers(contestants[name], test)
            result["accuracy"][name] = {"top1_percent": 100 * after.mean(), **paired_interval(before, after)}
            print(f"accuracy: {name} {100 * after.mean():.2f} %", file=sys.stderr)
    return result


def main() -> None:
    """Runs the benchmark, or makes one contestant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--depth", type=int, choices=(20, 56), default=56)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--make", choices=sorted(MAKERS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/int8_peers.json")
    arguments = parser.parse_args()
    if arguments.make:
        print(make(arguments.make, arguments, arguments.out))
        return
    arguments.out.write_text(json.dumps(run(arguments), indent=2) + "\n")


if __name__ == "__main__":
    main()
