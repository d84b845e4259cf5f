"""Thrift's compact protocol, as much of it as says how large the parts of a Parquet file are."""

import struct
from typing import Any

from collapse.files import limits

TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, STRUCT = 1, 2, 3, 7, 8, 9, 10, 12


class Reader:
    """Values from `place` on, one after the other; a struct is a dict by the numbers of its fields.

    Raises ValueError or IndexError: not thrift, more than `limits.THRIFT` values, too deep, or cut off.
    """

    def __init__(self, data: bytes, place: int = 0) -> None:
        self.data, self.place, self.left = data, place, limits.THRIFT

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """The fields of a struct."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            fields[number] = (head & 15 == TRUE) if head & 15 in (TRUE, FALSE) else self._value(head & 15, depth)
        return fields

    def _byte(self) -> int:
        self.place += 1
        return self.data[self.place - 1]

    def _varint(self) -> int:
        value, shift = 0, 0
        while shift < 64:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("a number of over 64 bits")

    def _signed(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _bytes(self, count: int) -> bytes:
        if count > len(self.data) - self.place:
            raise IndexError("cut off")
        self.place += count
        return self.data[self.place - count : self.place]

    def _value(self, kind: int, depth: int) -> Any:
        self.left -= 1
        if self.left < 0 or depth > 16:
            raise ValueError(f"over {limits.THRIFT} values, or too deep")
        if kind in (TRUE, FALSE, BYTE):
            return self._byte()
        if BYTE < kind < DOUBLE:
            return self._signed()
        if kind == DOUBLE:
            return struct.unpack("<d", self._bytes(8))[0]
        if kind == BINARY:
            return self._bytes(self._varint())
        if kind in (LIST, SET):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            return [self._value(head & 15, depth + 1) for _ in range(count)]
        if kind == STRUCT:
            return self.struct(depth + 1)
        raise ValueError(f"a value of kind {kind}")
