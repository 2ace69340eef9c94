"""Legal weight bit widths and what each stores.

A bit width is 0 (pruned), 1 (binary), 1.6 (ternary: five trits in a byte) or 2..8. The name
of a width is its number of stored bits; `LEVELS` says how many values a weight can take.
"""

BIT_WIDTHS: tuple[float, ...] = (0, 1, 1.6, 2, 3, 4, 5, 6, 7, 8)
TERNARY = 1.6
FLOAT_BITS = 32
LEVELS: dict[float, int] = {0: 0, 1: 2, TERNARY: 3, **{b: 2**b for b in range(2, 9)}}
TRITS_PER_BYTE = 5


def parse_bit_width(text: str) -> float:
    """The legal bit width written in `text`.

    >>> parse_bit_width("4"), parse_bit_width("1.6")
    (4, 1.6)

    Raises:
        ValueError: the text is not one of 0, 1, 1.6, 2..8.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    for bit_width in BIT_WIDTHS:
        if value == bit_width:
            return bit_width
    legal = ", ".join(f"{b:g}" for b in BIT_WIDTHS)
    raise ValueError(f"{text!r} is not a bit width; legal are {legal}")


def code_bytes(bit_width: float, n_codes: int) -> int:
    """Bytes that `n_codes` codes of one width fill, rounded up to a whole byte.

    >>> code_bytes(3, 10), code_bytes(1.6, 10), code_bytes(0, 10)
    (4, 2, 0)
    """
    if bit_width == TERNARY:
        return -(-n_codes // TRITS_PER_BYTE)
    return -(-n_codes * int(bit_width) // 8)
