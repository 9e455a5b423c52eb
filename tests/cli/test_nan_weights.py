"""Weights that are no numbers: every command ends before anything is measured or written, and names the tensor."""

import pytest
import tinyruns
from commands import call
from safetensors.torch import load_file, save_file

import zipr1
from zipr1.core import checksums
from zipr1.core.errors import InputError
from zipr1.core.rundir import save_state

NAME = "model.layers.1.mlp.down_proj.weight"
SAID = "layers.1.mlp.down_proj.weight holds NaN in float32"


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A run whose weights hold one NaN and have the hash of that."""
    evaluation = {"before": False}
    root = tinyruns.make_run(tmp_path_factory.mktemp("nan") / "run", evaluation=evaluation)
    save_state((root / "last").resolve(), {}, {})
    path = next((root / "last").resolve().glob("model/*.safetensors"))
    tensors = load_file(path)
    tensors[NAME].view(-1)[7] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    checksums.write((root / "last").resolve(), 7)
    return root


@pytest.mark.parametrize("command", ["eval", "profile", "export", "train", "dry run", "resume"])
def test_a_command_names_the_tensor(broken, tmp_path, command):
    if command == "eval":
        pytest.importorskip("lmms_eval")
    recipe = tinyruns.write(tmp_path / "r.yaml", broken)
    # Its last step is done: a larger number goes on from the broken weights.
    arguments = {
        "eval": [
            "eval",
            "--model",
            broken,
            "--tasks",
            "digits",
            "--limit",
            1,
            "-o",
            tmp_path / "out",
        ],
        "profile": ["profile", "--model", broken, "--lengths", 32, "-o", tmp_path / "out"],
        "export": ["export", broken, "--to", tmp_path / "out"],
        "train": ["train", recipe, "-o", tmp_path / "out"],
        "dry run": ["train", recipe, "--dry-run"],
        "resume": ["train", "--resume", broken, "train.steps=9"],
    }[command]
    before = tinyruns.hashes((broken / "last" / "model").resolve())
    code, said = call(*arguments, "--device", "cpu")
    assert code == 2 and SAID in said and said.count(SAID) == 1, said
    assert "Traceback" not in said and not (tmp_path / "out").exists()
    assert tinyruns.hashes((broken / "last" / "model").resolve()) == before


def test_load_names_the_tensor(broken):
    with pytest.raises(InputError, match=SAID):
        zipr1.load(str(broken), device="cpu")
