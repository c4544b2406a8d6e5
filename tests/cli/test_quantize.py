"""`tersor quantize`: the table of sensitivities, and runs of a single quantization."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.commands import Command, Said


@pytest.fixture
def quantize(command: Command, in_problem: None) -> Command:
    """`tersor quantize …` in the directory of the problem's module."""

    def run(*options: object) -> Said:
        return command(
            "quantize", "--model", "problem:trained", "--task", "problem:small_task", "--threads", 1, *options
        )

    return run


def test_sensitivity_is_a_ranked_table_or_json(quantize: Command) -> None:
    said = quantize("--sensitivity", "--bits", "2,8", "--samples", 40)
    assert said.code == 0, said.err
    for part in ("KL divergence if one layer alone is rounded; 40 examples", "2 bits", "8 bits", "drop at 2"):
        assert part in said.out
    said = quantize("--sensitivity", "--measure", "fisher", "--samples", 40, "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert found["bits"] == [2, 4, 8]
    assert {row["layer"] for row in found["layers"]} == {"0", "4", "7", "11"}
    losses = [row["loss"]["2"] for row in found["layers"]]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.usefixtures("quick_latency")
def test_mixed_is_compressed_deployed_and_reported(quantize: Command, tmp_path: Path) -> None:
    options = ["--mode", "mixed", "--average-bits", 4, "--bits", "2,4,8", "--rounds", 1, "--out", tmp_path / "run"]
    said = quantize(*options, "--json")
    assert said.code == 0, said.err
    report = json.loads(said.out)
    assert report["verdict"] == "no certificate"
    assert report["coverage"]["parameters_quantized"] > 0.9
    (record,) = report["history"]
    assert (record["name"], record["settings"]["average_bits"]) == ("quantize.mixed", 4.0)
    assert {row["weight_bits"] for row in record["quantization"]["layers"]} <= {2, 4, 8}
    page = (tmp_path / "run" / "artifact" / "report.html").read_text()
    assert 'id="widths"' in page
    assert f"artifact: {tmp_path / 'run' / 'artifact'}" in said.err
    again = quantize(*options)
    assert again.code == 0
    assert "no certificate" in again.out.lower()


@pytest.mark.usefixtures("quick_latency")
def test_static_takes_both_widths(quantize: Command, tmp_path: Path) -> None:
    said = quantize("--weight-bits", 4, "--activation-bits", 6, "--rounds", 1, "--out", tmp_path / "run", "--json")
    assert said.code == 0, said.err
    (record,) = json.loads(said.out)["history"]
    assert (record["settings"]["weight_bits"], record["settings"]["activation_bits"]) == (4, 6)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ([], 2, "--out: name a run directory"),
        (["--mode", "magic", "--out", "x"], 2, "--mode: expected one of"),
        (["--mode", "mixed", "--out", "x"], 2, "set one of average_bits"),
        (["--average-bits", 4, "--out", "x"], 2, "--average-bits: --mode static has no such setting"),
        (["--bits", "2,4", "--out", "x"], 2, "--bits: --mode static has no such setting"),
        (["--bits", "two", "--sensitivity"], 2, "--bits: expected numbers like 2,4,8, got 'two'"),
        (["--bits", "1", "--sensitivity"], 2, "bits: expected widths of 2 to 8"),
        (["--measure", "guess", "--sensitivity"], 2, "measure: expected one of"),
        (["--weight-bits", 9, "--out", "x"], 2, "Static.weight_bits"),
        (["--mode", "fallback", "--out", "x"], 2, "needs a 'search' split"),
        (["--weights", "nowhere.safetensors", "--sensitivity"], 4, "does not exist"),
    ],
)
def test_every_mistake_has_its_exit_code(quantize: Command, options: list[object], code: int, said: str) -> None:
    found = quantize(*options)
    assert found.code == code, found.err
    assert said in found.err
    assert found.out == ""
    assert "Traceback" not in found.err
