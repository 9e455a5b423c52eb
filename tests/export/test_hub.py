"""`zipr1 export --push`: private, by the hub's own client, and refused in one line before anything is exported."""

import huggingface_hub
import pytest

from zipr1.core.errors import InputError, RunError
from zipr1.export import hub


def test_what_is_refused_before_anything_is_done(monkeypatch):
    with pytest.raises(InputError, match=r"--push mine: give the repository as OWNER/NAME"):
        hub.check("mine")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        hub.check("me/mine")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(InputError, match="nobody is logged in to the hub; hf auth login"):
        hub.check("me/mine")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    hub.check("me/mine")


def test_the_folder_goes_into_a_private_repository(tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, name, private, exist_ok):
            calls.append((name, private, exist_ok))
            return f"hub/{name}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append((repo_id, folder_path))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert hub.upload(tmp_path, "me/mine") == "hub/me/mine"
    assert calls == [("me/mine", True, True), ("me/mine", tmp_path)]

    def refuse(self, **options):
        raise OSError("403 Forbidden")

    monkeypatch.setattr(Api, "upload_folder", refuse)
    with pytest.raises(RunError, match=r"did not take it \(403 Forbidden\); .* is complete: hf up"):
        hub.upload(tmp_path, "me/mine")
