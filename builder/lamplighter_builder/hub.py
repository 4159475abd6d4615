"""Models by hub id: ``owner/name``, ``owner/name/file.gguf``, each with ``@revision`` if it is not the main branch.

The hub's own client downloads and caches; ``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HOME`` and ``HF_HUB_OFFLINE`` mean what
they mean to it. Only weights in safetensors or GGUF, JSON, templates and notices are fetched: no code, no pickles.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from lamplighter_agent.errors import CheckpointError

_HUB_ID: Final = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(/(?P<file>[\w./-]+\.gguf))?(@(?P<revision>[\w./-]+))?",
    re.ASCII,
)
_SHARD: Final = re.compile(r"-\d{5}-of-\d{5}$", re.ASCII)
_FILES: Final = ("model*.safetensors", "model.safetensors.index.json", "*.jinja")
_NOTICES: Final = ("README.md", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*")
_JSON_FILES: Final = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class HubId:
    """What a hub id names.

    Attributes:
        repository: ``owner/name``.
        file: A GGUF file in it, or None for a directory of safetensors.
        revision: Branch, tag or commit; None for the main branch.
    """

    repository: str
    file: str | None
    revision: str | None

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """Return the parts of a hub id, None if it is none."""
        match = _HUB_ID.fullmatch(text)
        return None if match is None else cls(match["repository"], match["file"], match["revision"])

    @property
    def name(self) -> str:
        """What a package is named after: the file without its ending, or the repository without its owner."""
        return self.repository.split("/")[1] if self.file is None else _SHARD.sub("", Path(self.file).stem)

    @property
    def patterns(self) -> list[str]:
        """Names of the files that are needed; all parts of a split GGUF file."""
        if self.file is None:
            return [*_FILES, *_JSON_FILES, *_NOTICES]
        return [_SHARD.sub("-*", self.file.removesuffix(".gguf")) + ".gguf", "README.md"]


@dataclass(frozen=True, slots=True)
class Downloaded:
    """A model in the hub client's cache.

    Attributes:
        path: The directory, or the GGUF file.
        source: Hub id with the commit, for the provenance.
    """

    path: Path
    source: str


def download(hub_id: HubId, cache: Path | None) -> Downloaded:
    """Bring a model into the cache, if it is not there yet, and return where it is.

    Args:
        hub_id: What to fetch.
        cache: Directory of the cache; None for the hub client's own.

    Raises:
        CheckpointError: If it cannot be fetched; the message tells whether the network, the id or the rights are why.
    """
    import huggingface_hub

    try:
        snapshot = Path(
            huggingface_hub.snapshot_download(
                hub_id.repository, revision=hub_id.revision, cache_dir=cache, allow_patterns=hub_id.patterns
            )
        )
    except Exception as error:  # errors of the client's HTTP library are not all its own
        _explain(hub_id, error)
    path = snapshot if hub_id.file is None else snapshot / hub_id.file
    if not path.exists():
        raise CheckpointError(f"{hub_id.repository}: there is no file {hub_id.file} at this revision")
    source = f"{hub_id.repository}@{snapshot.name}" + ("" if hub_id.file is None else f"/{hub_id.file}")
    return Downloaded(path, source)


def _explain(hub_id: HubId, error: Exception) -> NoReturn:
    from huggingface_hub import errors, is_offline_mode

    repository, hint = hub_id.repository, None
    if isinstance(error, errors.GatedRepoError):
        why = "its owner gives access on request only"
        hint = "accept its terms on the hub's page, then log in with 'hf auth login' or set HF_TOKEN"
    elif isinstance(error, errors.RevisionNotFoundError):
        why = f"it has no revision {hub_id.revision!r}"
    elif isinstance(error, errors.RepositoryNotFoundError):
        why = "there is no such repository, or it is private"
        hint = "check the id; for a private one, log in with 'hf auth login' or set HF_TOKEN"
    elif isinstance(error, errors.LocalEntryNotFoundError):
        state = "the client is offline (HF_HUB_OFFLINE)" if is_offline_mode() else "the hub cannot be reached"
        why = f"it is not, or not completely, in the cache, and {state}"
        hint = "check the network, choose the cache that has it with -c, or give the path of a model directory or file"
    else:
        why = str(error).strip().partition("\n")[0] or type(error).__name__
    raise CheckpointError(f"{repository}: is no local directory, and the download failed: {why}", hint=hint) from error
