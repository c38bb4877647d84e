"""A sequence on the Hub as it is at one commit."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .index import INDEX, Index
from .requests import HubApi, retried
from .schema import MAX_INDEX, MAX_JSON

_AT_ONCE = 500  # paths of a question


def remote_state(api: HubApi, repo_id: str, revision: str) -> tuple[str, Index | None]:
    """The commit at a revision and the index there, `None` only if the repository really has none."""
    commit = retried(api.repo_info, repo_id, revision=revision).sha
    return commit, remote_index(api, repo_id, commit)


def remote_index(api: HubApi, repo_id: str, commit: str) -> Index | None:
    """The index at a commit, `None` only if there is none."""
    sizes = remote_sizes(api, repo_id, commit, [INDEX])
    if INDEX not in sizes:
        return None
    check_size(repo_id, INDEX, sizes[INDEX])
    return Index.read(Path(retried(api.hf_hub_download, repo_id, INDEX, revision=commit)))


def remote_sizes(api: HubApi, repo_id: str, commit: str, names: list[str]) -> dict[str, int]:
    """Bytes of those of the files that are there."""
    sizes: dict[str, int] = {}
    for start in range(0, len(names), _AT_ONCE):
        found = retried(api.get_paths_info, repo_id, names[start : start + _AT_ONCE], revision=commit)
        sizes |= {file.path: file.size for file in found if hasattr(file, "size")}
    return sizes


def check_size(repo_id: str, name: str, size: int) -> None:
    """Raises a `ValueError` for JSON that is too large to be what it should be, before it is fetched."""
    limit = MAX_INDEX if name == INDEX else MAX_JSON
    if name.endswith(".json") and size > limit:
        raise ValueError(f"{name} in {repo_id} has {size} bytes, expected at most {limit}. It is not fetched.")


def fetch_files(api: HubApi, repo_id: str, commit: str, names: list[str]) -> None:
    """Fetches those of the files that are there into the cache of `huggingface_hub`."""
    sizes = remote_sizes(api, repo_id, commit, names)
    for name, size in sizes.items():
        check_size(repo_id, name, size)
    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(lambda name: retried(api.hf_hub_download, repo_id, name, revision=commit), sizes))
