"""A run directory: everything a run leaves behind, written so that a kill at any moment costs little.

    DIR/recipe.yaml        the resolved recipe
        run.json           versions, seed, command, hardware, git
        metrics.jsonl      a line a step
        rollouts.jsonl     sampled answers
        summary.json       before and after
        checkpoints/step-000100/...     complete once its complete.json is there, with sizes and hashes of its files
        last -> checkpoints/step-000100
        best -> checkpoints/step-000100      the one whose answers and tokens were worth most

A checkpoint of step N holds the state after N steps: steps 0 to N - 1 are done, and step N comes next. Nothing is
pickled: tensors are safetensors, the rest is JSON. A run has begun once recipe.yaml is there, the last thing that its
start writes; what a start that was cut short has left is no run, and the next start takes the folder.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zipr1.core import checksums, lock
from zipr1.core.errors import InputError
from zipr1.core.files import check_folder, replacing, sync, write_whole, writing
from zipr1.core.folders import folder_of, new_folder
from zipr1.core.jsontext import dumps, lines, loads
from zipr1.core.load import differences, load_written
from zipr1.core.recipe import Recipe
from zipr1.core.records import read, read_json

if TYPE_CHECKING:
    import torch

log = logging.getLogger("zipr1")

# Keys that do not change what a run computes: another value goes on with it.
FREE = ("train.stall_minutes:", "train.diagnose_every:", "alarms.")


class RunDir:
    """One run's folder. Made by `RunDir.open`; `checkpoint` is where to go on from, or None for a fresh start."""

    def __init__(self, root: Path, recipe: Recipe, checkpoint: Path | None = None):
        self.root = root
        self.recipe = recipe
        self.checkpoint = checkpoint
        self.writes = True  # of several ranks the first alone does

    @property
    def start_step(self) -> int:
        """The first step still to do."""
        return _step_of(self.checkpoint) if self.checkpoint else 0

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        output: Path | None = None,
        resume: str = "auto",
        name: str = "run",
        info: Mapping[str, Any] | None = None,
    ) -> RunDir:
        """Starts a run, or goes on with one of the same recipe. Training calls it inside of `folders.claimed`.

        output: None makes a new folder under runs/ from `name`. resume: `auto` goes on with a run found in
        `output`, `never` insists on an empty folder, anything else is the run directory to go on with.
        info: what `run.json` is to hold; a resumed run adds it to the list `resumed`.
        """
        run = cls(cls.check(recipe, output, resume) or new_folder(name), recipe)
        if run._is_new():
            run._start(info or {})
        else:
            run._continue(info or {})
        return run

    @classmethod
    def check(cls, recipe: Recipe, output: Path | None, resume: str) -> Path | None:
        """The folder that `open` would use, None for a new one; nothing is written. Raises InputError as `open` does,
        and for a folder that cannot be written."""
        folder = folder_of(output, resume)
        if folder is None:
            return None
        check_folder(folder, "--output")
        run = cls(folder, recipe)
        if not run._is_new():
            run._refuse_another(resume)
        return folder

    def latest_checkpoint(self) -> Path | None:
        """The newest checkpoint that is as it was written. Newer ones that are not are named in a warning.

        Raises InputError if there are checkpoints and all of them are damaged: to start over would delete them.
        """
        damaged: list[str] = []
        found = [p for p in (self.root / "checkpoints").glob("step-*") if _step_of(p) >= 0]
        for path in sorted(found, key=_step_of, reverse=True):
            problem = checksums.problem(path)
            if problem is None:
                for line in damaged:
                    log.warning("%s: passed over; going on from %s", line, path.name)
                return path
            damaged.append(f"{path}: {problem}")
        if damaged:
            raise InputError(
                f"{damaged[0]}; no other checkpoint is whole: bring it back from a copy, or remove "
                f"{self.root / 'checkpoints'} to start from the beginning"
            )
        return None

    def save_checkpoint(
        self, step: int, write: Callable[[Path], None], keep: int = 2, best: bool = False
    ) -> Path:
        """A checkpoint after `step` steps: `write(folder)` puts the files, the rest makes it all or nothing.

        keep: how many of the newest stay, and the best one. best: whether this one is now that.
        """
        folder = self.root / "checkpoints"
        final, temporary = folder / f"step-{step:06d}", folder / f".tmp-step-{step:06d}"
        if not self.writes:
            self.checkpoint = final
            return final
        with writing(final):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            try:
                write(temporary)
                checksums.write(temporary, step)
                if final.exists():
                    old = folder / f".tmp-old-{step:06d}"
                    shutil.rmtree(old, ignore_errors=True)
                    os.replace(final, old)
                os.replace(temporary, final)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            sync(folder)
            for name in ("last", "best") if best else ("last",):
                link = self.root / f".tmp-{name}"
                link.unlink(missing_ok=True)
                link.symlink_to(Path("checkpoints") / final.name)
                os.replace(link, self.root / name)
            self._prune(final, keep)
        self.checkpoint = final
        return final

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl; `values` holds `step`."""
        self._append("metrics.jsonl", [values])

    def append_rollouts(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Lines of rollouts.jsonl; each row holds `step`."""
        self._append("rollouts.jsonl", rows)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self.write_json("summary.json", summary)

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """A whole JSON file, replaced at once."""
        if not self.writes:
            return
        with writing(self.root / name):
            write_whole(self.root / name, dumps(values, indent=2) + "\n")

    def _is_new(self) -> bool:
        """Whether the folder holds nothing but what a start that was cut short may have left: what it writes before
        recipe.yaml."""
        if not self.root.exists():
            return True
        with writing(self.root):
            for path in self.root.iterdir():
                ours = path.name == lock.NAME or path.name.startswith(".tmp-")
                if path.name == "checkpoints" and path.is_dir():
                    ours = not any(path.iterdir())
                if path.name == "run.json" and path.is_file():
                    values = read_json(path)
                    ours = not values or ("versions" in values and "resumed" not in values)
                if not ours:
                    return False
        return True

    def _start(self, info: Mapping[str, Any]) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._clear()
            (self.root / "checkpoints").mkdir(exist_ok=True)
            write_whole(self.root / "run.json", dumps(info, indent=2) + "\n")
            write_whole(self.root / "recipe.yaml", self.recipe.dump())
        except OSError as error:
            raise InputError(
                f"{self.root}: cannot be written ({error.strerror}); give another --output"
            ) from None

    def _refuse_another(self, resume: str) -> None:
        """Raises InputError unless what lies in the folder can be gone on with: a run of the same recipe, or of one
        with fewer steps."""
        written = self.root / "recipe.yaml"
        if not written.is_file():
            raise InputError(
                f"{self.root}: the folder is not empty and holds no run; give another --output"
            )
        if resume == "never":
            raise InputError(
                f"{self.root}: holds a run of this recipe; go on with --resume auto, or give another --output"
            )
        old = load_written(written)
        changed = [d for d in differences(old, self.recipe) if not d.startswith(FREE)]
        more = self.recipe.train.steps > old.train.steps
        if changed and not (more and len(changed) == 1):
            raise InputError(
                f"{self.root}: holds a run of another recipe ({', '.join(changed)}); "
                "give another --output, or the recipe and overrides of that run (train.steps may grow)"
            )

    def _continue(self, info: Mapping[str, Any]) -> None:
        """After `check`, which has refused what cannot be gone on with."""
        written = self.root / "recipe.yaml"
        if differences(load_written(written), self.recipe):  # more steps
            with writing(written):
                write_whole(written, self.recipe.dump())
        self.checkpoint = self.latest_checkpoint()
        self._clear()
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            self._truncate(name, self.start_step)
        if not (self.root / "run.json").is_file():  # the recipe alone was put there
            return self.write_json("run.json", info)
        run = read(self.root / "run.json", "bring it back from a copy, or remove it")
        again = {**info, "from_step": self.start_step}
        self.write_json("run.json", {**run, "resumed": [*run.get("resumed", []), again]})

    def _clear(self) -> None:
        """Removes what a write that a kill cut short has left."""
        for left in self.root.glob(".tmp-*"):
            left.unlink(missing_ok=True)

    def _append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        if not self.writes:
            return
        text = "".join(dumps(row) + "\n" for row in rows)
        with writing(self.root / name), (self.root / name).open("a", encoding="utf-8") as file:
            file.write(text)

    def _truncate(self, name: str, step: int) -> None:
        """Drops the lines of `step` and later, and a last line that a kill cut short."""
        path = self.root / name
        if not path.is_file():
            return
        with writing(path), replacing(path) as temporary, temporary.open("wb") as kept:
            for line in lines(path):
                if _step_in(line, step) < step:
                    kept.write(line + b"\n")

    def _prune(self, newest: Path, keep: int) -> None:
        """Keeps the `keep` newest checkpoints up to the one just written, and the best; leftovers go."""
        folder = newest.parent
        steps = sorted(folder.glob("step-*"), key=_step_of, reverse=True)
        later = [p for p in steps if _step_of(p) > _step_of(newest)]
        earlier = [p for p in steps if _step_of(p) <= _step_of(newest)]
        best = (self.root / "best").resolve()
        old = [p for p in earlier[max(1, keep) :] if p.resolve() != best]
        for path in [*later, *old, *folder.glob(".tmp-*")]:
            shutil.rmtree(path, ignore_errors=True)
        if not best.exists():
            (self.root / "best").unlink(missing_ok=True)


def save_state(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    meta: Mapping[str, Any],
    name: str = "state",
) -> None:
    """Tensors to `<name>.safetensors`, everything else to `<name>.json`."""
    import torch
    from safetensors.torch import save_file

    # Cloned, for safetensors refuses tensors that share memory.
    plain = {
        key: torch.empty_like(value, device="cpu", memory_format=torch.contiguous_format).copy_(
            value.detach()
        )
        for key, value in tensors.items()
    }
    with writing(folder / name):
        save_file(plain, folder / f"{name}.safetensors")
        write_whole(folder / f"{name}.json", dumps(meta, indent=2))


def load_state(folder: Path, name: str = "state") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """`(tensors, meta)` as given to `save_state`; tensors on the CPU."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / f"{name}.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: no readable state ({error}); resume from another run") from None
    return tensors, read_json(folder / f"{name}.json")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; a last line that was cut short is left out."""
    rows: list[dict[str, Any]] = []
    bad = 0
    try:
        for number, line in enumerate(lines(path), start=1):
            if bad:
                raise InputError(f"{path}:{bad}: not a JSON object; the file is damaged")
            try:
                row = loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            else:
                bad = number
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return rows


def _step_in(line: bytes, default: int) -> int:
    """The step that a line of metrics.jsonl or rollouts.jsonl is of; `default` where it does not say."""
    try:
        row = loads(line)
    except ValueError:
        return default
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else default


def _step_of(path: Path) -> int:
    match = re.fullmatch(r"step-(\d+)", path.name)
    return int(match[1]) if match else -1
