"""`zipr1 export RUN --to DIR`: a trained run as a folder that other tools take for an ordinary model.

A format is one file with `write` and `reload`, and a line in FORMATS. The folder is made beside its final place,
read back, checked against the run (verify.py) and only then moved there: what has the name is finished. The same
run gives the same bytes.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from zipr1.core import activity
from zipr1.core.errors import InputError, RunError
from zipr1.core.files import sync, writing
from zipr1.core.jsontext import dumps
from zipr1.core.lock import locked
from zipr1.core.recipe import Model
from zipr1.export import adapter, merged
from zipr1.export.card import model_card, provenance, results
from zipr1.export.request import check_request
from zipr1.export.source import Source, open_run
from zipr1.export.verify import compare, reference
from zipr1.models import manifest
from zipr1.models.loading import WEIGHT_DTYPES, choose_device
from zipr1.models.open import adapter_of, open_model, resolve
from zipr1.models.policy import Policy

__all__ = ["FORMATS", "export"]

FORMATS: dict[str, ModuleType] = {"merged": merged, "adapter": adapter}


def export(
    run: str | Path,
    to: str | Path,
    format: str = "merged",
    dtype: str = "auto",
    device: str | None = None,
    checkpoint: str | None = None,
) -> dict[str, Any]:
    """Write a checkpoint of `run` (`last`, `best`, or a step's number; None: the last, or what `run` itself is) to the
    new folder `to`, and return what was written and checked.

    dtype: of the weights; `auto` is that of the trained weights, or of the base that an adapter belongs to. Loading
    and checking are done in float32 on `device` (None: CUDA where there is one).

    Raises InputError for wrong arguments and for a `to` that is there already, RunError if the folder does not say
    what the run says. Nothing stays behind then, nor when it is interrupted.
    """
    folder = Path(to)
    check_request(Path(run), folder, format, dtype, checkpoint)
    activity.tell(f"opening {run}: step", 1, 4)
    source = open_run(Path(run), checkpoint)
    check(source, format)
    chosen = source.dtype() if dtype == "auto" else dtype
    place, kind = choose_device(device), FORMATS[format]

    settings = Model(path=str(source.weights), dtype="float32")
    opened = open_model(settings, place, merge_adapter=False)
    model, processor, peft_model = opened.model, opened.processor, opened.peft_model
    policy = Policy(model, processor, str(run), opened.settings)
    activity.tell("asking the run a few questions: step", 2, 4)
    wanted = reference(policy, source.recipe)
    with _new_folder(folder) as temporary:
        activity.tell(f"writing {to}: step", 3, 4)
        written = kind.write(source, model, peft_model, processor, WEIGHT_DTYPES[chosen], temporary)
        activity.tell("reading it back and asking it the same questions: step", 4, 4)
        checked = compare(
            wanted,
            kind.reload(source, temporary, written, place),
            policy,
            source.recipe.train.max_new_tokens,
            chosen,
        )
        if not checked["logits_error"] <= checked["limit"]:
            raise RunError(
                f"{run}: the exported weights do not say what the run says (logits differ by "
                f"{checked['logits_error']:.2%}, {checked['limit']:.2%} are allowed in {chosen}); nothing was written; "
                "try --dtype float32"
            )
        del written
        gc.collect()
        about = describe(source, format, chosen, temporary)
        (temporary / manifest.NAME).write_text(dumps(about, indent=2) + "\n", encoding="utf-8")
        card = model_card(source, about)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        shutil.copyfile(source.root / "recipe.yaml", temporary / "recipe.yaml")
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
    return {
        "run": str(run),
        "to": str(folder),
        "format": format,
        "dtype": chosen,
        "step": source.step,
        "stopped": source.stopped or None,
        "p": source.recipe.sparse.p,
        "bytes": sum(files.values()),
        "files": files,
        "check": checked,
    }


def check(source: Source, format: str) -> None:
    """Whether the run has what the format takes; nothing is loaded. Raises InputError."""
    if format == "adapter":
        if source.trained_on is None:
            raise InputError(
                f"{source.root}: trained all weights and has no adapter; use --format merged"
            )
        if adapter_of(resolve(source.trained_on.path)) is not None:
            raise InputError(
                f"{source.root}: its adapter was trained on another run's, and peft loads one on whole models alone; "
                "use --format merged"
            )


def describe(source: Source, format: str, dtype: str, folder: Path) -> dict[str, Any]:
    """The values of zipr1.json."""
    return {
        "zipr1": manifest.VERSION,
        "format": format,
        "dtype": dtype,
        "base": {"path": source.base, "revision": source.revision},
        "sparse": source.recipe.sparse.model_dump(mode="json"),
        "results": results(source),
        "provenance": provenance(source),
        "weights": manifest.weights(folder),
    }


@contextmanager
def _new_folder(final: Path) -> Iterator[Path]:
    """A folder beside `final` that takes its place when the block ends well, and is gone otherwise. Raises InputError
    where another process makes it, and RunError where the disk refuses."""
    temporary = final.with_name(f".tmp-{final.name}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--to {final}: cannot be written ({error.strerror}); give another folder"
        ) from None
    with locked(final.with_name(f".tmp-{final.name}.lock"), final), writing(final, "export again"):
        shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
        made = [temporary]
        try:
            temporary.mkdir()
            yield temporary
            for path in temporary.iterdir():
                path.chmod(0o644)  # safetensors writes files that others cannot read
                sync(path)
            if final.is_dir():
                final.rmdir()  # empty, or this fails and nothing is lost
            os.replace(temporary, final)
            made.append(final)
            sync(final.parent)
        except BaseException:
            for path in made:
                shutil.rmtree(path, ignore_errors=True)
            raise
