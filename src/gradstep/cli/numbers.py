"""Numbers as people read them: losses, rates, times, bytes."""

import math


def short(value: float) -> str:
    """Three significant digits; very large and very small numbers in scientific notation."""
    if not math.isfinite(value):
        return "-"
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        digits = 3 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:.{min(digits, 6)}f}"
    return f"{value:.2e}"


def decimals(value: float) -> int | None:
    """How many decimals `short` writes; none in scientific notation."""
    text = short(value)
    return None if "e" in text else len(text.partition(".")[2])


def with_spread(value: float, spread: float | None, places: int | None) -> str:
    """The value ± its spread, with this many decimals; in scientific notation where they cannot show it."""
    if places is None or (value != 0 and abs(value) < 10.0**-places):
        return short(value) if spread is None else f"{short(value)} ±{spread:.0e}"
    text = f"{value:.{places}f}"
    return text if spread is None else f"{text} ±{spread:.{places}f}"


def rate_text(rate: float) -> str:
    """A learning rate, as short as it can be typed: 0.03, 3e-4."""
    text = f"{rate:.6g}"
    if 1e-2 <= rate < 1e4:
        return text
    mantissa, _, exponent = f"{rate:.5e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def bytes_text(count: int) -> str:
    """A number of bytes in the unit that fits, in two digits or three."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 999.5 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.1f} {unit}" if unit != "B" and size < 9.95 else f"{size:.0f} {unit}"


def duration_text(seconds: float) -> str:
    """Whole seconds, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
