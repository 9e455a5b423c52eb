"""report.html of a run, from its first minute on: how far it is, its curves, what is kept, answers lost and won, and
what comes next. Written whole each time, and never for more than a fiftieth of the run's time.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zipr1.core import curves
from zipr1.core.config import assignment
from zipr1.core.files import write_whole, writing
from zipr1.core.load import code_in
from zipr1.core.page import Tile, compared, page_table, render
from zipr1.core.recipe import Recipe
from zipr1.core.rundir import RunDir, read_lines
from zipr1.core.text import duration, size
from zipr1.core.types import Prompt
from zipr1.data.media import load_timed
from zipr1.data.sources import files_in
from zipr1.models import gallery
from zipr1.models.policy import Policy
from zipr1.train.heldout import Result
from zipr1.train.metrics import question
from zipr1.train.progress import constraint_lines, summary_table
from zipr1.train.rollout import Batch

EVERY, SHARE = 30.0, 50  # seconds between two pages, at least, and in times of what one takes
RECENT = 20  # steps that "now" is the mean of
NEWEST = 4  # questions of the newest step that are shown
OF_A_SORT = 4  # held-out questions that were lost, and won, that are shown

Card = dict[str, Any]


class RunPage:
    """The page of one run; a rank that does not write makes none.

    With the run: `open` at once, `begin` when the held-out questions are measured, `update` after each step, `stopped`
    or `finished`.
    """

    def __init__(self, folder: RunDir, recipe: Recipe) -> None:
        self.path = folder.root / "report.html"
        self._folder, self._recipe = folder, recipe
        self._done = self._start = folder.start_step
        metrics = folder.root / "metrics.jsonl"
        self._rows = read_lines(metrics) if folder.writes and metrics.is_file() else []
        self._heldout: dict[str, dict[str, float]] = {}
        self._layers: list[float] | None = None
        self._kept: list[Card] = []
        self._newest: list[Card] = []
        self._began = time.monotonic()
        self._due = 0.0
        self._why = ""

    def open(self) -> None:
        """The first page, which waits for nothing."""
        if self._folder.writes:
            self._write("")

    def begin(
        self, policy: Policy, prompts: Sequence[Prompt], before: Mapping[str, Result]
    ) -> None:
        """What the untouched model does is known, and training begins."""
        self._began = time.monotonic()
        if not self._folder.writes:
            return
        self._heldout = {name: _means(result) for name, result in before.items()}
        if "before" in before:
            self._layers = before["before"].layer_ratios.mean(0).tolist()
            self._kept = self._cards(policy, prompts, before, list(shown_first(prompts).values()))
        self._write("")

    def update(self, metrics: Mapping[str, Any], batch: Batch | None) -> None:
        """A step is done: a new page, if the last one is old enough."""
        self._done += 1
        if not self._folder.writes:
            return
        self._rows.append({"step": self._done - 1, **metrics})
        if time.monotonic() < self._due:
            return
        self._newest = [] if batch is None else _sampled(batch)
        self._write("")

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl so far, on the rank that writes."""
        return self._rows

    def stopped(self, done: int, why: str = "") -> None:
        """The run ends before its last step, with `done` of them saved. why: in a line, if it went wrong."""
        if self._folder.writes:
            self._done, self._why = done, why
            self._rows = [row for row in self._rows if row["step"] < done]
            self._write("stopped")
            self._curves()

    def finished(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        results: Mapping[str, Result],
        summary: Mapping[str, Any],
    ) -> None:
        """The last page. results: held-out questions by `dense`, `before` and `after`, as far as they were asked."""
        if not self._folder.writes:
            return
        self._heldout = {name: _means(result) for name, result in results.items()}
        differing: list[tuple[str, list[Card]]] = []
        if "after" in results:
            first = list(shown_first(prompts).values())
            self._kept = self._cards(policy, prompts, results, first)
            if "dense" in results:
                gap = results["after"].correct - results["dense"].correct
                for title, places in (("Lost", gap < 0), ("Won", gap > 0)):
                    chosen = np.flatnonzero(places)[:OF_A_SORT].tolist()
                    if chosen:
                        count = f"{title}: {int(places.sum()):,} of {len(gap):,}"
                        cards = self._cards(policy, prompts, results, chosen)
                        differing.append((count, cards))
        self._write("finished", summary, differing)
        self._curves()

    def _curves(self) -> None:
        path = self._folder.root / "curves.png"
        with writing(path):
            curves.curves(self._rows, self._recipe, self._heldout, path)

    def _write(
        self,
        state: str,
        summary: Mapping[str, Any] | None = None,
        differing: Sequence[tuple[str, list[Card]]] = (),
    ) -> None:
        """state: empty while it trains, `stopped` or `finished`."""
        began = time.monotonic()
        recipe, root, steps = self._recipe, self._folder.root, self._recipe.train.steps
        judged = summary is not None and "after" in self._heldout
        where = f"{recipe.model.path}, {root}"
        now = self._rows[-1].get("token_ratio_by_layer") if self._rows else None
        if summary is not None and judged:
            now = summary["after"]["token_ratio_by_layer"]
        by_layer = curves.layers(self._layers, now, "after training" if judged else "newest step")
        figures = curves.drawings(self._rows, recipe, self._heldout)
        shown = judged and summary is not None
        page = render(
            "run.html",
            title=f"{root.name}: {state or 'training'}, step {self._done} of {steps}",
            refresh=0 if state else int(EVERY),
            where=where,
            headline=_headline(summary)
            if shown and summary
            else _progress(state, self._done, steps),
            lead=self._lead(state, summary),
            tiles=_judged(summary, self._heldout) if shown and summary else self._now(),
            table=page_table(summary_table(summary)) if shown and summary else None,
            verdicts=constraint_lines(summary) if shown and summary else [],
            kept=self._kept,
            differing=list(differing),
            newest=[] if judged else self._newest,
            figures=figures + ([by_layer] if by_layer else []),
            commands=_commands(root, recipe, state),
        )
        with writing(self.path):
            write_whole(self.path, page)
        ended = time.monotonic()
        self._due = ended + max(EVERY, SHARE * (ended - began))

    def _lead(self, state: str, summary: Mapping[str, Any] | None) -> str:
        p = f"p = {self._recipe.sparse.p:g}"
        if summary is not None:
            return f"{summary['steps']} steps in {duration(summary['seconds'])}, sparse at {p}, on held-out questions."
        if state:
            told = f"It went wrong: {self._why}. " if self._why else ""
            return f"{told}The steps that are done are saved; the last command below goes on."
        done = self._done - self._start
        if not done:
            return f"Sparse at {p}. This page renews itself."
        left = (time.monotonic() - self._began) / done * (self._recipe.train.steps - self._done)
        return f"About {duration(left)} left. Sparse at {p}. This page renews itself."

    def _now(self) -> list[Tile]:
        """The newest steps, beside the untouched model."""
        tiles, recent = [], self._rows[-RECENT:]
        means = f"mean of the last {len(recent)} steps"
        ratios = curves.greedy_ratios(recent)
        target = self._recipe.efficiency.target
        before = self._heldout.get("before", {}).get("token_ratio")
        first = f"{before:.1%}" if before is not None else ""
        if len(ratios) and np.isfinite(ratios).any():
            wanted = f"; target {target:.0%}" if target is not None else ""
            tiles.append(Tile("tokens kept", first, f"{np.nanmean(ratios):.1%}", means + wanted))
        elif first:
            tiles.append(Tile("tokens kept", "", first, "before training"))
        right = {k: _mean(recent, k) for k in ("dense_accuracy", "sparse_accuracy", "accuracy")}
        dense, sparse = right["dense_accuracy"], right["sparse_accuracy"]
        if sparse is None:
            sparse = right["accuracy"]
        if sparse is not None:
            old = f"{dense:.1%}" if dense is not None else ""
            name = "right answers, dense and sparse" if old else "right answers"
            tiles.append(Tile(name, old, f"{sparse:.1%}", means))
        elif "dense" in self._heldout:
            accuracy = self._heldout["dense"]["accuracy"]
            tiles.append(Tile("right answers", "", f"{accuracy:.1%}", "dense, before training"))
        loss = _mean(recent, "loss")
        if loss is not None:
            tiles.append(Tile("loss", "", f"{loss:.4f}", means))
        return tiles

    def _cards(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        results: Mapping[str, Result],
        places: Sequence[int],
    ) -> list[Card]:
        """Held-out questions with their answers, and what was kept of a single picture or clip before and after."""
        cards = []
        for i in places:
            prompt = prompts[i]
            pictures = self._pictures(policy, prompt, i, results) if len(prompt.media) == 1 else []
            names = {"dense": "dense", "before": "before training", "after": "after training"}
            said = [
                (names[name], result.said[i], bool(result.correct[i] >= 0.5))
                for name, result in results.items()
            ]
            wide = bool(prompt.media) and prompt.media[0].kind == "video"
            cards.append(_card(prompt, said, pictures, wide))
        return cards

    def _pictures(
        self, policy: Policy, prompt: Prompt, i: int, results: Mapping[str, Result]
    ) -> list[tuple[str, str]]:
        kept = {
            name: results[name].kept[i]
            for name in ("before", "after")
            if name in results and results[name].kept[i]
        }
        data = self._recipe.data
        rule = policy.processor.settings.frame_rule
        seen = load_timed(prompt.media[0], data.max_frames, data.fps, rule)
        encoded = policy.encode(prompt, [seen], data.max_prompt_tokens)
        captions = {gallery.PLAIN: "as dense sees it"}
        for name in kept:
            captions[name] = f"{name} training: {results[name].token_ratio[i]:.1%} kept"
        drawn = gallery.draw(policy, encoded, seen[0], kept)
        return [(captions[name], f"data:image/jpeg;base64,{jpeg}") for name, jpeg in drawn.items()]


def shown_first(prompts: Sequence[Prompt]) -> dict[str, int]:
    """For each task the first question with a single picture or clip."""
    places: dict[str, int] = {}
    for i, prompt in enumerate(prompts):
        if len(prompt.media) == 1:
            places.setdefault(prompt.task, i)
    return places


def _card(
    prompt: Prompt,
    said: Sequence[tuple[str, str, bool | None]],
    pictures: Sequence[tuple[str, str]] = (),
    wide: bool = False,
) -> Card:
    return {
        "question": question(prompt.messages),
        "target": prompt.answer,
        "answers": list(said),
        "pictures": list(pictures),
        "wide": wide,
    }


def _sampled(batch: Batch) -> list[Card]:
    """Questions of a step with the answers that were sampled, those that kept most first."""
    return [
        _card(
            group.prompt,
            [
                (f"{one.token_ratio:.1%} of the tokens", one.text, one.rewards["correct"] >= 0.5)
                for one in sorted(group.rollouts, key=lambda r: -r.token_ratio)
            ],
        )
        for group in batch.groups[:NEWEST]
    ]


def _means(result: Result) -> dict[str, float]:
    return {
        "accuracy": float(result.correct.mean()),
        "token_ratio": float(result.token_ratio.mean()),
    }


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if isinstance(row.get(key), (int, float))]
    return float(np.mean(values)) if values else None


def _progress(state: str, done: int, steps: int) -> str:
    return f"{'Stopped at step' if state == 'stopped' else 'Step'} {done} of {steps}"


def _headline(summary: Mapping[str, Any]) -> str:
    kept = f"{summary['after']['token_ratio']:.1%} of the tokens"
    if "difference" not in summary:
        return f"{kept}, {summary['after']['accuracy']:.1%} right"
    return f"{kept}, {100 * summary['difference']:+.2f} points"


def _judged(summary: Mapping[str, Any], heldout: Mapping[str, Mapping[str, float]]) -> list[Tile]:
    """Tokens, right answers, time to the first token and memory, of held-out questions."""
    after, costs = summary["after"], summary["costs"]
    untrained = heldout.get("before", {}).get("token_ratio")
    before = f"{untrained:.1%}" if untrained is not None else ""
    tiles = [
        Tile("tokens kept", before, f"{after['token_ratio']:.1%}", "of the prompt, mean over layers, at the same p")
    ]  # fmt: skip
    dense, note = "", f"{after['n']:,} questions"
    if "difference" in summary:
        dense = f"{summary['dense_accuracy']:.1%}"
        low, high = (100 * value for value in summary["difference_ci"])
        note = f"{100 * summary['difference']:+.2f} points ({low:+.2f} to {high:+.2f}) to dense"
    tiles.append(Tile("right answers", dense, f"{after['accuracy']:.1%}", note))
    if "dense" in costs and "after" in costs:
        old, new = costs["dense"], costs["after"]
        slow, fast = old["first_token_ms"], new["first_token_ms"]
        words = f"{compared(slow, fast)}, in the language model"
        tiles.append(
            Tile("to the first token, a question", f"{slow:.3g} ms", f"{fast:.3g} ms", words)
        )
        saved = f"{1 - new['kv_bytes'] / old['kv_bytes']:.1%} saved after a prefill"
        tiles.append(Tile("keys and values", size(old["kv_bytes"]), size(new["kv_bytes"]), saved))
    return tiles


def _commands(root: Path, recipe: Recipe, state: str) -> list[tuple[str, str]]:
    """What comes next, and how."""
    run = shlex.quote(str(root))
    if state == "finished":
        return [
            ("Benchmarks, dense beside sparse", f"zipr1 eval --model {run}"),
            ("Time and memory on this machine", f"zipr1 profile --model {run}"),
            ("A plain Hugging Face folder", f"zipr1 export {run} --to DIR"),
            ("Side by side with another run", f"zipr1 compare {run} OTHER"),
        ]
    # What a run's own recipe may not say without the user.
    named = code_in(recipe) | files_in(recipe.data, root)
    again = [
        f"zipr1 train --resume {run}",
        *(assignment(*one) for one in named.items()),
    ]
    return [("Go on after it was stopped", " ".join(again))]
