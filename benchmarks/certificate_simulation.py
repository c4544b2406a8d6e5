"""Measures the accuracy-drop certificate: false certifications, power, seconds and examples needed.

Run: python benchmarks/certificate_simulation.py --out benchmarks/results/certificate.json
Takes about two minutes on one core. Prints the tables of docs/certificate.md as Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from scipy.stats import binom, norm

from tersor.measure import betting, exact_paired
from tersor.measure.certificate import certify, examples_needed, smallest_certifiable

CONFIDENCE = 0.95
SCENARIOS = [  # examples, gain rate, true drop = budget
    (200, 0.0, 0.02),
    (500, 0.01, 0.02),
    (2000, 0.001, 0.005),
    (2000, 0.02, 0.01),
    (2000, 0.1, 0.02),
]
FLIPS = (0.01, 0.02, 0.04)
BUDGETS = (0.005, 0.01, 0.02)
SIZES = (500, 2000, 10_000)


def wald_bound(differences: np.ndarray) -> float:
    """The textbook normal approximation, for contrast: mean + z · deviation / √n."""
    return float(differences.mean() + norm.ppf(CONFIDENCE) * differences.std() / math.sqrt(differences.size))


def hoeffding_bound(differences: np.ndarray) -> float:
    """Hoeffding 1963 for differences in [-1, 1], for contrast: mean + 2 √(log(1/α) / 2n)."""
    return float(differences.mean() + 2 * math.sqrt(-math.log(1 - CONFIDENCE) / (2 * differences.size)))


def most_certified_losses(n: int, max_drop: float) -> Callable[[int], int]:
    """For a number of gains, the most losses that the exact test certifies; found once per number."""
    known: dict[int, int] = {}

    def most(gains: int) -> int:
        if gains not in known:
            low, high = -1, n - gains + 1
            while high - low > 1:
                middle = (low + high) // 2
                certified = exact_paired.p_value(middle, gains, n, max_drop, CONFIDENCE) <= 1 - CONFIDENCE
                low, high = (middle, high) if certified else (low, middle)
            known[gains] = low
        return known[gains]

    return most


def enumerated_rate(n: int, loss_rate: float, gain_rate: float, most: Callable[[int], int]) -> float:
    """The exact probability that the exact test certifies, to 1e-7."""
    gains = np.arange(max(int(binom.ppf(5e-8, n, gain_rate)), 0), int(binom.isf(5e-8, n, gain_rate)) + 1)
    limits = np.array([most(int(count)) for count in gains])
    conditional = binom.cdf(limits, n - gains, loss_rate / (1 - gain_rate))
    return float(np.sum(binom.pmf(gains, n, gain_rate) * conditional))


def draw(generator: np.random.Generator, n: int, loss_rate: float, gain_rate: float) -> np.ndarray:
    """Paired differences of 0/1 scores."""
    return generator.choice([1.0, -1.0, 0.0], n, p=[loss_rate, gain_rate, 1 - loss_rate - gain_rate])


def false_certification(generator: np.random.Generator, repetitions: int) -> list[dict[str, Any]]:
    """How often each method certifies although the true drop is the budget: allowed is 5 %."""
    rows = []
    for n, gain_rate, budget in SCENARIOS:
        most = most_certified_losses(n, budget)
        counts = dict.fromkeys(("exact", "betting", "wald", "hoeffding"), 0)
        for repetition in range(repetitions):
            sample = draw(generator, n, gain_rate + budget, gain_rate)
            losses, gains = int((sample == 1).sum()), int((sample == -1).sum())
            counts["exact"] += losses <= most(gains)
            counts["betting"] += betting.upper_bound(sample, 0, 1, CONFIDENCE, seed=repetition) <= budget
            counts["wald"] += wald_bound(sample) <= budget
            counts["hoeffding"] += hoeffding_bound(sample) <= budget
        row = {"n": n, "gain_rate": gain_rate, "budget": budget, "repetitions": repetitions}
        rates = {method: count / repetitions for method, count in counts.items()}
        rows.append(row | rates | {"exact_enumerated": enumerated_rate(n, gain_rate + budget, gain_rate, most)})
    return rows


def false_certification_bootstrap(generator: np.random.Generator, repetitions: int) -> dict[str, Any]:
    """The same on skewed scores without declared bounds: 2 % of the examples lose one exponential unit."""
    n, budget, counts = 200, 0.02, dict.fromkeys(("bootstrap", "wald"), 0)
    for repetition in range(repetitions):
        loss = np.where(generator.random(n) < 0.02, generator.exponential(1.0, n), 0.0)
        noise = generator.normal(0, 0.01, n)
        counts["bootstrap"] += certify(noise + loss, noise * 0.5, max_drop=budget, seed=repetition).certified
        counts["wald"] += wald_bound(noise * 0.5 + loss) <= budget
    rates = {method: count / repetitions for method, count in counts.items()}
    return {"n": n, "budget": budget, "repetitions": repetitions} | rates


def power_table(generator: np.random.Generator, repetitions: int) -> list[dict[str, Any]]:
    """How often an equally good candidate (losses = gains) is certified."""
    rows = []
    for n in SIZES:
        for rate in FLIPS:
            samples = [draw(generator, n, rate, rate) for _ in range(repetitions)]
            bounds = {
                "betting": [betting.upper_bound(sample, 0, 1, CONFIDENCE) for sample in samples],
                "wald": [wald_bound(sample) for sample in samples],
                "hoeffding": [hoeffding_bound(sample) for sample in samples],
            }
            for budget in BUDGETS:
                row = {"n": n, "flips_each_way": rate, "budget": budget, "repetitions": repetitions}
                row["exact"] = exact_paired.power(rate, rate, n, budget, CONFIDENCE)
                rows.append(row | {name: float(np.mean(np.array(b) <= budget)) for name, b in bounds.items()})
    return rows


def median_seconds(call: Callable[[], object]) -> float:
    """The median of five runs."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def seconds_table(generator: np.random.Generator) -> list[dict[str, Any]]:
    """Seconds per certificate; 'not_certified' includes the search for the number of examples needed."""
    rows = []
    for n in SIZES:
        reference, flips = np.ones(n), n // 50
        candidate = np.where(np.arange(n) < flips, 0.0, 1.0)
        reference[flips : 2 * flips] = 0
        scores = generator.uniform(0, 1, n)
        other = np.clip(scores + generator.normal(0, 0.05, n), 0, 1)

        def exact(
            max_drop: float, before: np.ndarray = reference, after: np.ndarray = candidate
        ) -> Callable[[], object]:
            return lambda: certify(before, after, max_drop=max_drop)

        def bounded(
            bounds: tuple[float, float] | None, before: np.ndarray = scores, after: np.ndarray = other
        ) -> Callable[[], object]:
            return lambda: certify(before, after, max_drop=0.01, bounds=bounds)

        rows.append(
            {
                "n": n,
                "p_value": median_seconds(lambda n=n, flips=flips: exact_paired.p_value(flips, flips, n, 0.01)),
                "exact_certified": median_seconds(exact(0.05)),
                "exact_not_certified": median_seconds(exact(0.8 * norm.ppf(0.95) * 0.2 / math.sqrt(n))),
                "betting": median_seconds(bounded((0, 1))),
                "bootstrap": median_seconds(bounded(None)),
            }
        )
    return rows


def examples_table() -> list[dict[str, Any]]:
    """Examples that certify an equally good candidate with 80 % power; none flipped: the least possible."""
    return [
        {
            "budget": budget,
            "no_flips": smallest_certifiable(budget, CONFIDENCE),
            "needed": {str(rate): examples_needed(rate, rate, max_drop=budget) for rate in FLIPS},
        }
        for budget in BUDGETS
    ]


def print_rows(header: str, rows: list[list[str]]) -> None:
    """Prints one Markdown table."""
    columns = header.split(", ")
    print("\n| " + " | ".join(columns) + " |\n|" + "---:|" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def print_tables(result: dict[str, Any]) -> None:
    """Prints the tables of docs/certificate.md as Markdown."""
    methods = ("exact", "betting", "wald", "hoeffding")
    print_rows(
        "examples, gain rate, true drop = budget, exact (enumerated), exact, betting, Wald, Hoeffding",
        [
            [
                f"{row['n']:,}",
                f"{row['gain_rate']:.1%}",
                f"{row['budget']:.1%}",
                f"{row['exact_enumerated']:.2%}",
            ]
            + [f"{row[name]:.2%}" for name in methods]
            for row in result["false_certification"]
        ],
    )
    row = result["false_certification_bootstrap"]
    print(f"\nbootstrap {row['bootstrap']:.1%}, Wald {row['wald']:.1%} ({row['repetitions']:,} repetitions)")
    print_rows(
        "examples, flips each way, budget, exact, betting, Wald, Hoeffding",
        [
            [f"{row['n']:,}", f"{row['flips_each_way']:.0%}", f"{row['budget']:.1%}"]
            + [f"{row[name]:.1%}" for name in methods]
            for row in result["power"]
        ],
    )
    print_rows(
        "budget, no flips, 1 % each way, 2 % each way, 4 % each way",
        [
            [f"{row['budget']:.1%}", f"{row['no_flips']:,}"] + [f"{n:,}" for n in row["needed"].values()]
            for row in result["examples_needed"]
        ],
    )
    print_rows(
        "examples, p-value, exact certified, exact not certified, betting, bootstrap",
        [[f"{row['n']:,}"] + [f"{row[name]:.3f}" for name in list(row)[1:]] for row in result["seconds"]],
    )


def main() -> None:
    """Runs everything and writes one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/certificate.json"))
    parser.add_argument("--seed", type=int, default=20260101)
    parser.add_argument("--repetitions", type=int, default=4000, help="false certifications, per scenario")
    parser.add_argument("--power-repetitions", type=int, default=400, help="per sample size and flip rate")
    parser.add_argument("--bootstrap-repetitions", type=int, default=1000)
    options = parser.parse_args()
    generator, started = np.random.default_rng(options.seed), time.perf_counter()
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"platform": platform.platform(), "processor": platform.machine(), "cpus": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
        },
        "seed": options.seed,
        "confidence": CONFIDENCE,
        "repetitions": {
            "false_certification": options.repetitions,
            "power": options.power_repetitions,
            "bootstrap": options.bootstrap_repetitions,
        },
        "false_certification": false_certification(generator, options.repetitions),
        "false_certification_bootstrap": false_certification_bootstrap(generator, options.bootstrap_repetitions),
        "power": power_table(generator, options.power_repetitions),
        "seconds": seconds_table(generator),
        "examples_needed": examples_table(),
    }
    result["total_seconds"] = round(time.perf_counter() - started, 1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print_tables(result)


if __name__ == "__main__":
    main()
