"""A small reader of TensorBoard event files (TFRecord of Event messages) that checks every sum."""

import struct


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def records(path):
    with open(path, "rb") as file:
        content = file.read()
    offset = 0
    while offset < len(content):
        length, length_crc = struct.unpack_from("<QI", content, offset)
        assert length_crc == masked(content[offset:offset + 8]), f"length at {offset}"
        data = content[offset + 12:offset + 12 + length]
        assert len(data) == length, "cut off"
        (data_crc,) = struct.unpack_from("<I", content, offset + 12 + length)
        assert data_crc == masked(data), f"record at {offset}"
        offset += 16 + length
        yield data


def fields(message):
    """(number, value) of a protobuf message; length-delimited values as bytes."""
    offset = 0

    def varint():
        nonlocal offset
        value, shift = 0, 0
        while True:
            byte = message[offset]
            offset += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while offset < len(message):
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == 0:
            value = varint()
        elif kind == 1:
            (value,) = struct.unpack_from("<d", message, offset)
            offset += 8
        elif kind == 5:
            (value,) = struct.unpack_from("<f", message, offset)
            offset += 4
        else:
            assert kind == 2, f"wire type {kind}"
            length = varint()
            value = message[offset:offset + length]
            assert len(value) == length
            offset += length
        yield number, value


def scalars(path):
    """[(tag, step, value)]; the file begins with its version, "brain.Event:2"."""
    found = []
    for index, record in enumerate(records(path)):
        event = dict(fields(record))
        if index == 0:
            assert event[3] == b"brain.Event:2", event
            continue
        for number, value in fields(event[5]):  # Event.summary
            assert number == 1  # Summary.value
            entry = dict(fields(value))
            scalar = entry.get(2)  # simple_value
            if scalar is None:     # or a tensor of one float
                tensor = dict(fields(entry[8]))
                scalar = tensor[5] if isinstance(tensor.get(5), float) else struct.unpack(
                    "<f", tensor.get(5) or tensor[4])[0]
            found.append((entry[1].decode(), event.get(2, 0), scalar))
    return found
