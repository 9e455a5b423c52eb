"""A run directory: everything a run leaves behind, written so that a kill at any moment costs little.

    DIR/recipe.yaml        the resolved recipe
        run.json           versions, seed, command, hardware, git
        metrics.jsonl      a line a step
        rollouts.jsonl     sampled answers
        summary.json       before and after
        checkpoints/step-000100/...     complete once its complete.json is there
        last -> checkpoints/step-000100
        best -> checkpoints/step-000100      the one whose answers and tokens were worth most

A checkpoint of step N holds the state after N steps: steps 0 to N - 1 are done, and step N comes next. Nothing is
pickled: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zipr1.core.errors import InputError, RunError
from zipr1.core.files import check_folder, replacing, sync, write_whole
from zipr1.core.jsontext import dumps, lines, loads
from zipr1.core.load import differences, load_written
from zipr1.core.recipe import Recipe

if TYPE_CHECKING:
    import torch

COMPLETE = "complete.json"
RUNS = Path("runs")


def new_folder(name: str, base: Path = RUNS) -> Path:
    """A folder that does not exist yet: `runs/<name>-<date>-<time>`, with a counter where that is taken."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for tail in ("", *(f"-{i}" for i in range(2, 1000))):
        path = base / f"{stem}{tail}"
        if not path.exists():
            return path
    raise RunError(f"{base}: a thousand runs called {stem} are there; clear some away")


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
        """Starts a run, or goes on with one of the same recipe.

        output: None makes a new folder under runs/ from `name`. resume: `auto` goes on with a run found in
        `output`, `never` insists on an empty folder, anything else is the run directory to go on with.
        info: what `run.json` is to hold; a resumed run adds it to the list `resumed`.
        """
        run = cls(cls.check(recipe, output, resume) or new_folder(name), recipe)
        if run._is_empty():
            run._start(info or {})
        else:
            run._continue(resume, info or {})
        return run

    @classmethod
    def check(cls, recipe: Recipe, output: Path | None, resume: str) -> Path | None:
        """The folder that `open` would use, None for a new one; nothing is written. Raises InputError as `open` does,
        and for a folder that cannot be written."""
        if resume not in ("auto", "never"):
            if output is not None and output.resolve() != Path(resume).resolve():
                raise InputError(
                    f"--resume {resume} and --output {output} name two folders; a run goes on in its own: "
                    "leave --output out"
                )
            output = Path(resume)
            if not (output / "recipe.yaml").is_file():
                raise InputError(f"{output}: not a run directory (no recipe.yaml); check --resume")
        if output is None:
            return None
        check_folder(output, "--output")
        run = cls(output, recipe)
        if not run._is_empty():
            run._refuse_another(resume)
        return output

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint; half-written ones are passed over."""
        found = (self.root / "checkpoints").glob("step-*")
        for path in sorted(found, key=_step_of, reverse=True):
            if is_complete(path):
                return path
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
        with _disk(final):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            try:
                write(temporary)
                sizes = {}
                for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
                    sync(path)
                    sizes[path.relative_to(temporary).as_posix()] = path.stat().st_size
                write_whole(temporary / COMPLETE, dumps({"step": step, "files": sizes}, indent=2))
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
        with _disk(self.root / name):
            write_whole(self.root / name, dumps(values, indent=2) + "\n")

    def _is_empty(self) -> bool:
        if not self.root.exists():
            return True
        if not self.root.is_dir():
            raise InputError(f"{self.root}: this is a file; give a folder to --output")
        with _disk(self.root):
            return all(p.name.startswith(".tmp-") for p in self.root.iterdir())

    def _start(self, info: Mapping[str, Any]) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            (self.root / "checkpoints").mkdir(exist_ok=True)
            write_whole(self.root / "recipe.yaml", self.recipe.dump())
        except OSError as error:
            raise InputError(
                f"{self.root}: cannot be written ({error.strerror}); give another --output"
            ) from None
        self.write_json("run.json", info)

    def _refuse_another(self, resume: str) -> None:
        """Raises InputError unless what lies in the folder can be gone on with: a run of the same recipe, or of one
        with fewer steps."""
        written = self.root / "recipe.yaml"
        if not written.is_file():
            if [p.name for p in self.root.iterdir()] == ["checkpoints"]:  # killed while starting
                return
            raise InputError(
                f"{self.root}: the folder is not empty and holds no run; give another --output"
            )
        if resume == "never":
            raise InputError(
                f"{self.root}: holds a run of this recipe; go on with --resume auto, or give another --output"
            )
        old = load_written(written)
        changed = differences(old, self.recipe)
        more = self.recipe.train.steps > old.train.steps
        if changed and not (more and len(changed) == 1):
            raise InputError(
                f"{self.root}: holds a run of another recipe ({', '.join(changed)}); "
                "give another --output, or the recipe and overrides of that run (train.steps may grow)"
            )

    def _continue(self, resume: str, info: Mapping[str, Any]) -> None:
        self._refuse_another(resume)
        written = self.root / "recipe.yaml"
        if not written.is_file():
            return self._start(info)
        if differences(load_written(written), self.recipe):  # more steps
            with _disk(written):
                write_whole(written, self.recipe.dump())
        self.checkpoint = self.latest_checkpoint()
        for left in self.root.glob(".tmp-*"):  # of a write that a kill cut short
            left.unlink(missing_ok=True)
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            self._truncate(name, self.start_step)
        run = read_json(self.root / "run.json") if (self.root / "run.json").is_file() else {}
        again = {**info, "from_step": self.start_step}
        self.write_json("run.json", {**run, "resumed": [*run.get("resumed", []), again]})

    def _append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        if not self.writes:
            return
        text = "".join(dumps(row) + "\n" for row in rows)
        with _disk(self.root / name), (self.root / name).open("a", encoding="utf-8") as file:
            file.write(text)

    def _truncate(self, name: str, step: int) -> None:
        """Drops the lines of `step` and later, and a last line that a kill cut short."""
        path = self.root / name
        if not path.is_file():
            return
        with _disk(path), replacing(path) as temporary, temporary.open("wb") as kept:
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


def is_complete(checkpoint: Path) -> bool:
    """Whether every file that complete.json names is there with its size."""
    try:
        files = loads((checkpoint / COMPLETE).read_bytes())["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


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
    with _disk(folder / name):
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


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: no readable JSON ({error}); the run directory is damaged"
        ) from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: a JSON object is expected; the run directory is damaged")
    return values


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


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """What the disk refuses becomes one line with the path."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(
            f"{path}: cannot be written ({reason}); free some space or mend the permissions, then resume"
        ) from error
