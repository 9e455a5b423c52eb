"""`zipr1 export --push OWNER/NAME`: the folder to the hub, by the hub's own client, into a private repository."""

from __future__ import annotations

import re
from pathlib import Path

from zipr1.core import activity, hub
from zipr1.core.errors import InputError, RunError
from zipr1.core.text import reason


def check(name: str) -> None:
    """Raises InputError for what can be known wrong before anything is exported: the name, no network, no login."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"--push {name}: give the repository as OWNER/NAME")
    if hub.asked_offline():
        raise InputError("--push: HF_HUB_OFFLINE is set; unset it, or leave --push out")
    if not hub.logged_in():
        raise InputError(f"--push: nobody is logged in to the hub; {hub.LOGIN}")


def upload(folder: Path, name: str) -> str:
    """Makes the private repository `name` and puts the files of `folder` there; returns its address.

    A repository that is there keeps its visibility and gets a new commit. Raises RunError where the hub refuses; the
    folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # of all that goes wrong on the way

    activity.tell(f"uploading to {name}")
    api = HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="A run exported by zipr1"
        )
    except (HTTPError, OSError) as error:
        raise RunError(
            f"--push {name}: the hub did not take it ({reason(error)}); {folder} is complete: "
            f"hf upload {name} {folder} tries again"
        ) from error
    return str(address)
