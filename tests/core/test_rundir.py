"""A run directory survives kills, refuses strangers and holds nothing but safetensors, YAML and JSON."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from kills import killed

from zipr1.core import checksums, files, machine
from zipr1.core.checksums import is_complete
from zipr1.core.errors import InputError, RunError
from zipr1.core.files import digest
from zipr1.core.folders import claimed, new_folder
from zipr1.core.jsontext import dumps
from zipr1.core.load import load, validate
from zipr1.core.machine import describe
from zipr1.core.recipe import Recipe
from zipr1.core.rundir import (
    RunDir,
    load_state,
    read_json,
    read_lines,
    save_state,
)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "run"


def write(text="weights"):
    def files(folder):
        (folder / "adapter").mkdir()
        (folder / "adapter" / "a.bin").write_text(text)

    return files


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_fresh_run(root):
    run = RunDir.open(Recipe(), root, info={"seed": 3})
    assert (run.checkpoint, run.start_step, run.latest_checkpoint()) == (None, 0, None)
    assert load(root / "recipe.yaml").sha256() == Recipe().sha256()
    assert read_json(root / "run.json") == {"seed": 3}


def test_without_output_a_new_folder_each_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    roots = {RunDir.open(Recipe(), name="tiny").root for _ in range(3)}
    assert len(roots) == 3
    assert all(str(r).startswith("runs/tiny-") for r in roots)
    assert not list(new_folder("tiny").iterdir())  # made for its caller alone


def test_checkpoints_are_complete_linked_and_pruned(root):
    run = RunDir.open(Recipe(), root)
    for step in (1, 2, 10):
        path = run.save_checkpoint(step, write(), keep=2)
    assert names(root / "checkpoints") == ["step-000002", "step-000010"]
    assert (root / "last").resolve() == path.resolve()
    assert os.readlink(root / "last") == "checkpoints/step-000010"
    block = bytes.fromhex("1ad27358")  # by gzip
    about = {"bytes": 7, "crc32": hashlib.sha256(block).hexdigest()}
    assert read_json(path / "complete.json") == {"step": 10, "files": {"adapter/a.bin": about}}
    run.save_checkpoint(10, write("other"), keep=1)
    assert (root / "last" / "adapter" / "a.bin").read_text() == "other"
    assert names(root / "checkpoints") == ["step-000010"]


def test_the_best_checkpoint_outlives_newer_ones(root):
    run = RunDir.open(Recipe(), root)
    for step, best in ((1, True), (2, True), (3, False), (4, False), (5, False)):
        run.save_checkpoint(step, write(str(step)), keep=2, best=best)
    assert names(root / "checkpoints") == ["step-000002", "step-000004", "step-000005"]
    assert (root / "best" / "adapter" / "a.bin").read_text() == "2"
    assert (root / "last" / "adapter" / "a.bin").read_text() == "5"
    run.save_checkpoint(6, write(), keep=1, best=True)
    assert names(root / "checkpoints") == ["step-000006"]


def test_of_several_ranks_one_writes(root):
    RunDir.open(Recipe(), root)
    other = RunDir(root, Recipe())
    other.writes = False
    other.append_metrics({"step": 0})
    other.write_summary({})
    assert other.save_checkpoint(3, write()).name == "step-000003" and other.start_step == 3
    assert names(root) == ["checkpoints", "recipe.yaml", "run.json"]


WRONG = {
    "list": "[1]",
    "deep": "[" * 100_000,
    "endless": '{"files": {"a": {"bytes": 1e999}}}',
    "nul": '{"files": {"a\\u0000b": {"bytes": 1}}}',
}


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("complete.json", "complete.json is missing"),
        ("adapter/a.bin", "adapter/a.bin cannot be read (No such file or directory)"),
        ("short", "adapter/a.bin has 3 bytes and was written with 7"),
        ("bit", "adapter/a.bin is not as it was written: its hash is another"),
        ("list", "complete.json is not as it was written (TypeError)"),
        ("deep", "complete.json is not as it was written (ValueError)"),
        ("endless", "complete.json is not as it was written (OverflowError)"),
        ("nul", "complete.json names 'a\\x00b', which no file can be called"),
    ],
)
def test_damaged_checkpoints_are_passed_over_and_named(root, harm, said, caplog):
    run = RunDir.open(Recipe(), root)
    run.save_checkpoint(5, write())
    newest = run.save_checkpoint(9, write())
    assert is_complete(newest)
    if harm in ("short", "bit"):
        (newest / "adapter/a.bin").write_text("wei" if harm == "short" else "weightr")
    elif harm in WRONG:
        (newest / "complete.json").write_text(WRONG[harm])
    else:
        (newest / harm).unlink()
    (root / "checkpoints" / ".tmp-step-000012").mkdir()
    assert is_complete(newest) == (harm == "bit")  # sizes alone
    again = RunDir.open(Recipe(), root)
    assert (again.start_step, again.checkpoint.name) == (5, "step-000005")
    assert caplog.messages == [f"{newest}: {said}: passed over; going on from step-000005"]
    # With nothing to go on from, a start from the beginning would remove what is there.
    shutil.rmtree(root / "checkpoints" / "step-000005")
    with pytest.raises(InputError) as told:
        RunDir.open(Recipe(), root)
    assert str(told.value).startswith(f"{newest}: {said}; no other checkpoint is whole: bring it")


@pytest.mark.parametrize("name", ["/etc/hostname", "../../secret", "a/../../../secret", "a/.."])
def test_a_checkpoint_that_names_files_outside_of_it_is_damaged(root, name, monkeypatch):
    """They are neither looked at nor read: one might be a device."""
    newest = RunDir.open(Recipe(), root).save_checkpoint(5, write())
    (root / "secret").write_text("x")
    known = {"step": 5, "files": {name: {"bytes": 1, "crc32": digest(root / "secret")}}}
    (newest / "complete.json").write_text(json.dumps(known))
    monkeypatch.setattr(checksums, "digest", None)
    said = f"complete.json names {name}, which is outside of the checkpoint"
    assert checksums.problem(newest) == said and not is_complete(newest)


def test_hashing_goes_on_while_the_disk_is_waited_for(root, monkeypatch):
    """Neither waits for the other to end."""
    meet = threading.Barrier(2, timeout=60)

    def meets(real):
        return lambda path: (meet.wait(), real(path))[1]

    folder = root / "a"
    folder.mkdir(parents=True)
    (folder / "x").write_text("weights")
    monkeypatch.setattr(checksums, "digest", meets(checksums.digest))
    monkeypatch.setattr(checksums, "sync", meets(checksums.sync))
    checksums.write(folder, 3)
    monkeypatch.undo()
    assert checksums.problem(folder) is None
    (folder / "x").write_text("weightz")
    assert checksums.problem(folder) == "x is not as it was written: its hash is another"


def test_hashes_are_of_all_bytes_in_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 4)
    path = tmp_path / "x"
    path.write_bytes(b"abcdefghij")
    blocks = b"".join(crc32(part).to_bytes(4) for part in (b"abcd", b"efgh", b"ij"))
    assert digest(path) == hashlib.sha256(blocks).hexdigest()
    seen = {digest(path)}
    for text in (b"", b"abcd", b"efghabcdij", b"abcdefghijk", *(
        bytes([*b"abcdefghij"[:i], b"abcdefghij"[i] ^ 1, *b"abcdefghij"[i + 1 :]]) for i in range(10)
    )):  # fmt: skip
        path.write_bytes(text)
        assert digest(path) not in seen
        seen.add(digest(path))


@pytest.mark.parametrize("about", ["7", '{"bytes": 7, "digest": "of another kind"}'])
def test_a_checkpoint_of_an_earlier_version_has_sizes_alone(root, about):
    newest = RunDir.open(Recipe(), root).save_checkpoint(5, write())
    (newest / "complete.json").write_text(f'{{"step": 5, "files": {{"adapter/a.bin": {about}}}}}')
    assert checksums.problem(newest) is None and RunDir.open(Recipe(), root).start_step == 5
    (newest / "adapter/a.bin").write_text("wei")
    assert checksums.problem(newest) == "adapter/a.bin has 3 bytes and was written with 7"


def test_a_failed_write_leaves_the_old_checkpoint(root):
    run = RunDir.open(Recipe(), root)
    run.save_checkpoint(5, write())

    def fail(folder):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint(6, fail)
    assert names(root / "checkpoints") == ["step-000005"]
    assert run.latest_checkpoint().name == "step-000005"


def test_resumed_metrics_are_those_of_an_unbroken_run(root):
    run = RunDir.open(Recipe(), root)
    for step in range(6):
        run.append_metrics({"step": step, "kl": step / 10})
        run.append_rollouts([{"step": step, "text": "ä\n"}, {"step": step, "text": "b"}])
        if step == 3:
            run.save_checkpoint(4, write())
    with (root / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "k')  # killed in the middle of a line
    assert len(read_lines(root / "metrics.jsonl")) == 6
    again = RunDir.open(Recipe(), root, info={"command": "x"})
    assert again.start_step == 4
    for step in range(4, 6):
        again.append_metrics({"step": step, "kl": step / 10})
    rows = [{"step": step, "kl": step / 10} for step in range(6)]
    assert read_lines(root / "metrics.jsonl") == rows
    assert [r["step"] for r in read_lines(root / "rollouts.jsonl")] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert read_json(root / "run.json")["resumed"] == [{"command": "x", "from_step": 4}]


def test_a_run_killed_before_its_first_checkpoint_starts_again(root):
    RunDir.open(Recipe(), root).append_metrics({"step": 0})
    again = RunDir.open(Recipe(), root)
    assert again.start_step == 0
    assert read_lines(root / "metrics.jsonl") == []


def test_what_a_killed_write_left_is_cleared_when_the_run_goes_on(root):
    RunDir.open(Recipe(), root)
    (root / ".tmp-metrics-123-456.jsonl").write_text("ha")
    RunDir.open(Recipe(), root)
    assert names(root) == ["checkpoints", "recipe.yaml", "run.json"]


def start(root):
    with claimed(root) as folder:
        RunDir.open(Recipe(), folder, info={"versions": {}, "command": ["x"]})


def test_any_prefix_of_a_start_is_a_fresh_start(tmp_path):
    """Whatever a kill leaves, another run may take the folder, up to the last word: recipe.yaml has its name."""
    other = validate({"seed": 7})
    begun, at = [], 0
    while True:
        at += 1
        root = tmp_path / f"run{at}"
        if not killed(root, at, lambda root=root: start(root)):
            break
        begun.append((root / "recipe.yaml").exists())
        recipe = Recipe() if begun[-1] else other
        with claimed(root) as folder:
            run = RunDir.open(recipe, folder, info={"versions": {}})
            assert (run.start_step, run.checkpoint) == (0, None)
        assert load(root / "recipe.yaml").seed == recipe.seed
        assert names(root) == ["checkpoints", "recipe.yaml", "run.json"]
    # The kill came between all of them, and nearly all of it was before the run had begun.
    assert at > 10 and begun == sorted(begun) and sum(begun) <= 3


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_start_without_space_is_one_line_and_no_run(tmp_path, monkeypatch, error):
    real, calls = {name: getattr(os, name) for name in ("replace", "fsync", "mkdir")}, []

    def failing(name, at):
        def call(*arguments, **options):
            calls.append(name)
            if len(calls) == at:
                raise OSError(error, os.strerror(error))
            return real[name](*arguments, **options)

        return call

    for at in range(1, 100):
        root = tmp_path / f"run{at}"
        calls.clear()
        for name in real:
            monkeypatch.setattr(os, name, failing(name, at))
        try:
            RunDir.open(Recipe(), root, info={"versions": {}})
            said = ""
        except InputError as told:
            said = str(told)
        for name, function in real.items():
            monkeypatch.setattr(os, name, function)
        if not said:
            assert len(calls) < at
            break
        assert said.startswith(f"{root}: cannot be written ({os.strerror(error)})")
        again = RunDir.open(validate({"seed": 7}), root, info={"versions": {}})
        assert again.start_step == 0 and names(root) == ["checkpoints", "recipe.yaml", "run.json"]
    assert at > 5


def test_what_is_no_start_is_left_alone(root):
    """A run.json of something else, a run that lost its recipe, a checkpoint: none is what a start leaves."""
    for name, text in (
        ("run.json", '{"mine": 1}'),
        ("run.json", '{"versions": {}, "resumed": []}'),
        ("run.json", "["),
        ("checkpoints/step-000001", None),
    ):
        shutil.rmtree(root, ignore_errors=True)
        (root / name).parent.mkdir(parents=True)
        (root / name).mkdir() if text is None else (root / name).write_text(text)
        with pytest.raises(InputError):
            RunDir.open(Recipe(), root, info={"versions": {}})
        assert (root / name).exists() and (text is None or (root / name).read_text() == text)


def test_what_is_refused(root, tmp_path):
    RunDir.open(Recipe(), root)
    other = validate({"seed": 7, "train": {"steps": 4}})
    with pytest.raises(InputError, match=r"seed: 0 -> 7, train.steps: 300 -> 4"):
        RunDir.open(other, root)
    with pytest.raises(InputError, match="--resume auto, or give another --output"):
        RunDir.open(Recipe(), root, resume="never")
    with pytest.raises(InputError, match="not a run directory"):
        RunDir.open(Recipe(), None, resume=str(tmp_path / "none"))
    with pytest.raises(InputError, match="two folders"):
        RunDir.open(Recipe(), tmp_path / "other", resume=str(root))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(InputError, match="not empty and holds no run"):
        RunDir.open(Recipe(), tmp_path / "photos")
    assert names(tmp_path / "photos") == ["cat.jpg"]
    with pytest.raises(InputError, match="this is a file"):
        RunDir.open(Recipe(), tmp_path / "photos" / "cat.jpg")
    with pytest.raises(InputError, match="cannot be written"):
        RunDir.open(Recipe(), tmp_path / "photos" / "cat.jpg" / "run")


def test_resume_of_a_named_run(root):
    RunDir.open(Recipe(), root).save_checkpoint(8, write())
    assert RunDir.open(Recipe(), None, resume=str(root)).start_step == 8
    assert RunDir.open(Recipe(), root, resume=str(root)).start_step == 8


def test_a_run_goes_on_with_more_steps_and_with_nothing_else_changed(root):
    RunDir.open(validate({"train": {"steps": 8}}), root).save_checkpoint(8, write())
    longer = validate({"train": {"steps": 12}})
    assert RunDir.open(longer, root).start_step == 8
    assert load(root / "recipe.yaml") == longer
    for changed in ({"train": {"steps": 10}}, {"train": {"steps": 20}, "seed": 1}):
        with pytest.raises(InputError, match=r"another recipe .*train\.steps may grow"):
            RunDir.open(validate(changed), root)
    assert load(root / "recipe.yaml") == longer


def test_what_is_refused_is_known_without_writing(root, tmp_path):
    assert RunDir.check(Recipe(), None, "auto") is None
    assert RunDir.check(Recipe(), root, "auto") == root and not root.exists()
    with pytest.raises(InputError, match="not a run directory"):
        RunDir.check(Recipe(), None, "nosuch")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line_with_the_path(root):
    run = RunDir.open(Recipe(), root)
    (root / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"metrics.jsonl: cannot be written \(No space left"):
        run.append_metrics({"step": 0})

    def fail(folder):
        Path("/dev/full").write_text("x")

    with pytest.raises(RunError, match="step-000001: cannot be written"):
        run.save_checkpoint(1, fail)


def test_kill_at_any_moment_leaves_a_whole_checkpoint(root):
    program = (
        "import sys; from pathlib import Path; from zipr1.core.rundir import RunDir\n"
        "from zipr1.core.recipe import Recipe\n"
        "run = RunDir.open(Recipe(), Path(sys.argv[1]))\n"
        "for step in range(run.start_step, 10**6):\n"
        "    run.append_metrics({'step': step})\n"
        "    run.save_checkpoint(step + 1, lambda f: (f / 'w').write_bytes(bytes(10**6)))\n"
        "    print(step, flush=True)"
    )
    seen = 0
    for wait in (3, 8):
        with subprocess.Popen(
            [sys.executable, "-c", program, str(root)], stdout=subprocess.PIPE, text=True
        ) as process:
            lines = [int(process.stdout.readline()) for _ in range(wait)]
            process.send_signal(signal.SIGKILL)
        assert lines[0] >= seen
        run = RunDir.open(Recipe(), root)
        seen = run.start_step
        assert seen >= lines[-1] + 1
        assert [r["step"] for r in read_lines(root / "metrics.jsonl")] == list(range(seen))
        assert is_complete((root / "last").resolve())


def test_state_round_trip_without_pickle(tmp_path):
    shared = torch.randn(4, 6)
    tensors = {
        "a": shared,
        "view": shared.t(),
        "half": torch.randn(3).bfloat16(),
        "rng": torch.get_rng_state(),
        "none": torch.empty(0),
    }
    save_state(tmp_path, tensors, {"step": 3, "mu": np.float32(0.5)}, name="optim")
    again, meta = load_state(tmp_path, "optim")
    assert meta == {"step": 3, "mu": 0.5}
    assert again.keys() == tensors.keys()
    for key, value in tensors.items():
        torch.testing.assert_close(again[key], value, rtol=0, atol=0)
    assert names(tmp_path) == ["optim.json", "optim.safetensors"]
    (tmp_path / "optim.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match="no readable state"):
        load_state(tmp_path, "optim")


def test_json_is_plain():
    value = {
        "nan": float("nan"),
        "t": torch.tensor([1.5, float("inf")]),
        3: (Path("a"), np.int64(2)),
    }
    assert json.loads(dumps(value)) == {"nan": None, "t": [1.5, None], "3": ["a", 2]}
    with pytest.raises(TypeError, match="object has no JSON form"):
        dumps(object())


def test_run_json_says_what_ran(root, monkeypatch):
    commit = {"commit": "0123456789abcdef" * 2 + "01234567", "changed": True}
    monkeypatch.setattr(machine, "git_commit", lambda: commit)
    info = describe(["zipr1", "train"], device="cpu", seed=4)
    RunDir.open(Recipe(), root, info=info)
    kept = read_json(root / "run.json")
    # The build (+cpu, +cu130) is in one of the two and may be missing in the other.
    assert kept["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"transformers", "peft", "python", "zipr1"} <= kept["versions"].keys()
    assert kept["hardware"]["cpus"] >= 1
    assert kept["hardware"]["memory_bytes"] > 2**28
    assert (kept["seed"], kept["command"]) == (4, ["zipr1", "train"])
    assert kept["git"] == commit


def test_the_commit_is_that_of_our_checkout_and_no_other(tmp_path, monkeypatch):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path / "clone"), *who, *arguments], check=True)

    code = tmp_path / "clone" / "zipr1" / "__init__.py"
    code.parent.mkdir(parents=True)
    code.write_text("one = 1\n")
    monkeypatch.setattr(machine, "HERE", code.parent)
    assert machine.git_commit() is None  # a folder without git
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "someone's project")
    assert machine.git_commit() is None  # installed inside of a repository that does not hold it
    git("add", ".")
    git("commit", "-q", "-m", "ours")
    clean = machine.git_commit()
    assert clean is not None and len(clean["commit"]) == 40 and not clean["changed"]
    code.write_text("one = 2\n")
    assert machine.git_commit() == {**clean, "changed": True}
