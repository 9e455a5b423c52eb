"""A run as data: the typed sections of a recipe. Reading them from YAML is zipr1/core/load.py.

Every number in the code comes from here. Types are strict: `"3"` and `true` are no numbers. Relative paths in a recipe
start at the working folder. The sections of what is learned are in zipr1/core/objective.py.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from zipr1.core.objective import Budgets, Controller, Efficiency, Guard, Optim, Ppo, Rewards
from zipr1.core.section import Count, Fraction, Pixels, Positive, Prompts, Rate, Section, Share

__all__ = [
    "Alarms",
    "Budgets",
    "Controller",
    "Data",
    "Efficiency",
    "Evaluation",
    "Guard",
    "Log",
    "Lora",
    "Model",
    "Optim",
    "Ppo",
    "Probes",
    "Recipe",
    "Rewards",
    "Sparse",
    "Supervised",
    "Train",
]


class Lora(Section):
    """Low-rank adapters on the language model's projections (peft).
    rank: of the adapters.
    alpha: their output is multiplied by alpha / rank.
    dropout: of their input, in training alone.
    """

    rank: Annotated[int, Field(ge=1, le=16_384)] = 16
    alpha: Annotated[int, Field(ge=1, le=1_000_000)] = 32
    dropout: Fraction = 0.0


class Model(Section):
    """The model that is trained.

    path: `tiny`, a run, a model folder, or a hub id; `scratch` builds `config` with random weights.
    revision: of a hub id: a branch, a tag or a commit.
    dtype: of the weights; `auto` is bfloat16 under adapters on a GPU, else float32. Adapters are float32 always, and
        whole models are trained in float32 alone.
    lora: a section of keys below; without it all weights of the language model are trained.
    train_vision: the vision tower is trained too.
    gradient_checkpointing: activations are computed again in the backward pass: less memory, more time.
    trust_remote_code: code that comes with a model may run.
    config: sizes of the model that `path: scratch` builds (recipes/tiny_base.yaml).
    min_pixels, max_pixels: bounds of a picture after resizing; not set: the model's own.
    max_frame_pixels: the upper bound of a clip's frame; not set: max_pixels.
    """

    path: str = "tiny"
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    lora: Lora | None = None
    train_vision: bool = False
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    config: dict[str, Any] | None = None
    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None
    max_frame_pixels: Pixels | None = None


class Data(Section):
    """Where questions come from.

    source: `digits` or `pages` (embedded), a .jsonl / .json / .parquet file, a folder, or a dataset of the hub
        (`owner/name`); the last two with `:split` at the end where it is not `train`; `SOURCE:[a:b]` takes some rows.
    heldout: the same for held-out questions; `validation`: embedded ones kept for tuning. Embedded sources need none.
    mix: shares of the embedded tasks among training prompts (empty: those of the source's family).
    prompts: how many training prompts are drawn, or read with `streaming`; of other rows all are used.
    hard_kind_boost: hard kinds of question are drawn more often within their task: 1 + hard_kind_boost * g times, g the
        running share of answers that the kind loses at `sparse.p` against the dense reference (0: all alike). It needs
        a target or a constraint.
    heldout_prompts: how many held-out questions are asked before and after training.
    subset: the configuration of a hub dataset.
    columns: our names for a dataset's, `{answer: label}` (data/formats.py).
    streaming: rows are read as they arrive, the first `prompts` of them; nothing else is downloaded.
    instruction: added to the end of each question.
    media_root: where relative paths of media start; not set: at the file.
    check: `decode` opens every picture and clip before the run, `exists` only looks whether the files are there.
    workers: threads that read media, ahead of the step that needs them.
    on_bad_row: `error` stops with the row's number, `skip` counts them.
    max_frames: most frames of a clip.
    fps: frames a second that are taken of a clip; not set: all, spread evenly over max_frames where there are more.
    max_prompt_tokens: longer prompts are refused or skipped, as on_bad_row says.
    """

    source: str = "digits"
    heldout: str | None = None
    mix: dict[str, Rate] = Field(default={})
    prompts: Prompts = 2048
    hard_kind_boost: Rate = 0.0
    heldout_prompts: Prompts = 500
    subset: str | None = None
    columns: dict[str, str] = Field(default={})
    streaming: bool = False
    instruction: str | None = None
    media_root: str | None = None
    check: Literal["decode", "exists"] = "decode"
    workers: Annotated[int, Field(ge=1, le=256)] = 4
    on_bad_row: Literal["error", "skip"] = "error"
    max_frames: Annotated[int, Field(ge=1, le=100_000)] = 16
    fps: Annotated[float, Field(ge=0.001, le=1000)] | None = None
    max_prompt_tokens: Positive = 16384


class Probes(Section):
    """Queries whose attention scores the prompt.
    recent: the last ones of the prompt.
    random: others, one from each of as many equal parts of the prompt.
    """

    recent: Count = 64
    random: Count = 64

    @model_validator(mode="after")
    def _some(self) -> Probes:
        if self.recent + self.random == 0:
            raise ValueError("probes.recent and probes.random are both 0; give at least one probe")
        return self


class Sparse(Section):
    """How prompt tokens are chosen.

    rule: `top_p` keeps the fewest tokens that hold a share p of the score mass, `top_k` a share p of the tokens,
        `random` as many at random, `threshold` those whose score, relative to uniform, is above 1 - p.
    p: of the rule, at inference; what training lowers is the number of tokens that it keeps.
    skip: what dropped tokens skip: `attention`, or the whole `layer`, MLP included.
    keep_last: last tokens of the prompt that are always kept.
    normalise: scores are divided by the number of probes that can see a token.
    dense_below: prompts of fewer tokens stay dense, for sparsity takes longer there; 0: none do. Not set: by the kind
        of device, 384 on a CPU (1,024 in bfloat16 with AMX), as measured, and 4,096 on a GPU, an estimate that no GPU
        has measured. A run keeps the number that it was trained with.
    kv: of conversations through `zipr1.load`. `evict` drops the keys and values of what the first turn did not keep;
        `retain` keeps all, and each turn chooses again among everything. One question is answered the same by both.
    """

    rule: Literal["top_p", "top_k", "threshold", "random"] = "top_p"
    p: Share = 0.975
    skip: Literal["attention", "layer"] = "attention"
    keep_last: Positive = 4
    probes: Probes = Probes()
    normalise: bool = True
    dense_below: Count | None = None
    kv: Literal["evict", "retain"] = "evict"


class Train(Section):
    """The loop.

    stage: `rl`, or `supervised` (cross-entropy on the answers).
    steps: of the optimizer's schedule; a larger number continues a finished run.
    average: decay of the running average of the weights, which the guard judges, and which is evaluated and saved: 0.98
        remembers about 50 steps. 0: the newest weights.
    prompts_per_step: questions in a step.
    micro_batch: most rows in one forward pass.
    temperature: of sampled answers.
    max_new_tokens: of an answer.
    save_every: steps between checkpoints (0: only at the end).
    diagnose_every: steps between two looks inside (0: none): the gradient of each loss alone, where the scores lie,
        each layer beside its set point. A look runs eight rows of the step again, once a loss, and changes nothing.
    micro_tokens: most tokens in one forward pass, padding included (not set: on a GPU what its free memory holds, else
        no bound).
    save_total_limit: how many checkpoints are kept; the best one is kept besides.
    parallel: what several ranks do: `ddp` replicates the model, `fsdp` shards weights, gradients and optimizer.
    param_dtype: with fsdp, what weights are gathered in and computed with (not set: model.dtype); the shards, which the
        optimizer changes, stay in model.dtype.
    stall_minutes: of several ranks, one that the others wait for and that shows no sign of life for so long ends the
        run. Reading and writing files are signs, as is each pass and each decoder layer.
    """

    stage: Literal["rl", "supervised"] = "rl"
    steps: Annotated[int, Field(ge=1, le=1_000_000_000)] = 300
    average: Fraction = 0.98
    prompts_per_step: Annotated[int, Field(ge=1, le=65_536)] = 8
    micro_batch: Positive = 64
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    max_new_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 16
    save_every: Count = 100
    diagnose_every: Count = 10
    micro_tokens: Positive | None = None
    save_total_limit: Positive = 2
    parallel: Literal["ddp", "fsdp"] = "ddp"
    param_dtype: Literal["float32", "bfloat16"] | None = None
    stall_minutes: Annotated[float, Field(gt=0, le=720)] = 5.0


class Supervised(Section):
    """The supervised stage on embedded lessons.
    questions: most about each picture.
    video_share: of the pictures, how many are clips.
    hard_share: of an image's questions, how many are hard.
    curriculum: most digits in a scene, or rows on a page, stage by stage.
    advance_at: the running accuracy on answer tokens at which the next stage comes.
    """

    questions: Annotated[int, Field(ge=1, le=1000)] = 8
    video_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    hard_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    curriculum: list[Positive] = Field(default=[1, 2, 3, 6], min_length=1)
    advance_at: Share = 0.92


class Alarms(Section):
    """What stops a run that goes wrong: it ends with exit code 1, one line that says what, by how much and which key to
    change, and a checkpoint of its last whole step. null sets one off. The rules are in zipr1/train/alarms.py.

    max_drift: fraction (0.01 = a point) that a task's guard questions may lose with all tokens (p = 1) against the
        untouched base. Judged in the second half of the run, where it is surely so for a tenth of the run and grows.
    max_token_mass: share of the score mass that one token may hold, mean over layers.
    min_heldout_mass: share of the score mass of probes that took no part in the choice that the kept tokens must hold.
    min_movement: share of itself by which the kept share must have fallen after 50 steps and the warm-up, where the
        schedule asked for twice as much.
    """

    max_drift: Annotated[float, Field(gt=0, le=1)] | None = 0.01
    max_token_mass: Annotated[float, Field(gt=0, le=1)] | None = 0.9
    min_heldout_mass: Annotated[float, Field(gt=0, le=1)] | None = 0.8
    min_movement: Annotated[float, Field(gt=0, lt=0.5)] | None = 0.05


class Log(Section):
    """Where metrics go besides metrics.jsonl.
    to: any of `tensorboard`, `wandb`, `trackio`.
    """

    to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default=[])


class Evaluation(Section):
    """Held-out questions before and after the training loop.
    before, after: whether they are asked then.
    batch: most questions in one forward pass.
    """

    before: bool = True
    after: bool = True
    batch: Positive = 64


class Recipe(Section):
    """A whole run: one key, and the sections.

    seed: of everything that is drawn; the same recipe and seed give the same run on the same machine.
    """

    seed: Count = 0
    model: Model = Model()
    data: Data = Data()
    sparse: Sparse = Sparse()
    budgets: Budgets = Budgets()
    rewards: Rewards = Rewards()
    efficiency: Efficiency = Efficiency()
    ppo: Ppo = Ppo()
    optim: Optim = Optim()
    train: Train = Train()
    supervised: Supervised = Supervised()
    alarms: Alarms = Alarms()
    evaluation: Evaluation = Evaluation()
    log: Log = Log()

    def dump(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def sha256(self) -> str:
        """Hash of the resolved recipe: the same values give the same hash, however they were written."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
