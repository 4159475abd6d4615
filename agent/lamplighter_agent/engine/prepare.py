"""Prepared packages: weights packed for this CPU and this onnxruntime, made once on the device, mapped at every load.

``ROOT/NAME-VERSION-CPU-ONNXRUNTIME/`` holds ``model.onnx``, ``model.onnx.data`` and ``prepared.json`` with
the key (what the copy was made from and for) and each file's length and checksum. A copy whose key or checksums do not
agree is not used; the engine then loads the package as built. The checksums are there to notice a bad disk at every
load, as fast as memory is read: SHA-256 takes six times as long and would not keep out who can write the record too.
``python -m lamplighter_agent.engine.prepare PACKAGE ROOT`` makes one in a process of its own, whose
memory the system gets back.

``prompts/`` in it is a copy of the same kind that computes prompts faster (``prompt_copy``): made if it was asked for
(``--prompts``) and is faster on this machine.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import platform
import re
import shutil
import sys
import zlib
from pathlib import Path
from typing import Final, Literal, TypeAlias

import msgspec
import numpy as np

from lamplighter_agent.engine.cache_spec import CacheSpec
from lamplighter_agent.engine.external_data import align_external_data
from lamplighter_agent.engine.kv_cache import KVCache
from lamplighter_agent.engine.memory import physical_cores
from lamplighter_agent.engine.prompt_copy import PROMPTS_NAME, pays, write_prompt_copy
from lamplighter_agent.engine.runner import ModelRunner
from lamplighter_agent.engine.session import (
    FloatArray,
    ModelSession,
    check_operators,
    onnxruntime_version,
    save_prepacked,
)
from lamplighter_agent.errors import DiskFullError, EngineError, LamplighterError, StoreError
from lamplighter_agent.package.layout import MANIFEST_NAME, MODEL_NAME, WEIGHTS_NAME
from lamplighter_agent.package.manifest import Manifest, decode_manifest, read_manifest, read_manifest_bytes

logger = logging.getLogger(__name__)

Prompts: TypeAlias = Literal["none", "faster", "always"]

PREPARED_NAME: Final = "prepared.json"
FORMAT: Final = 4
"""Raised when session options change what a copy holds, or the record changes."""

_PIECE_BYTES: Final = 4 * 1024 * 1024
_BLOCK_BYTES: Final = 64 * 1024

_DISK_FACTOR: Final = 3
"""A copy holds the weights as built and as packed: 2.3 times the package's in measurement."""

_PROMPTS_DISK_FACTOR: Final = 3
"""So does that for prompts: 2 times; it is left out where the disk is short of it."""

_PROBE_TOKENS: Final = 32

_CPU_FLAGS: Final = re.compile(r"^(?:flags|Features)\s*:(.*)$", re.MULTILINE)


class PreparedKey(msgspec.Struct, frozen=True, kw_only=True):
    """What a copy was made from and for; a copy is used only under the very same key."""

    format: int
    package: str
    manifest_sha256: str
    cpu: str
    onnxruntime: str


class PreparedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file of a copy."""

    name: str
    length: int
    checksum: int


class PreparedRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Content of ``prepared.json``.

    Attributes:
        key: What the copy was made from and for.
        files: What it consists of.
        prompts: True if a model for prompts was asked for; it is not there if it did not pay.
    """

    key: PreparedKey
    files: tuple[PreparedFile, ...]
    prompts: bool = False


def prepared_key(package: Path, *, cpu: str | None = None, onnxruntime: str | None = None) -> PreparedKey:
    """Return the key of a package's copy on this machine.

    Args:
        package: The package directory.
        cpu: CPU identity; None: this machine's.
        onnxruntime: Version; None: the one in use.

    Raises:
        ManifestError: If the manifest cannot be read.
    """
    data = read_manifest_bytes(package)
    manifest = decode_manifest(data, origin=str(package / MANIFEST_NAME))
    return PreparedKey(
        format=FORMAT,
        package=manifest.reference,
        manifest_sha256=hashlib.sha256(data).hexdigest(),
        cpu=cpu_identity() if cpu is None else cpu,
        onnxruntime=onnxruntime_version() if onnxruntime is None else onnxruntime,
    )


def cpu_identity(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the architecture and a digest of the instruction-set flags, which decide how weights are packed."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = _CPU_FLAGS.search(text)
    flags = " ".join(sorted(found.group(1).split())) if found else platform.processor()
    return f"{platform.machine()}_{hashlib.sha256(flags.encode()).hexdigest()[:12]}"


def prepared_directory(root: Path, key: PreparedKey) -> Path:
    """Return where a copy with this key lies under ``root``."""
    return root / f"{key.package.replace('/', '-')}-{key.cpu}-{key.onnxruntime}"


def check_prepared(directory: Path, key: PreparedKey) -> str | None:
    """Return why a copy cannot be used, judged by its record and file lengths; None if it can so far."""
    record = _read_record(directory)
    if record is None:
        return f"{directory} holds no readable {PREPARED_NAME}"
    if record.key != key:
        return f"{directory} was prepared for another package, CPU or onnxruntime"
    if {entry.name for entry in record.files} != {MODEL_NAME, WEIGHTS_NAME}:
        return f"{directory / PREPARED_NAME} lists other files than a copy has"
    for entry in record.files:
        path = directory / entry.name
        if not path.is_file() or path.is_symlink() or path.stat().st_size != entry.length:
            return f"{path} is missing or not {entry.length} bytes long"
    return None


def damaged_file(directory: Path) -> str | None:
    """Return the first file that cannot be read or whose checksum is not the record's; None if all agree. Reads all."""
    record = _read_record(directory)
    if record is None:
        return PREPARED_NAME
    for entry in record.files:
        try:
            checksum = _checksum(directory / entry.name)
        except OSError:
            return entry.name
        if checksum != entry.checksum:
            return entry.name
    return None


def prompts_directory(directory: Path, key: PreparedKey) -> Path | None:
    """Return where a copy's model for prompts lies; None if there is none, or it cannot be used."""
    prompts = directory / PROMPTS_NAME
    if not prompts.is_dir():
        return None
    reason = check_prepared(prompts, key)
    if reason is not None:
        logger.warning("prompts are computed with the weights for decoding: %s", reason)
        return None
    return prompts


def prepare(package: Path, root: Path, *, key: PreparedKey | None = None, prompts: Prompts = "none") -> Path:
    """Make the copy of a package for this machine unless a good one is there; remove copies of it with other keys.

    Safe to interrupt and run again: the copy appears under its name only when it is whole and on disk.

    Args:
        package: The package directory.
        root: Directory of the copies; made if missing.
        key: The key to use; None: this machine's.
        prompts: Whether to add a model for prompts, if the package can have one; ``faster``: if it pays here.

    Returns:
        The copy's directory.

    Raises:
        PackageError: If the package cannot be read or run.
        DiskFullError: If there is too little space.
        StoreError: If the file system refuses otherwise.
        EngineError: If the runtime fails, or the copy would compute other values than the package.
    """
    key = prepared_key(package) if key is None else key
    directory = prepared_directory(root, key)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_stale(root, key, keep=directory)
        if _is_good(directory, key, prompts != "none"):
            return directory
        _check_space(package, root)
        temporary = root / f".{directory.name}.{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            _write_copy(package, temporary, key, prompts)
            _replace_directory(temporary, directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise StoreError(f"{directory}: cannot write the prepared copy: {error}") from error
    return directory


def main(arguments: list[str] | None = None) -> int:
    """Prepare a package from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="lamplighter_agent.engine.prepare", description=__doc__.partition("\n")[0])
    parser.add_argument("package", type=Path, help="package directory")
    parser.add_argument("root", type=Path, help="directory of the prepared copies")
    parser.add_argument("--prompts", action="store_true", help="add weights for prompts if they are faster here")
    options = parser.parse_args(arguments)
    try:
        directory = prepare(options.package, options.root, prompts="faster" if options.prompts else "none")
    except LamplighterError as error:
        sys.stderr.write(f"error: {error.diagnostics()}\n")
        return error.exit_code
    sys.stdout.write(f"{directory}\n")
    return 0


def _read_record(directory: Path) -> PreparedRecord | None:
    try:
        return msgspec.json.decode((directory / PREPARED_NAME).read_bytes(), type=PreparedRecord)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def _is_good(directory: Path, key: PreparedKey, prompts: bool) -> bool:
    """Read a copy through; return whether nothing is wrong or missing, its model for prompts included."""
    record = _read_record(directory)
    if record is None or (prompts and not record.prompts):
        return False
    copies = [directory, *([directory / PROMPTS_NAME] if (directory / PROMPTS_NAME).is_dir() else [])]
    return all(check_prepared(copy, key) is None and damaged_file(copy) is None for copy in copies)


def _write_copy(package: Path, directory: Path, key: PreparedKey, prompts: Prompts) -> None:
    check_operators(package / MODEL_NAME)
    save_prepacked(package / MODEL_NAME, directory, threads=physical_cores())
    align_external_data(directory / MODEL_NAME, directory / WEIGHTS_NAME)
    _check_same(package, directory)
    if prompts != "none":
        _add_prompts(package, directory, key, keep=prompts == "always")
    _write_record(directory, key, prompts=prompts != "none")


def _add_prompts(package: Path, directory: Path, key: PreparedKey, *, keep: bool) -> None:
    """Add the model for prompts to a copy that was just made, if it pays here or is to be kept anyway."""
    if shutil.disk_usage(directory).free < _PROMPTS_DISK_FACTOR * _unpacked_bytes(package):
        logger.warning("%s has no room for weights that compute prompts faster", directory)
        return
    prompts = directory / PROMPTS_NAME
    try:
        if not write_prompt_copy(package, prompts, threads=physical_cores()):
            return
        useful = keep or pays(directory, read_manifest(package), threads=physical_cores())
    except EngineError as error:
        logger.warning("prompts are computed with the weights for decoding: %s", error.message)
        useful = False
    if useful:
        _write_record(prompts, key)
    else:
        shutil.rmtree(prompts, ignore_errors=True)


def _write_record(directory: Path, key: PreparedKey, *, prompts: bool = False) -> None:
    """Write the checksums of a finished copy beside it, and all of it to the disk."""
    files = []
    for name in (MODEL_NAME, WEIGHTS_NAME):
        path = directory / name
        files.append(PreparedFile(name=name, length=path.stat().st_size, checksum=_checksum(path)))
        _sync(path)
    record = directory / PREPARED_NAME
    record.write_bytes(msgspec.json.encode(PreparedRecord(key=key, files=tuple(files), prompts=prompts)))
    _sync(record)
    _sync(directory)


def _check_same(package: Path, directory: Path) -> None:
    """Check that the copy computes exactly what the package does: a copy that maps wrongly gives no error itself."""
    manifest = read_manifest(package)
    built, mapped = (_probe(path / MODEL_NAME, manifest) for path in (package, directory))
    if not np.array_equal(built, mapped):
        raise EngineError(
            f"the prepared copy of {manifest.reference} computes other values than the package",
            hint="the package runs as built; tell the maintainers the CPU and the onnxruntime version",
        )


def _probe(model_path: Path, manifest: Manifest) -> FloatArray:
    """Return the logits behind a short prompt and behind one decode step after it, float32 [2, logits width]."""
    tests = manifest.self_tests
    prompt = list(tests[0].prompt_tokens[:_PROBE_TOKENS]) if tests else list(range(min(8, manifest.model.vocab_size)))
    cache = KVCache(CacheSpec.from_model(manifest.model), slots=1, capacity=len(prompt) + 1)
    runner = ModelRunner(ModelSession(model_path, manifest, threads=physical_cores()), cache)
    return np.stack([runner.prefill(0, prompt), runner.decode([prompt[0]])[0]])


def _replace_directory(temporary: Path, directory: Path) -> None:
    """Move a finished copy to its name; a bad one that is there goes first."""
    if directory.exists():
        discarded = temporary.with_name(f"{temporary.name}.old")
        directory.rename(discarded)
        shutil.rmtree(discarded, ignore_errors=True)
    temporary.rename(directory)
    _sync(directory.parent)


def _remove_stale(root: Path, key: PreparedKey, *, keep: Path) -> None:
    """Remove this package's copies for other CPUs and runtimes, and what interrupted runs left."""
    for path in root.iterdir():
        record = _read_record(path) if path != keep and not path.name.startswith(".") else None
        unfinished = path.name.startswith(f".{keep.name}.")
        if unfinished or (record is not None and record.key.package == key.package):
            shutil.rmtree(path, ignore_errors=True)


def _check_space(package: Path, root: Path) -> None:
    needed = _DISK_FACTOR * _unpacked_bytes(package)
    free = shutil.disk_usage(root).free
    if free < needed:
        raise DiskFullError(
            f"{root}: preparing {package.name} needs about {needed} bytes, but {free} are free",
            hint="free space, or run without prepared copies",
        )


def _unpacked_bytes(package: Path) -> int:
    """Return the bytes of the weights as the kernels read them: codes of five and six bits are eight there."""
    return max((package / WEIGHTS_NAME).stat().st_size, read_manifest(package).memory.weights_bytes)


def _checksum(path: Path) -> int:
    """Return the CRC-32 of the sums of a file's blocks: of their 64-bit words, modulo 2**64, the last one padded.

    A change within one word always changes the sum of its block.
    """
    checksum, piece = 0, bytearray(_PIECE_BYTES)
    words = np.frombuffer(piece, dtype="<u8").reshape(-1, _BLOCK_BYTES // 8)
    with path.open("rb") as stream:  # buffered: a piece is short at the end only
        while count := stream.readinto(piece):
            piece[count:] = bytes(_PIECE_BYTES - count)
            checksum = zlib.crc32(words.sum(axis=1, dtype=np.uint64).astype("<u8").tobytes(), checksum)
    return checksum


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
