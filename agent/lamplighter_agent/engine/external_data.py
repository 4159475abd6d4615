"""Aligns the tensors in the weights file of a prepared copy.

A packed weight holds parts that the kernel finds at multiples of 64 bytes of memory. onnxruntime (1.31) writes packed
weights one behind the other, wherever the last one ended; mapped into memory, a weight that begins off such a multiple
is read with its parts shifted: wrong numbers, no error. So every region is moved to an aligned place in the file, and
the offsets in the model follow.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

from lamplighter_agent.engine.protobuf import edit_fields, encode_bytes, read_fields
from lamplighter_agent.engine.protobuf_nodes import GRAPH_INITIALIZER, MODEL_GRAPH
from lamplighter_agent.errors import EngineError

ALIGNMENT_BYTES: Final = 64
_PAGE_BYTES: Final = 4096
_BLOCK_BYTES: Final = 1024 * 1024

# Field numbers of onnx.proto.
_TENSOR_EXTERNAL_DATA: Final = 13
_ENTRY_KEY: Final = 1
_ENTRY_VALUE: Final = 2

Region = tuple[int, int]
"""Offset and length in bytes."""

Entries = dict[str, str]
"""External data of a tensor: ``offset``, ``length``, ``prepacked_0``: ``KEY|OFFSET;LENGTH;CHECKSUM|…`` and so on."""


def align_external_data(model_path: Path, data_path: Path) -> int:
    """Move the regions of a weights file to aligned offsets, in place, and correct the model's offsets.

    Args:
        model_path: The model, as onnxruntime saved it; rewritten.
        data_path: Its weights file; regions only move towards its end.

    Returns:
        The number of regions that moved.

    Raises:
        EngineError: If regions overlap or an entry is not understood.
        OSError: If a file cannot be read or written.
    """
    model = memoryview(model_path.read_bytes())
    try:
        moves = _plan_moves(_all_regions(model))
    except (ValueError, KeyError) as error:
        raise EngineError(f"{model_path}: an entry for external data is not understood: {error}") from error
    with data_path.open("r+b", buffering=0) as stream:
        for (offset, length), target in sorted(moves.items(), reverse=True):
            _move(stream, offset, length, target)
    model_path.write_bytes(_edit_model(model, lambda entries: _moved(entries, moves)))
    return sum(region[0] != target for region, target in moves.items())


def mapped_bytes(model_path: Path) -> int:
    """Return the bytes of a saved model's weights that computing reads: packed where they are packed.

    Raises:
        PackageError: If the file is no ONNX model.
        OSError: If it cannot be read.
    """
    total = 0

    def note(entries: Entries) -> Entries:
        nonlocal total
        built, *packed = (length for _, length in _regions(entries))
        total += sum(packed) if packed else built
        return entries

    _edit_model(memoryview(model_path.read_bytes()), note)
    return total


def _all_regions(model: memoryview) -> list[Region]:
    """Return every region that a serialized ``ModelProto`` names, in the order of the file."""
    regions: set[Region] = set()

    def note(entries: Entries) -> Entries:
        regions.update(_regions(entries))
        return entries

    _edit_model(model, note)
    return sorted(regions)


def _plan_moves(regions: list[Region]) -> dict[Region, int]:
    """Return the new offset of each region: never before the old one, so that moving from the last on is safe."""
    moves: dict[Region, int] = {}
    old_end = new_end = 0
    for offset, length in regions:
        if offset < old_end:
            raise EngineError(f"the prepacked weights overlap at byte {offset} of their file")
        alignment = _PAGE_BYTES if offset % _PAGE_BYTES == 0 else ALIGNMENT_BYTES
        target = -(-max(offset, new_end) // alignment) * alignment
        moves[offset, length] = target
        old_end, new_end = offset + length, target + length
    return moves


def _move(stream: BinaryIO, offset: int, length: int, target: int) -> None:
    """Move bytes towards the end of a file, last block first, since old and new place overlap."""
    done = length if target == offset else 0
    while done < length:
        size = min(_BLOCK_BYTES, length - done)
        begin = length - done - size
        stream.seek(offset + begin)
        block = stream.read(size)
        stream.seek(target + begin)
        stream.write(block)
        done += size


def _edit_model(model: memoryview, edit: Callable[[Entries], Entries]) -> bytes:
    """Return a serialized ``ModelProto`` with the external data of every initializer passed through ``edit``."""

    def edit_tensor(tensor: memoryview) -> bytes:
        """Return a serialized ``TensorProto`` with its external data edited and last."""
        fields = list(read_fields(tensor))
        entries = dict(_entry(field.content) for field in fields if field.number == _TENSOR_EXTERNAL_DATA)
        kept = b"".join(field.raw for field in fields if field.number != _TENSOR_EXTERNAL_DATA)
        edited = edit(entries) if entries else entries
        return kept + b"".join(
            encode_bytes(
                _TENSOR_EXTERNAL_DATA,
                encode_bytes(_ENTRY_KEY, key.encode()) + encode_bytes(_ENTRY_VALUE, value.encode()),
            )
            for key, value in edited.items()
        )

    return edit_fields(model, {MODEL_GRAPH: lambda graph: edit_fields(graph, {GRAPH_INITIALIZER: edit_tensor})})


def _entry(content: memoryview | None) -> tuple[str, str]:
    texts = {
        field.number: bytes(field.content).decode()
        for field in read_fields(memoryview(b"") if content is None else content)
        if field.content is not None
    }
    return texts.get(_ENTRY_KEY, ""), texts.get(_ENTRY_VALUE, "")


def _regions(entries: Entries) -> list[Region]:
    found = [(int(entries.get("offset", "0")), int(entries["length"]))]
    for key, value in entries.items():
        if key.startswith("prepacked"):
            found += [_part_region(part) for part in value.split("|")[1:]]
    return found


def _moved(entries: Entries, moves: dict[Region, int]) -> Entries:
    moved = dict(entries)
    moved["offset"] = str(moves[int(entries.get("offset", "0")), int(entries["length"])])
    for key, value in entries.items():
        if key.startswith("prepacked"):
            name, *parts = value.split("|")
            moved[key] = "|".join([name, *(_moved_part(part, moves) for part in parts)])
    return moved


def _moved_part(part: str, moves: dict[Region, int]) -> str:
    _, rest = part.split(";", 1)
    return f"{moves[_part_region(part)]};{rest}"


def _part_region(part: str) -> Region:
    offset, length, *_ = part.split(";")
    return int(offset), int(length)
