"""A draft by its directory or by its name on the Hub, and the way back there.

From the Hub come the configuration and safetensors, of one commit. Pickles come only where there
are no safetensors, and code never: not even to lie unused in the cache.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_CONFIG = "config.json"
_SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
_PICKLES = ("*.bin", "*.bin.index.json", "*.pt")
_SUBFOLDERS = "*/*"

# What a former push may have left and a reader would mix with the new weights.
_WRITTEN_WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")


def local_directory(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """Finds a draft's directory, or downloads it into the Hub's cache.

    Offline (``HF_HUB_OFFLINE=1``, or no connection) the cache is used as it is.

    Args:
        path_or_id: a directory, which is taken as it is, or a Hub id such as
            ``"organisation/name"``.
        revision: a branch, tag or commit on the Hub; by default ``main``.
        token: for the Hub; by default the one of ``hf auth login``.
        cache_dir: of the Hub's files; by default huggingface_hub's own.
        local_files_only: never asks the Hub.

    Returns:
        The directory, with ``config.json`` and weights if it comes from the Hub.

    Raises:
        NotADirectoryError: the path is a file.
        FileNotFoundError: there is no such directory, repository, revision, or no weights in it; or
            the Hub cannot be asked and the cache does not have it.
        PermissionError: the repository is gated.
        OSError: the Hub refuses. Errors within a download are huggingface_hub's own.
    """
    path = Path(path_or_id)
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{path} is a file; expected a draft's directory, or a Hub id")
    repo_id = os.fspath(path_or_id)

    def download(patterns: tuple[str, ...], commit: str | None) -> Path:
        return Path(
            snapshot_download(
                repo_id,
                revision=commit,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=local_files_only,
                allow_patterns=[_CONFIG, *patterns],
                ignore_patterns=[_SUBFOLDERS],
            )
        )

    with _explained(repo_id, revision, cache_dir, local_files_only):
        folder = download(_SAFETENSORS, revision)
        if not _has(folder, _SAFETENSORS):
            folder = download(_PICKLES, folder.name)  # the folder's name is the commit
    if not _has(folder, _SAFETENSORS + _PICKLES):
        found = ", ".join(sorted(file.name for file in folder.iterdir()))
        raise FileNotFoundError(
            f"{repo_id} has no weights: {folder} holds {found or 'nothing'}; expected "
            "model.safetensors, shards with an index, or pytorch_model.bin. If it was filled in "
            "part, connect to the Hub once"
        )
    return folder


def push(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Uploads a saved draft to the Hub, in one commit.

    Weights of a former push that the directory no longer has are deleted; other files stay.

    Args:
        directory: what ``save_pretrained`` wrote.
        repo_id: ``"organisation/name"``; the repository is made if there is none.
        private: whether a new repository is private; by default as the organisation has it.
        token: for the Hub; by default the one of ``hf auth login``.
        revision: the branch, made if there is none; by default ``main``.
        commit_message: by default ``"Upload draft model"``.

    Returns:
        The commit's address.

    Raises:
        FileNotFoundError: the directory has no ``config.json``.
        ValueError: the id is not valid, or the Hub refuses what README.md says.
        OSError: the Hub refuses. Errors of the connection are huggingface_hub's own.
    """
    directory = Path(directory)
    if not (directory / _CONFIG).is_file():
        raise FileNotFoundError(
            f"{directory} has no {_CONFIG}; expected a directory that save_pretrained wrote"
        )
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=directory,
        revision=revision,
        commit_message=commit_message or "Upload draft model",
        delete_patterns=list(_WRITTEN_WEIGHTS),
    )
    return str(commit.commit_url)


def _has(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


@contextlib.contextmanager
def _explained(
    repo_id: str,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> Iterator[None]:
    """Turns the Hub's answers into errors that say what to do."""
    neither = f"there is no directory {repo_id!r}, and"
    try:
        yield
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{neither} it is no Hub id either ({error}); expected a draft's directory, or an id "
            "such as 'organisation/name'"
        ) from None
    except GatedRepoError as error:
        raise PermissionError(
            f"{repo_id} is gated; accept its terms at {constants.ENDPOINT}/{repo_id} and give a "
            "token of that account (hf auth login, or token=...)"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{neither} {constants.ENDPOINT} shows no repository of that name; check the name, and "
            "give a token if it is private (hf auth login, or token=...)"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id} has no revision {revision!r}; expected a branch, tag or whole commit hash"
        ) from error
    except LocalEntryNotFoundError as error:
        if local_files_only:
            reason = "local_files_only is set"
        elif constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set"
        else:
            reason = f"{constants.ENDPOINT} cannot be reached"
        raise FileNotFoundError(
            f"{neither} {reason}, and the cache {cache_dir or constants.HF_HUB_CACHE} does not "
            f"have all of {repo_id} at revision {revision or 'main'!r}; connect to the Hub once, "
            "or give a directory"
        ) from error
