"""Files on the Hugging Face hub: what is wrong is said at once, before any download tries again and again."""

from __future__ import annotations

from attnreuse.errors import AttnReuseError

PATIENCE = 10.0  # seconds to wait for an answer


def is_online(repo: str, filename: str, revision: str | None = None) -> bool:
    """Can `filename` of `repo` be downloaded? False: the hub cannot be reached, but an earlier download is at hand.

    Raises:
        AttnReuseError: it cannot be had; the message says why.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        get_hf_file_metadata(hf_hub_url(repo, filename, revision=revision), timeout=PATIENCE)
    except HFValidationError as error:
        raise AttnReuseError(f"{repo!r} is neither a folder nor a hub name such as 'user/name'") from error
    except EntryNotFoundError as error:
        raise AttnReuseError(f"{repo} on the hub has no file {filename}") from error
    except RepositoryNotFoundError as error:
        raise AttnReuseError(f"there is no {repo} on the hub, or it is private: hf auth login") from error
    except HfHubHTTPError as error:
        raise AttnReuseError(f"the hub does not give {repo}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # of whatever carries requests, or offline mode
        if isinstance(try_to_load_from_cache(repo, filename, revision=revision), str):
            return False
        raise AttnReuseError(
            f"{repo} is neither a file nor a folder here, and the hub cannot be reached: "
            f"{str(error) or type(error).__name__}"
        ) from error
    return True
