"""The pages on distillation say what is there, and what they show runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from tersor.distill import Recover
from tersor.distill.losses import LOSSES
from tersor.recipes import parse_recipe, preset_names, preset_text
from tersor.train import Schedule

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "methods/distill.md"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def test_the_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    scripts = blocks(PAGE, "python")
    assert len(scripts) == 5
    names: dict[str, object] = {}
    with torch.random.fork_rng(devices=[]):
        exec(compile("\n".join(scripts), PAGE.name, "exec"), names)  # noqa: S102 - our own page
    told = capsys.readouterr().out
    assert "loss by epoch: " in told
    assert "hint: 6 [B, 16, 4, 4] <- 6 [B, 32, 4, 4]" in told
    assert len(list((Path(str(names["out"])) / "answers").iterdir())) == 1


@pytest.mark.parametrize("page", ["methods/distill.md", "methods/recover.md", "pipelines.md"])
def test_the_recipes_can_be_read(page: str) -> None:
    recipes = [parse_recipe(text) for text in blocks(DOCS / page, "yaml")]
    assert len(recipes) == 1
    assert any(isinstance(step, Recover) for step in recipes[0].steps)


def test_every_loss_is_named_and_the_default_is_the_default() -> None:
    page = PAGE.read_text()
    assert [name for name in LOSSES if f"`{name}`" not in page] == []
    (default,) = re.findall(r"The default is `(.*?)`\.", page)
    assert Recover(losses=yaml.safe_load(default)) == Recover()
    table = (DOCS / "methods/recover.md").read_text()
    (default,) = re.findall(r"\| `losses` \| `(.*?)` \|", table)
    assert Recover(losses=yaml.safe_load(default)) == Recover()
    assert [name for name in Recover.model_fields if f"| `{name}` |" not in table] == []
    assert Recover().schedule == Schedule()


def test_every_preset_has_its_line_and_its_epochs_are_told() -> None:
    page = (DOCS / "pipelines.md").read_text().partition("## Measured")[0]
    lines = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    assert sorted(lines) == preset_names()
    for name, line in lines.items():
        steps = parse_recipe(preset_text(name)).steps
        epochs = sum(step.schedule.epochs for step in steps if hasattr(step, "schedule"))
        told = re.search(r"\| (\d+) epochs?\b[^|]*\|$", line)
        assert (int(told[1]) if told else 0) == epochs, name
