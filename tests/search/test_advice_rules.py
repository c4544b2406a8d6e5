"""The advisor's rules: strict, complete, and with numbers that stand in the benchmarks."""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path

import pytest

from tersor.errors import ConfigError
from tersor.search.rules import parse_rules, read_rules

ROOT = Path(__file__).parents[2]


def test_every_number_stands_in_its_benchmark() -> None:
    measured = read_rules().measured
    assert len(measured) > 10
    for row in measured:
        content = json.loads((ROOT / row.source).read_text())
        for number in row.quoted:
            assert reduce(lambda part, key: part[key], number.at, content) == number.value, (row.name, number.at)
        assert any("vnni" in flag for flag in content["environment"]["cpu_flags"]) is row.vnni, row.name


def test_rows_that_are_quoted_by_their_place_are_what_they_are_called() -> None:
    rows = {row.name: row for row in read_rules().measured}
    expected = {
        "resnet56-pruned": {"name": "tersor fisher per cost, refit", "lesson": "distilled", "epochs": 2, "share": 0.7},
        "minilm-half": {"name": "kd", "layers": 3},
        "resnet56-zeros": {"name": "magnitude", "amount": 0.5},
    }
    by_place = {name for name, row in rows.items() if any(isinstance(key, int) for n in row.quoted for key in n.at)}
    assert by_place == set(expected)
    for name, fields in expected.items():
        content = json.loads((ROOT / rows[name].source).read_text())
        found = content["rows"][rows[name].quoted[0].at[1]]
        assert {key: found[key] for key in fields} == fields


def test_every_number_is_told_and_every_source_is_there() -> None:
    rules = read_rules()
    for row in rules.measured:
        said = row.told(vnni=row.vnni)
        assert row.source in said
        assert "VNNI" not in said
        assert ("VNNI, unlike this processor" in row.told(vnni=not row.vnni)) is (row.ms is not None)
    for item in (*rules.rules, *rules.ruled_out):
        for source in item.source:
            assert source.startswith("https://") or (ROOT / source).is_file(), source
    assert rules.by_name["charlstm-int8-dynamic-onnxruntime"].told(vnni=True) == (
        "character LSTM, 2 layers of 256, onnxruntime, 64 characters, 1 thread: median 2.12 -> 0.794 ms (2.67x as "
        "fast), 3,512 -> 916 kB (3.84x smaller), loss -0.0002 bits per character [benchmarks/results/charlstm.json]"
    )


EXCLUSION = "{method: m, because: b, source: [docs/runtimes.md], measured: [x]}"
RULE = "{name: a, when: {}, preset: convert, because: b, source: [docs/runtimes.md]}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rules: {", "not valid YAML"),
        ("[]", "expected a mapping"),
        ("rules: []", "Rules.rules"),
        (f"rules: [{RULE}]\nextra: 1", "Rules.extra: Extra inputs"),
        (
            f"rules: [{RULE}]\nruled_out: [{EXCLUSION}]",
            r"quotes \['x'\]",
        ),
        (RULE.replace("when: {}", "when: {famly: [cnn]}"), "When.famly: Extra inputs"),
        (RULE.replace("when: {}", "when: {family: [dog]}"), "When.family.0: Input should be 'cnn'"),
        (RULE.replace("when: {}", "when: {abilities: [npu]}"), "When.abilities.0"),
        (RULE.replace("when: {}", "when: {scenario: edge}"), "When.scenario"),
        (RULE.replace("when: {}", "when: {family: [cnn]}"), "the last rule must fit always"),
        (RULE.replace("convert", "magic"), "expected a preset of .*got 'magic'"),
        (RULE.replace("docs/runtimes.md", "hearsay"), "Rule.source.0"),
        (RULE.replace("because: b, ", ""), "Rule.because: Field required"),
    ],
)
def test_mistakes_in_the_rules_are_refused(text: str, said: str) -> None:
    whole = text if text.startswith(("rules", "[")) else f"rules: [{text}]"
    with pytest.raises(ConfigError, match=f"^mine.*{said}"):
        parse_rules(whole, "mine")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("ms: {value: 1.0, at: [x]}", "float_ms and ms belong together"),
        ("drop: {value: 0.1, at: [x]}, drop_points: {value: 10.0, at: [x]}", "either drop or drop_points"),
        ("loss_unit: bits", "loss and loss_unit belong together"),
        ("vnni: true", "no number is quoted"),
        ("drop: {value: 0.1, at: []}", "Quoted.at"),
        ("drop: {value: high, at: [x]}", "Quoted.value"),
    ],
)
def test_half_measurements_are_refused(changed: str, said: str) -> None:
    row = "name: m, family: cnn, preset: int8, runtime: eager, model: a, conditions: b"
    row += ", source: benchmarks/results/x.json"
    vnni = "" if "vnni" in changed else ", vnni: true"
    with pytest.raises(ConfigError, match=said):
        parse_rules(f"rules: [{RULE}]\nmeasured: [{{{row}{vnni}, {changed}}}]")


def test_rules_that_share_a_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"names must be different, \['a'\] are not"):
        parse_rules(f"rules: [{RULE}, {RULE}]")
