"""Numbers and foreign strings as text: one rule per quantity, for the page, the card and the terminal."""

from __future__ import annotations

import math
import unicodedata
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Decimal

MISSING = "—"
SHARE_METRICS = frozenset({"top1", "agreement"})
_BIDI_CONTROLS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def printable(text: object) -> str:
    """Replaces what could steer a terminal or a reader's eye: control, surrogate and direction characters."""
    return "".join(character if _is_printable(character) else "\ufffd" for character in str(text))


def _is_printable(character: str) -> bool:
    if character in "\n\t":
        return True
    return character not in _BIDI_CONTROLS and unicodedata.category(character) not in {"Cc", "Cs"}


def one_line(text: object, limit: int = 10_000) -> str:
    """One printable line of at most `limit` columns, with an ellipsis where it was cut."""
    line = " ".join(printable(text).split())
    columns = 0
    for position, character in enumerate(line):
        columns += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if columns > limit:
            return line[: max(position - 1, 0)] + "…"
    return line


def ending(name: str, limit: int) -> str:
    """The end of a long name, which says most."""
    line = one_line(name)
    return line if len(line) <= limit else "…" + line[1 - limit :]


def known(value: float | None) -> bool:
    """Whether there is a finite number to show."""
    return value is not None and math.isfinite(value)


def significant(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits; powers of ten only for the very small and the very large."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    exponent = math.floor(math.log10(abs(rounded)))
    if not -4 <= exponent < 12:
        return _with_power_of_ten(rounded, exponent)
    return f"{rounded:,.{max(0, digits - 1 - exponent)}f}".replace("-", "−")


def _with_power_of_ten(value: float, exponent: int) -> str:
    mantissa = f"{Decimal(repr(value)).scaleb(-exponent):.3g}".replace("-", "−")
    return f"{mantissa}×10{str(exponent).translate(_SUPERSCRIPT)}"


def integer(value: int | None) -> str:
    """A whole number with thousands separators."""
    return MISSING if value is None else f"{value:,}"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    """`value` in the first of `units`, each 1000 times the one before, that keeps it below 1000."""
    for unit in units[:-1]:
        if abs(value) < 999.5:
            return f"{significant(value)} {unit}".rstrip()
        value /= 1000
    return f"{significant(value)} {units[-1]}"


def byte_count(value: int | None) -> str:
    """Bytes in decimal units: 1 MB is 1,000,000 bytes."""
    if value is None:
        return MISSING
    return f"{value} B" if value < 1000 else _scaled(value / 1000, ("kB", "MB", "GB", "TB"))


def count(value: int | None) -> str:
    """A large count in thousands (k), millions (M) or billions (G)."""
    if value is None:
        return MISSING
    return integer(value) if value < 10_000 else _scaled(value / 1000, ("k", "M", "G", "T"))


def milliseconds(value: float | None) -> str:
    """A time in milliseconds, with its unit."""
    return f"{significant(value)} ms" if known(value) else MISSING


def seconds(value: float | None) -> str:
    """A duration: seconds up to two minutes, then minutes, then hours."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value < 120:
        return f"{significant(value)} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def rate(value: float | None) -> str:
    """Examples per second, with its unit."""
    return f"{significant(value)} /s" if known(value) else MISSING


def ratio(value: float | None) -> str:
    """A ratio with two significant digits, as in ``3.9×``."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{significant(value, 2 if value < 99.5 else 3)}×"


def percent(share: float | None) -> str:
    """A share in 0..1 as a percentage; only exactly none and exactly all are written 0 % and 100 %."""
    if share is None or not math.isfinite(share):
        return MISSING
    value = 100 * share
    if value in (0, 100):
        return f"{value:.0f} %"
    if 0 < value < 0.01:
        return "< 0.01 %"
    if 99.99 < value < 100:
        return "> 99.99 %"
    decimals = 2 if 0 < abs(value) < 0.1 or 99.9 < value < 100 else 1
    return f"{value:.{decimals}f} %".replace("-", "−")


def small_percent(share: float | None) -> str:
    """A relative error, which may be tiny or above one, as a percentage with two significant digits."""
    return f"{significant(100 * share, 2)} %" if share is not None and math.isfinite(share) else MISSING


def fraction(part: float, whole: float) -> float | None:
    """`part / whole`, or None where there is no whole."""
    return part / whole if whole else None


def is_share(metric: str) -> bool:
    """Whether the metric is a share of examples, whose differences are written in points."""
    return metric in SHARE_METRICS


def metric_value(value: float | None, metric: str) -> str:
    """A value of the metric: in percent for shares of examples, else in its own units."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{100 * value:.2f} %" if is_share(metric) else significant(value, 4)


def difference(value: float | None, metric: str, *, upwards: bool = False) -> str:
    """A difference of the metric as a bare number, in points for shares of examples.

    `upwards` rounds towards more loss, so that a bound is never written smaller than it is.
    """
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    number = Decimal(repr(value)) * (100 if is_share(metric) else 1)
    if number == 0:
        return "0.00" if is_share(metric) else "0"
    last_digit = -2 if is_share(metric) and number.adjusted() >= -2 else number.adjusted() - 2
    rounded = number.quantize(Decimal(1).scaleb(last_digit), rounding=ROUND_CEILING if upwards else ROUND_HALF_EVEN)
    if rounded.adjusted() < -5:
        return _with_power_of_ten(float(rounded), rounded.adjusted())
    return f"{rounded:,f}".replace("-", "−")


def exact_difference(value: float, metric: str) -> str:
    """A limit that somebody set, such as the budget, never rounded: two decimals at least for points."""
    number = Decimal(repr(value)) * (100 if is_share(metric) else 1)
    if is_share(metric) and number == number.quantize(Decimal("0.01")):
        return f"{number:.2f}"
    return f"{number.normalize():,f}" if number.adjusted() >= -5 else f"{number.normalize():e}"


def metric_unit(metric: str) -> str:
    """What a difference of the metric is counted in, as in ``points of top1``."""
    name = one_line(metric, 40)
    return f"points of {name}" if is_share(metric) else name
