"""The Hugging Face hub through huggingface_hub, with its environment variables (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, HF_HOME)."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from compress.errors import MissingError, UsageError
from compress.files import disk_errors, write_text
from compress.hubs.repository import RemoteFile, Report, Repository, range_deadline, take_range, valid_response
from compress.untrusted.limits import limits

Kind = Literal["model", "dataset"]


def list_files(kind: Kind, source: str, revision: str) -> Repository:
    """Pin a repository: request the commit of `revision` and the list of its files, without fetching any.

    Where the hub cannot be reached, the cached state of that revision is used.

    Raises:
        MissingError: there is no such repository or revision, it is gated, or neither hub nor cache has it.
        UsageError: `source` cannot be a repository's name.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    with translated_errors(kind, source, revision):
        try:
            api = HfApi()
            request_info = api.model_info if kind == "model" else api.dataset_info
            with valid_response(source, "try another endpoint (HF_ENDPOINT)"):
                # With the files' metadata: their SHA-256 are the model's digest, without fetching a weight.
                info = request_info(source, revision=revision, files_metadata=True, timeout=limits().hub_seconds)
        except (httpx.TransportError, OfflineModeIsEnabled):
            cached = _cached(kind, source, revision)
            if cached is None:
                raise
            return cached
    if info.sha is None:
        raise MissingError(f"{source}: the hub does not say which commit {revision} is; try another endpoint (HF_ENDPOINT)")
    files = tuple(
        RemoteFile(
            name=entry.rfilename,
            size=entry.size or 0,
            # Small files have no SHA-256 on the hub: git's blob id is a digest of their content as well.
            content=f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git:{entry.blob_id}",
        )
        for entry in info.siblings or ()
    )
    _cache_commit(kind, source, revision, info.sha)
    return Repository(kind=kind, source=source, revision=revision, commit=info.sha, files=files)


def fetch(repository: Repository, files: Sequence[RemoteFile], report: Report) -> Path:
    """Fetch files of a pinned repository into huggingface_hub's cache, and return the folder of that commit.

    Fetched files are checked against the hub's SHA-256, where it lists one.

    Raises:
        MissingError: a file cannot be fetched, or arrived damaged twice.
        StoreError: the cache cannot be written, or the disk is full.
    """
    from huggingface_hub import constants

    with translated_errors(repository.kind, repository.source, repository.revision), disk_errors(Path(constants.HF_HUB_CACHE)):
        for file in files:
            if cached(repository, file) is not None:
                report(file.size)
            # Once more: a connection that broke in a proxy may leave a file of the right name and the wrong bytes.
            elif not _download(repository, file, report) and not _download(repository, file, lambda count: None):
                raise MissingError(f"{repository.source}: {file.name} arrived damaged twice; check the network or HF_ENDPOINT")
        return _snapshot(repository)


def cached(repository: Repository, file: RemoteFile) -> Path | None:
    """Return the path of a pinned repository's file in the cache; None where it is not cached."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repository.source, file.name, revision=repository.commit, repo_type=repository.kind)
    return Path(path) if isinstance(path, str) else None


def _download(repository: Repository, file: RemoteFile, report: Report) -> bool:
    """Fetch a file; return whether its size and SHA-256 are those that the hub lists, and remove it where they are not."""
    from huggingface_hub import HfApi

    path = Path(
        HfApi().hf_hub_download(
            repository.source, file.name, repo_type=repository.kind, revision=repository.commit, tqdm_class=_bar(report)
        )
    )
    if _is_intact(path, file):
        return True
    # Link and blob: the client would otherwise take the damaged blob for fetched.
    path.resolve().unlink()
    path.unlink(missing_ok=True)
    return False


def read_range(repository: Repository, name: str, start: int, end: int) -> bytes:
    """Return the bytes of a file from `start` up to `end`, fewer where the file ends before.

    Raises:
        MissingError: they cannot be fetched.
    """
    from huggingface_hub import HfApi, hf_hub_url, utils

    path = _snapshot(repository) / name
    if path.is_file():
        with path.open("rb") as file:
            file.seek(start)
            return file.read(end - start)
    url = hf_hub_url(repository.source, name, revision=repository.commit, endpoint=HfApi().endpoint)
    # Identity: a compressed body's bytes are not the file's.
    headers = {**utils.build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    deadline = range_deadline()
    with (
        translated_errors(repository.kind, repository.source, repository.revision),
        utils.get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=limits().hub_seconds) as response,
    ):
        utils.hf_raise_for_status(response)
        skipped = start if response.status_code == 200 else 0  # a server without support of ranges sends the whole file
        return take_range(repository.source, response.iter_raw(), skipped, end - start, deadline)


@contextmanager
def translated_errors(kind: Kind, source: str, revision: str) -> Generator[None]:
    """Translate the hub client's errors into errors with a remedy."""
    import httpx
    from huggingface_hub import HfApi, errors

    page = f"{HfApi().endpoint}/{'datasets/' if kind == 'dataset' else ''}{source}"
    try:
        yield
    except errors.HFValidationError as error:
        raise UsageError(f"{source!r}: is no {kind} id such as org/name; correct the source in the recipe") from error
    except errors.GatedRepoError as error:
        raise MissingError(
            f"{source}: is gated; accept its licence at {page} and set HF_TOKEN to a token of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise MissingError(f"{source}: no such {kind} at {page}, or a private one; correct the source, or set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise MissingError(f"{source}: has no revision {revision!r}; name one listed at {page}/tree/main") from error
    except errors.OfflineModeIsEnabled as error:
        raise MissingError(
            f"{source}: not in the cache at revision {revision!r}, and HF_HUB_OFFLINE is set; unset it once, or name a local "
            "path as source"
        ) from error
    except errors.EntryNotFoundError as error:
        raise MissingError(
            f"{source}: a file cannot be had ({_first_line(error)}); check the network, or name another source"
        ) from error
    except errors.HfHubHTTPError as error:
        raise MissingError(f"{source}: {HfApi().endpoint} answered {_first_line(error)}; try again, or set HF_TOKEN") from error
    except httpx.TransportError as error:
        raise MissingError(
            f"{source}: {HfApi().endpoint} cannot be reached ({_first_line(error)}) and the cache does not have it; "
            "check the network, set HF_ENDPOINT to a mirror, or name a local path as source"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _bar(report: Report) -> Any:
    from tqdm import tqdm

    class Bar(tqdm):  # pyright: ignore[reportMissingTypeArgument] - the class itself takes none
        """Reports the client's progress, and displays nothing."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})
            report(int(kwargs.get("initial") or 0))

        def update(self, n: float | None = 1) -> bool | None:
            report(int(n or 0))
            return None

        def update_transfer(self, n: float | None = 1) -> None:
            """Ignore the count of transferred bytes: `update` counts those of the file."""

    return Bar


def _is_intact(path: Path, file: RemoteFile) -> bool:
    if path.stat().st_size != file.size:
        return False
    if file.sha256 is None:
        return True
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256


def _storage(kind: Kind, source: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"{kind}s--{source.replace('/', '--')}"


def _snapshot(repository: Repository) -> Path:
    return _storage(repository.kind, repository.source) / "snapshots" / repository.commit


def _cache_commit(kind: Kind, source: str, revision: str, commit: str) -> None:
    """Write the commit of a revision to the cache, as the client does for requests by revision.

    A read-only cache is left alone: missing files raise an error when they are fetched.
    """
    # The client reads `refs` when it is offline: requests by commit, which are the only ones made here, would leave none.
    path = _storage(kind, source) / "refs" / revision
    if revision == commit or _commit_of(path) == commit:
        return
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, commit)


def _commit_of(reference: Path) -> str | None:
    """Return the commit in a file of the cache's `refs`; None where it does not exist."""
    try:
        return reference.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _cached(kind: Kind, source: str, revision: str) -> Repository | None:
    """Return the cached state of a revision, which may have fewer files than the hub's; None where nothing is cached."""
    storage = _storage(kind, source)
    commit = _commit_of(storage / "refs" / revision) or revision
    folder = storage / "snapshots" / commit
    paths = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    if not paths:
        return None
    files = tuple(
        RemoteFile(name=path.relative_to(folder).as_posix(), size=path.stat().st_size, content=_content(path)) for path in paths
    )
    return Repository(kind=kind, source=source, revision=revision, commit=commit, files=files)


def _content(path: Path) -> str:
    """Return a cached file's digest; blobs are named by their SHA-256 or git's SHA-1."""
    name = path.resolve().name
    if len(name) == 64:
        return f"sha256:{name}"
    if len(name) == 40:
        return f"git:{name}"
    with path.open("rb") as file:  # a copy, where the file system has no links
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
