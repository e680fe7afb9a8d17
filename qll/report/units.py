"""Numbers as a person reads them: 134.5 M, 3.41 GB, 4 min 7 s, 62.0 %; n/a where there is none."""

from __future__ import annotations

from math import floor, log10

Number = int | float
NONE = "n/a"


def count(value: Number | None) -> str:
    """A number of things with a decimal prefix: at most four significant digits.

    >>> count(134_515_008), count(2048), count(None)
    ('134.5 M', '2,048', 'n/a')
    """
    if value is None:
        return NONE
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{_digits(value / (1e3 if prefix == 'k' else size))} {prefix}"
    return f"{value:,.0f}"


def size(value: Number | None) -> str:
    """Bytes with a decimal prefix.

    >>> size(3_412_574_208), size(900)
    ('3.413 GB', '900 B')
    """
    if value is None:
        return NONE
    for unit, prefix in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= unit:
            return f"{_digits(value / unit)} {prefix}"
    return f"{value:.0f} B"


def seconds(value: Number | None) -> str:
    """A duration.

    >>> seconds(0.31), seconds(48.23), seconds(247.3), seconds(7265)
    ('0.31 s', '48.2 s', '4 min 7 s', '2 h 1 min')
    """
    if value is None:
        return NONE
    if value < 60:
        return f"{value:.2f} s" if value < 1 else f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def percent(value: Number | None, digits: int = 1) -> str:
    """A share in percent.

    >>> percent(0.8041), percent(1.0, 0)
    ('80.4 %', '100 %')
    """
    return NONE if value is None else f"{100 * value:.{digits}f} %"


def number(value: Number | None) -> str:
    """About four significant digits, without exponents between 0.001 and ten million.

    >>> number(15.4641), number(0.51273), number(12_345_678.0), number(0.00002), number(0.0)
    ('15.46', '0.5127', '1.235e+07', '2.000e-05', '0')
    """
    if value is None:
        return NONE
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e7:
        return f"{value:.3e}"
    return _digits(value)


def rounded(value: Number | None) -> str:
    """Three significant digits: for what was timed and is no better known than that.

    >>> rounded(22.84), rounded(455.03), rounded(0.8849), rounded(1_352_625)
    ('22.8', '455', '0.885', '1.35e+06')
    """
    if value is None:
        return NONE
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:,.{max(0, 2 - floor(log10(abs(value))))}f}"


def nats(value: Number | None) -> str:
    """An entropy, three decimals, without a sign on zero.

    >>> nats(5.2437), nats(-0.0001)
    ('5.244', '0.000')
    """
    return NONE if value is None else f"{value:z.3f}"


def decimals(value: Number | None) -> str:
    """A share or a correlation, three decimals, without a sign on zero.

    >>> decimals(0.93217), decimals(-0.0001), decimals(None)
    ('0.932', '0.000', 'n/a')
    """
    return NONE if value is None else f"{value:z.3f}"


def ratio(dense: Number | None, converted: Number | None) -> float | None:
    """converted / dense, or None where that has no meaning.

    >>> ratio(2.0, 3.0), ratio(0, 1)
    (1.5, None)
    """
    return None if dense is None or converted is None or dense == 0 else converted / dense


def times(value: Number | None) -> str:
    """A ratio with its sign of multiplication.

    >>> times(1.6206)[1:]
    '1.62'
    """
    return NONE if value is None else f"\u00d7{rounded(value)}"


def _digits(value: Number) -> str:
    whole = len(str(int(abs(value))))
    return f"{value:,.{max(0, min(4, 4 - whole)) if abs(value) >= 1 else 4}f}"
