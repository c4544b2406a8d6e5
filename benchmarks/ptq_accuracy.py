"""Post-training quantization of CIFAR ResNets: tersor's recoveries against NNCF, ONNX Runtime and Brevitas.

    python benchmarks/ptq_accuracy.py --data DIR --depth 20 --depth 56 --out benchmarks/results/ptq_accuracy.json

Every contestant calibrates on the same 512 training images, in batches of 32; first and last layer keep 8 bits;
accuracy is on all 10,000 JPEG test images with paired intervals; every setting that was run is reported, none chosen.
Brevitas is optional: `pip install --no-deps brevitas unfoldNd dependencies==2.0.1`.
The file is written after every row, and rows that it holds are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from environment import describe
from int8_peers import paired_interval

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import tersor
from cifar_resnet import JpegImages, pretrained
from tersor.core.target import Target

CALIBRATION = 512
BATCH = 32
SEED = 0
Answer = Callable[[Tensor], Tensor]

SETTINGS: dict[str, dict[str, Any]] = {
    "W8A8 nearest": {},
    "W8A8 data-free": {"examples": "distilled", "samples": 256},
    "W4A8 nearest": {"weight_bits": 4},
    "W4A8 mean and variance": {"weight_bits": 4, "correction": "mean_and_variance"},
    "W4A8 gptq, mean and variance": {"weight_bits": 4, "rounding": "gptq", "correction": "mean_and_variance"},
    "W4A8 blocks": {"weight_bits": 4, "rounding": "blocks"},
    "W4A4 nearest": {"weight_bits": 4, "activation_bits": 4},
    "W4A4 mean and variance": {"weight_bits": 4, "activation_bits": 4, "correction": "mean_and_variance"},
    "W4A4 gptq, mean and variance": {
        "weight_bits": 4,
        "activation_bits": 4,
        "rounding": "gptq",
        "correction": "mean_and_variance",
    },
    "W4A4 adaround, mean and variance": {
        "weight_bits": 4,
        "activation_bits": 4,
        "rounding": "adaround",
        "steps": 500,
        "correction": "mean_and_variance",
    },
    "W4A4 blocks": {"weight_bits": 4, "activation_bits": 4, "rounding": "blocks"},
}
BREVITAS: dict[str, dict[str, Any]] = {
    "brevitas W4A8": {"weights": 4, "activations": 8, "gptq": False},
    "brevitas W4A4": {"weights": 4, "activations": 4, "gptq": False},
    "brevitas W4A8 gptq": {"weights": 4, "activations": 8, "gptq": True},
    "brevitas W4A4 gptq": {"weights": 4, "activations": 4, "gptq": True},
}


@cache
def images(data: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Calibration images, test images and their labels."""
    train, test = JpegImages(data / "cifar10/jpeg_train.npz"), JpegImages(data / "cifar10/jpeg_test.npz")
    order = np.random.default_rng(SEED).permutation(len(train))[:CALIBRATION].tolist()
    calibration = torch.stack([image for image, _ in Subset(train, order)])
    return calibration, torch.stack([test[index][0] for index in range(len(test))]), torch.from_numpy(test.labels)


def batches(data: Path) -> list[Tensor]:
    """What every contestant calibrates on."""
    return list(images(data)[0].split(BATCH))


def right(answer: Answer, data: Path) -> Any:
    """1 for each test image that is answered rightly."""
    _, test, labels = images(data)
    with torch.no_grad():
        found = torch.cat([torch.as_tensor(answer(part)).argmax(1) for part in test.split(250)])
    return (found == labels).double().numpy()


def ours(net: nn.Module, data: Path, settings: dict[str, Any]) -> Answer:
    """Tersor's simulation, which the runtimes answer alike (see int8_peers.json for the deployed files)."""
    calibration = images(data)[0]
    settings = {"samples": CALIBRATION, "batch_size": BATCH} | settings
    target = Target("onnxruntime", threads=1, reduce_range=False)
    return tersor.quantize.static(net, calibration, target=target, **settings).model


def nncf_int8(net: nn.Module, data: Path) -> Answer:
    """NNCF's default preset, run by OpenVINO."""
    import nncf
    import openvino

    float_model = openvino.convert_model(copy.deepcopy(net), example_input=batches(data)[0])
    found = nncf.quantize(float_model, nncf.Dataset(batches(data), lambda x: x.numpy()), subset_size=CALIBRATION)
    compiled = openvino.compile_model(found, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda part: torch.from_numpy(compiled(part.numpy())[0])


def onnxruntime_static(net: nn.Module, data: Path, *, four: bool) -> Answer:
    """`quantize_static` with scales per channel; weights int8 or int4."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        """The calibration batches."""

        def __init__(self) -> None:
            self.rest = iter(batches(data))

        def get_next(self) -> Any:
            """One batch by name, None at the end."""
            part = next(self.rest, None)
            return None if part is None else {"images": part.numpy()}

    with tempfile.TemporaryDirectory() as path:
        source, target = Path(path) / "float.onnx", Path(path) / "int.onnx"
        shapes = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(
            net, (batches(data)[0],), str(source), dynamo=True, input_names=["images"], dynamic_shapes=shapes,
            opset_version=21, external_data=False, verbose=False,
        )  # fmt: skip
        weights = QuantType.QInt4 if four else QuantType.QInt8
        quantize_static(
            str(source), str(target), Reader(), per_channel=True, activation_type=QuantType.QUInt8, weight_type=weights
        )
        session = onnxruntime.InferenceSession(target.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda part: torch.from_numpy(session.run(None, {"images": part.numpy()})[0])


def brevitas(net: nn.Module, data: Path, *, weights: int, activations: int, gptq: bool) -> Answer:
    """Brevitas' own post-training flow: unsigned activations behind ReLU, float biases, GPTQ, bias correction."""
    from brevitas.graph.quantize import preprocess_for_quantize
    from brevitas_examples.imagenet_classification.ptq import ptq_common as flow

    loader = [(part, torch.zeros(len(part), dtype=torch.long)) for part in batches(data)]
    model = preprocess_for_quantize(copy.deepcopy(net).eval(), trace_model=True)
    model = flow.quantize_model(
        model, "fx", weight_bit_width=weights, act_bit_width=activations, bias_bit_width=None,
        weight_quant_granularity="per_channel", act_quant_percentile=99.99, act_quant_type="asym",
        scale_factor_type="float_scale", quant_format="int", weight_param_method="mse", act_param_method="mse",
        layerwise_first_last_bit_width=8,
    )  # fmt: skip
    flow.calibrate(loader, model)
    if gptq:
        with torch.no_grad():
            model(loader[0][0])  # its GPTQ asks for scales that a forward pass sets
        flow.apply_gptq(loader, model)
    for module in model.modules():  # the shortcuts slice their input, which its own kind of tensor does not allow
        if hasattr(module, "return_quant_tensor"):
            module.return_quant_tensor = False
    flow.apply_bias_correction(loader, model)
    return model.eval()


def contestants(net: nn.Module, data: Path) -> dict[str, Callable[[], Answer]]:
    """All, by name."""
    found: dict[str, Callable[[], Answer]] = {
        f"tersor {name}": lambda settings=settings: ours(net, data, settings) for name, settings in SETTINGS.items()
    }
    found |= {
        "nncf int8": lambda: nncf_int8(net, data),
        "quantize_static int8": lambda: onnxruntime_static(net, data, four=False),
        "quantize_static int4 weights": lambda: onnxruntime_static(net, data, four=True),
    }
    found |= {name: lambda settings=settings: brevitas(net, data, **settings) for name, settings in BREVITAS.items()}
    return found


def main() -> None:
    """Measures what the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--depth", type=int, choices=(20, 56), action="append")
    parser.add_argument("--only", action="append", help="part of a contestant's name")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/ptq_accuracy.json")
    arguments = parser.parse_args()
    result: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": {}}
    result["environment"] = describe(threads=torch.get_num_threads(), seed=SEED, packages=("nncf", "brevitas"))
    result["n"], result["calibration"] = len(images(arguments.data)[1]), CALIBRATION
    for depth in arguments.depth or (20, 56):
        net = pretrained(arguments.data, depth)
        before = right(net, arguments.data)
        rows = result["rows"].setdefault(f"ResNet-{depth}", {})
        rows["float"] = {"top1_percent": 100 * before.mean()}
        for name, make in contestants(net, arguments.data).items():
            if name in rows or not any(part in name for part in arguments.only or [""]):
                continue
            started = time.perf_counter()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    answer = make()
            except ImportError as error:
                print(f"left out: {name}: {error}", file=sys.stderr)
                continue
            seconds = time.perf_counter() - started
            after = right(answer, arguments.data)
            rows[name] = {"top1_percent": 100 * after.mean(), **paired_interval(before, after), "seconds": seconds}
            print(f"ResNet-{depth} {name}: {rows[name]}", file=sys.stderr, flush=True)
            arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
