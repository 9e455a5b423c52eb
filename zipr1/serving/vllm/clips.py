"""Clips that come by URL are read as in training: the same reader, and the same frames by the family's own rule.

vLLM would take two frames a second, an even number of them, by another reader.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoBackend

from zipr1.core.load import load_written
from zipr1.core.recipe import Data
from zipr1.data.video import FrameRule, read_chosen
from zipr1.models.families import frame_rule

NAME = "zipr1"


@VIDEO_LOADER_REGISTRY.register(NAME)
class Clips(VideoBackend):
    """Named in `options`; called by vLLM for each clip."""

    @classmethod
    def load_bytes(
        cls, data: bytes, num_frames: int = -1, fps: float = -1, **kwargs: Any
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """A clip's file -> frames uint8 `(F, H, W, 3)`, and what vLLM wants to know. -1: all frames, any fps. Of kwargs
        `frame_rule`: the fields of a FrameRule."""
        with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
            file.write(data)
            file.flush()
            frames, chosen, rate, total = read_chosen(
                Path(file.name),
                num_frames if num_frames > 0 else None,
                fps if fps > 0 else None,
                FrameRule(**kwargs.get("frame_rule", {})),
            )
        return frames, {
            "total_num_frames": total,
            "fps": rate,
            "duration": total / rate if rate else 0.0,
            "video_backend": NAME,
            "frames_indices": chosen.tolist(),
            "do_sample_frames": False,
        }


def options(folder: str) -> dict[str, Any]:
    """What `--media-io-kwargs` would say of `video`, for a folder that was exported from a run."""
    path = Path(folder) / "recipe.yaml"
    data = load_written(path).data if path.is_file() else Data()
    return {
        "video_backend": NAME,
        "num_frames": data.max_frames,
        "fps": -1 if data.fps is None else data.fps,
        "frame_rule": asdict(frame_rule(folder)),
    }
