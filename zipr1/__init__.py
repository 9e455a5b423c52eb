"""ZipR1: reinforcement learning that teaches a vision-language model to look at fewer tokens.

    import zipr1
    model, processor = zipr1.load("runs/tiny")       # a trained run, an exported folder, any model
    answer = model.generate(**inputs)                # sparse, as it was trained
    print(zipr1.stats(model))                        # tokens kept, by layer
    with zipr1.sparse(model, budget=1.0): ...        # exactly dense in here

Importing this loads no torch; calling does.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zipr1.models.sparse.session import Stats

__version__ = "0.1.0"
__all__ = ["__version__", "load", "sparse", "stats"]


def load(
    path: str = "tiny",
    budget: float | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    **settings: Any,
) -> tuple[Any, Any]:
    """A sparse transformers model and its processor: `model, processor = zipr1.load(path)`.

    path: a run directory, a folder made by `zipr1 export`, a model folder, a hub id, or `tiny`. budget: p, the share
    of score mass kept, in (0, 1]; 1.0 is exactly dense; None takes what the run was trained for, 0.975 for other
    models. settings: other keys of a recipe's `sparse` section, such as `kv="retain"` or `dense_below=0`, and of its
    `model` section `revision`, `min_pixels`, `max_pixels`, `max_frame_pixels` and `trust_remote_code`, in place of the
    run's; no file of a folder can set the last one. device: None takes CUDA where there is one. dtype: float32,
    bfloat16 or float16; None is float32 on a CPU and that of the weights elsewhere.

    The model is transformers' own class: `generate`, pipelines and padded batches work as usual. On an NVIDIA GPU,
    loading switches cuDNN's attention off for the process, which plans anew for each length of its input; undo it with
    `torch.backends.cuda.enable_cudnn_sdp(True)`.
    """
    from zipr1.models.api import load

    return load(str(path), budget, device, dtype, settings)


def sparse(model: Any, budget: float | None = None, **settings: Any) -> AbstractContextManager[Any]:
    """`with zipr1.sparse(model, budget=0.9):` a transformers model in memory is sparse inside, without training.

    budget and settings as for `load`; what is not given is the model's own if `load` made it, else the defaults of a
    recipe's `sparse` section. Blocks may be nested or overlap, in one thread or several; the newest that has not ended
    counts, for all threads. Raises InputError for other families.
    """
    from zipr1.core.recipe import Sparse
    from zipr1.models.api import changed
    from zipr1.models.sparse import session

    base = session.session_of(model).settings or Sparse()
    return session.sparse(model, changed(base, budget, settings, "zipr1.sparse"))


def stats(model: Any) -> Stats:
    """What the model's last prompt kept in each layer, as seen by this thread; printable."""
    from zipr1.models.sparse import session

    return session.session_of(model).stats()
