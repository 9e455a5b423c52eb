"""Benchmarks as data: a friendly name to lmms-eval's exact tasks, its metric, and the conditions.

Data only; evaluate/ runs them. To add a benchmark, add an entry to SUITES.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from zipr1.core.errors import InputError

# The version of lmms-eval whose tasks and metrics these are, and that the tests run.
LMMS_EVAL = "0.7.3"
# The embedded benchmarks as lmms-eval reads them, by its own command line too.
TASK_FILES = Path(__file__).with_name("tasks")


@dataclass(frozen=True)
class Task:
    """One lmms-eval task. metric: the keys whose values are added up. hub, config, split: its data set.

    videos: where its code looks for clips, below HF_HOME.
    """

    name: str
    metric: tuple[str, ...]
    hub: str = ""
    config: str | None = None
    split: str = "test"
    videos: str | None = None


@dataclass(frozen=True)
class Suite:
    """A benchmark. Scores are shown from 0 to `top`, higher is better.

    scale: lmms-eval's number times this is the shown score. average: the score over this counts in averages (0 to 100).
    units: how samples make the score, a name in evaluate/scores.py. max_new_tokens: longest answer. frames, fps,
    frame_pixels: most frames of a clip, how many a second, most pixels of each, for dense and sparse alike.
    pairs: questions come in groups of this many, which a limit must not cut.
    """

    name: str
    kind: Literal["image", "video"]
    tasks: tuple[Task, ...]
    top: float = 100.0
    scale: float = 1.0
    average: float = 1.0
    units: str = "mean"
    max_new_tokens: int = 16
    frames: int = 64
    fps: float | None = 2.0
    frame_pixels: int = 256 * 28 * 28
    limit: int | None = None
    pairs: int = 1

    @property
    def metric(self) -> str:
        return "+".join(self.tasks[0].metric)


# MVBench's folder of clips for each kind of question, as its authors packed them.
MVBENCH = {
    "action_antonym": "ssv2_video_mp4",
    "action_count": "perception/videos",
    "action_localization": "sta/sta_video_segment",
    "action_prediction": "star/Charades_segment",
    "action_sequence": "star/Charades_segment",
    "character_order": "perception/videos",
    "counterfactual_inference": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/video_fps3_hq_segment",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "fine_grained_pose": "nturgbd_convert",
    "moving_attribute": "clevrer/video_validation",
    "moving_count": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_segment",
    "object_shuffle": "perception/videos",
    "scene_transition": "scene_qa/video",
    "state_change": "perception/videos",
    "unexpected_action": "FunQA_test/test",
}

# fmt: off
SUITES: dict[str, Suite] = {suite.name: suite for suite in (
    Suite("digits", "image", (Task("digits", ("exact_match",)),), scale=100, limit=400, max_new_tokens=6),
    Suite("moving_digits", "video", (Task("moving_digits", ("exact_match",)),), scale=100, limit=200,
          max_new_tokens=6, frames=16, fps=None),
    Suite("pages", "image", (Task("pages", ("exact_match",)),), scale=100, limit=400, max_new_tokens=6),
    Suite("page_clips", "video", (Task("page_clips", ("exact_match",)),), scale=100, limit=200,
          max_new_tokens=6, frames=16, fps=None),
    Suite("page_totals", "image", (Task("page_totals", ("exact_match",)),), scale=100, limit=200, max_new_tokens=6),
    Suite("mme", "image", (Task("mme", ("mme_perception_score", "mme_cognition_score"), "lmms-lab-encoder/MME"),),
          top=2800, average=28, units="mme", pairs=2),
    Suite("mmbench", "image",
          (Task("mmbench_en_dev_static", ("gpt_eval_score",), "lmms-lab-encoder/MMBench", "en", "dev"),),
          units="mmbench", max_new_tokens=1024),
    Suite("mmstar", "image", (Task("mmstar", ("average",), "Lin-Chen/MMStar", None, "val"),),
          scale=100, units="mmstar", max_new_tokens=128),
    Suite("chartqa", "image", (Task("chartqa", ("relaxed_overall",), "lmms-lab-encoder/ChartQA"),), scale=100),
    Suite("textvqa", "image", (Task("textvqa_val", ("exact_match",), "lmms-lab-encoder/textvqa", None, "validation"),),
          scale=100, max_new_tokens=32),
    Suite("ocrbench", "image", (Task("ocrbench", ("ocrbench_accuracy",), "echo840/OCRBench"),),
          top=1000, scale=1000, average=10, max_new_tokens=128),
    Suite("mmmu_pro", "image",
          (Task("mmmu_pro_standard", ("mmmu_acc",), "MMMU/MMMU_Pro", "standard (10 options)"),
           Task("mmmu_pro_vision", ("mmmu_acc",), "MMMU/MMMU_Pro", "vision")),
          scale=100, max_new_tokens=256),
    Suite("videomme", "video",
          (Task("videomme", ("videomme_perception_score",), "lmms-eval/Video-MME", videos="videomme/data"),)),
    Suite("mvbench", "video",
          tuple(Task(f"mvbench_{kind}", ("mvbench_accuracy",), "OpenGVLab/MVBench", kind, "train",
                     f"mvbench_video/{folder}") for kind, folder in MVBENCH.items()),
          frames=16, fps=None),
    Suite("longvideobench", "video",
          (Task("longvideobench_val_v", ("lvb_acc",), "longvideobench/LongVideoBench", None, "validation",
                "datasets/longvideobench/videos"),),
          scale=100, max_new_tokens=32),
    Suite("mlvu", "video", (Task("mlvu_dev", ("mlvu_percetion_score",), "sy1998/MLVU_dev", videos="mlvu"),),
          units="mlvu"),
    Suite("egoschema", "video",
          (Task("egoschema_subset", ("score",), "lmms-eval/egoschema", "Subset", videos="egoschema/videos"),),
          scale=100),
    Suite("nextqa", "video",
          (Task("nextqa_mc_test", ("exact_match",), "lmms-eval/NExTQA", "MC", videos="nextqa/NExTVideo"),),
          scale=100, max_new_tokens=32),
)}
# fmt: on

EMBEDDED = ("digits", "moving_digits", "pages", "page_clips", "page_totals")
GROUPS = {
    "image": ("mme", "mmbench", "mmstar", "chartqa", "textvqa", "ocrbench", "mmmu_pro"),
    "video": ("videomme", "mvbench", "longvideobench", "mlvu", "egoschema", "nextqa"),
}
GROUPS["paper13"] = GROUPS["image"] + GROUPS["video"]
# Of those, the ones whose task files ask for a login to the hub (`token: True`), whether or not the data needs one.
WITH_LOGIN = tuple(name for name in GROUPS["paper13"] if name not in ("textvqa", "mmmu_pro"))


def resolve(names: Sequence[str], others: Sequence[str] = ()) -> list[Suite]:
    """The suites that names mean, each once; groups are opened. others: lmms-eval's own task names, taken as they are.

    Raises InputError for an unknown name, with the nearest one, and for no name at all.
    """
    if not names:
        raise InputError(
            "--tasks: names no benchmark; give some, such as mmbench,videomme; zipr1 eval --tasks list shows them"
        )
    suites: dict[str, Suite] = {}
    for name in names:
        members = GROUPS.get(name, (name,))
        for member in members:
            if member in SUITES:
                suites[member] = SUITES[member]
            elif member in others:
                suites[member] = Suite(member, "image", (Task(member, ()),), max_new_tokens=0)
            else:
                known = [*SUITES, *GROUPS, *others]
                near = difflib.get_close_matches(member, known, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise InputError(
                    f"--tasks {member}: unknown; {hint}allowed: {', '.join([*SUITES, *GROUPS])}, "
                    "or the name of a task of lmms-eval; zipr1 eval --tasks list shows them"
                )
    return list(suites.values())


def check_p_values(given: Sequence[float]) -> None:
    """Raise InputError for a value of --budget that is no share of the score mass."""
    for p in given:
        if not 0 < p <= 1:
            raise InputError(
                f"--budget {p}: outside (0, 1]; give shares such as 0.975, or 1.0 for dense"
            )
