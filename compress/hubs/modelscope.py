"""ModelScope through its client, with its environment variables (MODELSCOPE_ENDPOINT, MODELSCOPE_API_TOKEN, MODELSCOPE_CACHE)."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from compress.errors import MissingError
from compress.hubs.repository import RemoteFile, Report, Repository, content_digest, range_deadline, take_range, valid_response

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")

if TYPE_CHECKING:
    from modelscope_hub import HubApi, ProgressCallback


def list_files(source: str, revision: str) -> Repository:
    """Pin a model repository: request the list of files of a branch or tag, without fetching any.

    ModelScope does not return a branch's commit; the pin is a digest over its files' SHA-256, which files fetched later must match.

    Raises:
        MissingError: the client is not installed, there is no such repository or revision, or the hub cannot be reached.
    """
    remedy = "use another endpoint (MODELSCOPE_ENDPOINT), or a local copy as source"
    with translated_errors(source, revision), valid_response(source, remedy):
        entries = _api(source).list_repo_files(source, "model", revision=revision)
        files = tuple(
            RemoteFile(name=entry.path, size=entry.size, content=f"sha256:{entry.sha256}") for entry in entries if not entry.is_dir
        )
    without_digest = [file.name for file in files if not _SHA256.fullmatch(file.sha256 or "")]
    if without_digest:
        raise MissingError(
            f"{source}: the hub gives no SHA-256 of {without_digest[0]}, so it cannot be pinned; use a local copy as source"
        )
    # The pin must not move: a branch that is pushed to meanwhile gives files whose SHA-256 the client then refuses.
    commit = content_digest({file.name: file.content for file in files})
    return Repository(kind="model", source=source, revision=revision, commit=commit, files=files)


def fetch(repository: Repository, files: Sequence[RemoteFile], report: Report) -> Path:
    """Fetch files of a pinned repository into the client's cache, each checked against its SHA-256, and return their folder.

    Raises:
        MissingError: a file cannot be fetched, or is not the one that was pinned.
    """
    folder = Path()
    with translated_errors(repository.source, repository.revision):
        downloader = _api(repository.source).downloader
        for file in files:
            bar, reported = _bar(report)
            path = downloader.download_file(
                repository.source,
                "model",
                file.name,
                revision=repository.revision,
                expected_sha256=file.sha256,
                file_size=file.size,
                progress_callbacks=[bar],
            )
            # A cached file is not reported by the client's bar.
            report(max(0, file.size - sum(reported)))
            folder = path.parents[len(PurePosixPath(file.name).parts) - 1]
    return folder


def read_range(repository: Repository, name: str, start: int, end: int) -> bytes:
    """Return the bytes of a file from `start` up to `end`, fewer where the file ends before.

    Raises:
        MissingError: they cannot be fetched.
    """
    with translated_errors(repository.source, repository.revision):
        client = _api(repository.source).legacy
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        deadline = range_deadline()
        with client.download_stream(repository.source, "model", name, repository.revision, headers) as response:
            skipped = start if response.status_code == 200 else 0  # a server without support of ranges sends the whole file
            chunks = iter(lambda: response.raw.read1(1 << 16), b"")  # read1 returns what has arrived; read waits for a full buffer
            return take_range(repository.source, chunks, skipped, end - start, deadline)


@contextmanager
def translated_errors(source: str, revision: str) -> Generator[None]:
    """Translate the client's errors into errors with a remedy."""
    try:
        import requests
        from modelscope_hub import errors
    except ModuleNotFoundError as error:
        raise MissingError(
            f'{source}: ModelScope\'s client is not installed; run pip install "vlm-compress[modelscope]"'
        ) from error
    try:
        yield
    except (errors.AuthenticationError, errors.PermissionDeniedError) as error:
        raise MissingError(f"{source}: ModelScope refuses access; set MODELSCOPE_API_TOKEN to a token that may read it") from error
    except errors.NotExistError as error:
        raise MissingError(
            f"{source}: ModelScope has no such model with a revision {revision!r}; correct model.source, or set model.revision "
            "(the usual branch there is master)"
        ) from error
    except (errors.FileIntegrityError, errors.FileDownloadError) as error:
        raise MissingError(
            f"{source}: a file changed or was damaged since {revision} was pinned ({error.message}); run the command again"
        ) from error
    except (errors.HubError, requests.RequestException) as error:
        reason = str(error).strip().splitlines()[0]
        raise MissingError(
            f"{source}: ModelScope cannot be reached or refuses ({reason}); check the network or MODELSCOPE_ENDPOINT, "
            "or name a local folder as model.source"
        ) from error


def _api(source: str) -> HubApi:
    from modelscope_hub import HubApi, HubConfig

    endpoint = HubApi(config=HubConfig()).resolve_endpoint_for_read(source)
    return HubApi(config=HubConfig(endpoint=endpoint))


def _bar(report: Report) -> tuple[type[ProgressCallback], list[int]]:
    from modelscope_hub import ProgressCallback

    reported = list[int]()

    class Bar(ProgressCallback):
        """Reports the client's progress."""

        def update(self, size: int) -> None:
            reported.append(size)
            report(size)

    return Bar, reported
