"""Benchmarks from files: the embedded ones, made when asked for, and copies in `--data-root`.

lmms-eval's own task YAML is included and its data set replaced, so that its code runs unchanged. Clips are linked to
where that code looks for them, below a HF_HOME of our own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from zipr1.core.errors import InputError
from zipr1.evaluate.suites import LMMS_EVAL, SUITES, TASK_FILES, Suite, Task

CLIPS = (".mp4", ".mkv", ".avi", ".mov", ".webm")
EMBEDDED_QUESTIONS = 2000


def overlay(task: Task, yaml: Path, files: Sequence[Path], folder: Path) -> Path:
    """A YAML in `folder` that is `yaml` with the data set in `files`."""
    values = {
        "include": str(yaml),
        "task": task.name,
        "dataset_path": "parquet" if files[0].suffix == ".parquet" else "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {task.split: [str(f) for f in files]}},
    }
    path = folder / f"{task.name}.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    return path


def embedded(suite: Suite, folder: Path, limit: int | None) -> None:
    """The overlay of an embedded benchmark: the held-out questions of training runs, the first `limit` of them."""
    values = {
        "include": str(TASK_FILES / f"{suite.name}.yaml"),
        "task": suite.name,
        "dataset_kwargs": {"questions": min(limit or EMBEDDED_QUESTIONS, EMBEDDED_QUESTIONS)},
    }
    (folder / f"{suite.name}.yaml").write_text(json.dumps(values))  # JSON is YAML


def copies(suite: Suite, root: Path, folder: Path, tasks_folder: Path) -> None:
    """Overlays of a benchmark whose parquet files and clips lie anywhere below root/<suite>, and links to the clips.

    folder: where overlays go; HF_HOME is to be folder/home. tasks_folder: lmms-eval's YAMLs.
    Raises InputError if something is missing.
    """
    source = root / suite.name
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; {how_to_get(suite, root)}")
    tables = sorted(source.rglob("*.parquet")) or sorted(source.rglob("*.json"))
    for task in suite.tasks:
        yaml = next(iter(sorted(tasks_folder.rglob(f"{task.name}.yaml"))), None)
        if yaml is None:
            raise InputError(f"lmms-eval has no task {task.name}; install lmms-eval=={LMMS_EVAL}")
        files = [f for f in tables if _is_of(f.relative_to(source), task, len(suite.tasks) > 1)]
        if not files:
            expected = (
                f"{task.config}/{task.split}-*.parquet"
                if task.config
                else f"{task.split}-*.parquet"
            )
            raise InputError(f"{source}: has no {expected}; {how_to_get(suite, root)}")
        overlay(task, yaml, files, folder)
    link_clips(suite, source, folder / "home")


def link_clips(suite: Suite, source: Path, home: Path) -> None:
    """Every clip below `source` under the name and folder that lmms-eval's code looks for."""
    clips = [p for p in source.rglob("*") if p.suffix.lower() in CLIPS]
    for folder in {task.videos for task in suite.tasks if task.videos}:
        below = home / folder
        below.mkdir(parents=True, exist_ok=True)
        # MVBench's kinds of question have a folder each: where that is kept, names need not be unique.
        tail = Path(*Path(folder).parts[1:]) if len(suite.tasks) > 1 else Path()
        near = [p for p in clips if str(tail) in str(p.parent)] if tail.parts else []
        for clip in near or clips:
            targets = {clip.name, _relative(clip, source)}
            for target in targets:
                path = below / target
                path.parent.mkdir(parents=True, exist_ok=True)
                if not path.exists():
                    path.symlink_to(clip.resolve())


def _relative(clip: Path, source: Path) -> str:
    """The last folder and the name: MLVU and NExT-QA keep clips in numbered folders."""
    parts = clip.relative_to(source).parts
    return "/".join(parts[-2:])


def _is_of(path: Path, task: Task, several: bool) -> bool:
    """Whether a parquet file (below its benchmark's folder) holds this task's split."""
    if several and task.config:
        # A hub repository's layout: <config>/<split>-00000-of-00001.parquet.
        return any(part == task.config or part.startswith(f"{task.config}.") for part in path.parts)
    split_named = path.name.startswith(task.split)
    other_configs = (
        len(path.parts) > 1 and task.config and path.parts[0] not in (task.config, "data")
    )
    return split_named and not other_configs


def how_to_get(suite: Suite, root: Path | None, hub: str = "") -> str:
    """The exact commands that bring a benchmark's data, on a machine that has network and login and on this one.

    hub: its data set where the suite does not name one.
    """
    hub = suite.tasks[0].hub or hub
    if suite.name not in SUITES:
        return f"on a machine with a network: hf download --repo-type dataset {hub}, then copy its HF_HOME here"
    base = root or Path("data")
    command = f"hf download --repo-type dataset {hub} --local-dir {base / suite.name}"
    unpack = f", unpack its archives in {base / suite.name}" if suite.kind == "video" else ""
    again = f"zipr1 eval --tasks {suite.name} --data-root {base}"
    return f"on a machine with a network: {command}{unpack}, then: {again}"
