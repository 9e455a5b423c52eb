"""Lets the registry's torchvision be imported beside a CPU build of torch, in environments of tests: here, and in
tests/parity.

That torchvision was built against CUDA, so its compiled half does not load, and importing the other half fails since it
names operators of the compiled one. transformers' processors need the Python half alone. The operators are declared
just before that import, and never called. Beside a CUDA build, which torchvision fits, nothing is done.

vLLM looks at models in processes of its own, so a .pth file brings this module into each of them.
"""

import importlib.abc
import sys

OPERATORS = (
    "nms",
    "qnms",
    "roi_align",
    "qroi_align",
    "_roi_align_backward",
    "ps_roi_align",
    "_ps_roi_align_backward",
    "roi_pool",
    "_roi_pool_backward",
    "ps_roi_pool",
    "_ps_roi_pool_backward",
    "deform_conv2d",
    "_deform_conv2d_backward",
)
KEEP = []  # a library's operators go with it


class Declare(importlib.abc.MetaPathFinder):
    """Finds nothing; declares the operators when torchvision is first looked for."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and not KEEP:
            import torch

            if torch.version.cuda is not None:
                return
            library = torch.library.Library("torchvision", "DEF")
            KEEP.append(library)
            for operator in OPERATORS:
                library.define(f"{operator}(Tensor a, Tensor b, float c) -> Tensor")


sys.meta_path.insert(0, Declare())
