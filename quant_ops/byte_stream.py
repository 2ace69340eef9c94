"""Variable-length integers, and a reader that never runs past the end."""

import struct

from quant_ops.errors import VerificationError

MAX_VARINT_BYTES = 9  # 63 bits: every value fits a signed 64-bit integer


def put_varint(out: bytearray, value: int) -> None:
    """Append a non-negative integer below 2^63, seven bits a byte, lowest first.

    >>> out = bytearray(); put_varint(out, 300); out.hex()
    'ac02'
    """
    assert 0 <= value < 2**63
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)


def varint_bytes(value: int) -> int:
    """Bytes that `put_varint` appends.

    >>> varint_bytes(127), varint_bytes(128)
    (1, 2)
    """
    return max(1, -(-value.bit_length() // 7))


class ByteReader:
    """Reads a byte string from front to back.

    Every method raises VerificationError instead of returning less than it promises.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)
        self.position = 0

    @property
    def remaining(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self.position

    def take(self, n_bytes: int) -> memoryview:
        """The next `n_bytes` bytes."""
        if n_bytes > self.remaining:
            raise VerificationError(
                f"{n_bytes} bytes are wanted at byte {self.position} of the packed model, "
                f"{self.remaining} are left; the file is damaged"
            )
        self.position += n_bytes
        return self._data[self.position - n_bytes : self.position]

    def since(self, position: int) -> memoryview:
        """The bytes read from `position` on."""
        return self._data[position : self.position]

    def byte(self) -> int:
        """One unsigned byte."""
        return self.take(1)[0]

    def varint(self, below: int = 2**63) -> int:
        """Inverse of `put_varint`, for a value less than `below`."""
        value = 0
        for position in range(MAX_VARINT_BYTES):
            byte = self.byte()
            value |= (byte & 127) << (7 * position)
            if byte < 128:
                break
        else:
            raise self.fault("an integer is longer than nine bytes")
        if value >= below:
            raise self.fault(f"an integer is {value}, not below {below}")
        return value

    def count(self) -> int:
        """A number of items that follow, each at least one byte long."""
        return self.varint(below=self.remaining + 1)

    def unpack(self, layout: str) -> tuple[int | float, ...]:
        """Numbers in the `struct` layout given."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def fault(self, what: str) -> VerificationError:
        """The error to raise for a value that cannot be."""
        return VerificationError(
            f"{what} at byte {self.position} of the packed model; the file is damaged"
        )
