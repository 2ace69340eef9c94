"""Subexpressions that the outputs of a constant matrix have in common [Potkonjak1996].

A constant integer is a sum of signed powers of two, and a matrix-vector product a sum of shifted
inputs. Two terms that meet in several outputs at the same distance and relative sign are added
once. Each round takes the patterns from the most frequent on, as long as their terms are not
taken, and the sums become terms of the next round.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Digits = NDArray[np.int8]
_MAX_ROUNDS = 40
_KEEP = 0.9  # patterns down to this share of the round's most frequent one are taken in a round


@dataclass(frozen=True, slots=True)
class Shared:
    """The sum of term `first` and of term `second`, shifted left by `shift` and times `sign`."""

    first: int
    second: int
    shift: int
    sign: int


def signed_digits(values: NDArray[np.int64]) -> Digits:
    """(*values.shape, positions): canonical signed digits, lowest first, no two neighbours set.

    >>> signed_digits(np.array([7, -3]))
    array([[-1,  0,  0,  1],
           [ 1,  0, -1,  0]], dtype=int8)
    """
    left = values.astype(np.int64).copy()
    columns = []
    while left.any():
        odd = left & 1
        digit = np.where(odd == 1, 2 - (left & 3), 0)
        columns.append(digit.astype(np.int8))
        left = (left - digit) >> 1
    return np.stack(columns, -1) if columns else np.zeros((*values.shape, 1), np.int8)


def share(digits: Digits) -> tuple[list[Shared], Digits]:
    """Sums worth having, and the outputs written with them.

    Args:
        digits: (outputs, inputs, positions).

    Returns:
        the sums, numbered after the inputs, and (outputs, inputs and sums, positions).
    """
    table = digits.copy()
    found: list[Shared] = []
    for _ in range(_MAX_ROUNDS):
        patterns = _patterns(table)
        if not patterns:
            break
        floor = max(2, int(_KEEP * patterns[0][0]))
        columns = []
        for count, first, second, shift, sign in patterns:
            if count < floor:
                break
            column = _taken(table, first, second, shift, sign)
            if column is not None:
                found.append(Shared(first, second, shift, sign))
                columns.append(column)
        if not columns:
            break
        table = np.concatenate([table, np.stack(columns, 1)], 1)
    return found, table


def _patterns(table: Digits) -> list[tuple[int, int, int, int, int]]:
    """(count, first, second, shift, sign) of pairs that occur at least twice, frequent first."""
    _, n_terms, n_positions = table.shape
    plus = (table > 0).astype(np.float32).transpose(1, 0, 2)
    minus = (table < 0).astype(np.float32).transpose(1, 0, 2)
    rows: list[NDArray[np.int64]] = []
    for shift in range(n_positions):
        low, high = slice(0, n_positions - shift), slice(shift, n_positions)
        a = [x[:, :, low].reshape(n_terms, -1) for x in (plus, minus)]
        b = [x[:, :, high].reshape(n_terms, -1) for x in (plus, minus)]
        for sign, counts in (
            (1, a[0] @ b[0].T + a[1] @ b[1].T),
            (-1, a[0] @ b[1].T + a[1] @ b[0].T),
        ):
            if shift == 0:
                counts = np.triu(counts, 1)
            first, second = np.nonzero(counts >= 2)
            n = first.size
            if n:
                count = counts[first, second].astype(np.int64)
                rows.append(
                    np.stack([count, first, second, np.full(n, shift), np.full(n, sign)], 1)
                )
    if not rows:
        return []
    every = np.concatenate(rows)
    order = np.lexsort((every[:, 2], every[:, 1], every[:, 3], -every[:, 0]))
    return [(int(c), int(a), int(b), int(s), int(g)) for c, a, b, s, g in every[order]]


def _taken(table: Digits, first: int, second: int, shift: int, sign: int) -> Digits | None:
    """Take a pattern's terms out of the table; digits of its sum, None if it is left only once."""
    n_outputs, _, n_positions = table.shape
    a = table[:, first, : n_positions - shift]
    b = table[:, second, shift:]
    met = (a != 0) & (a * b == sign)
    if first == second:  # a digit that ends one occurrence does not begin the next
        for position in range(shift, met.shape[1]):
            met[:, position] &= ~met[:, position - shift]
    if int(met.sum()) < 2:
        return None
    column = np.zeros((n_outputs, n_positions), np.int8)
    column[:, : n_positions - shift][met] = a[met]
    a[met] = 0
    b[met] = 0
    return column
