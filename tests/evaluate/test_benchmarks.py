"""Thirteen benchmarks by lmms-eval's own code, on stand-in data in each one's schema."""

from __future__ import annotations

import dataclasses
import io
import types

import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from standins import CHANCE, CONSTANT, STANDINS

pytest.importorskip("lmms_eval")

from zipr1.core.errors import InputError, RunError
from zipr1.core.recipe import Model, Sparse
from zipr1.data.media import load_media
from zipr1.evaluate.answers import Answer, Answered, Answerer, Conditions, Variant
from zipr1.evaluate.harness import letter, measure
from zipr1.evaluate.records import record
from zipr1.evaluate.scores import suite_units
from zipr1.evaluate.suites import GROUPS, SUITES
from zipr1.models.policy import load_policy


class Actor:
    """Stands in for an Answerer: says what it was told to. p = 1 says `dense`, 0.9 says `sparse`."""

    variants = (Variant("1", 1.0), Variant("0.9", 0.9, Sparse(p=0.9)))
    shown = 3

    def __init__(self, dense, sparse):
        self.says = (dense, sparse)
        self.policy = types.SimpleNamespace(device=torch.device("cpu"), layers=2)
        self.asked = []

    def answer(self, asked, conditions, tell=lambda done: None):
        out = []
        for make in asked:
            prompt = make()
            for media in prompt.media:
                pixels, _ = load_media(media, 4)
                assert pixels.size
            self.asked.append(prompt)
            answers = [
                Answer(say(prompt), [1.0, 1.0 - k / 2], 8, 0.1, 10, 1)
                for k, say in enumerate(self.says)
            ]
            out.append(Answered(answers, 0.0, 0.0))
        return out


def oracle(gold):
    def say(prompt):
        text = prompt.messages[-1]["content"][-1]["text"]
        for key, answer in gold.items():
            if isinstance(key, str) and key in text:
                return answer
        return gold[load_media(prompt.media[0], 1)[0].tobytes()]

    return say


def constant(name):
    return lambda prompt: CONSTANT.get(name, "A")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The folder of all stand-ins, made once, and the right answers."""
    root = tmp_path_factory.mktemp("standins")
    return root, {name: make(root / name) for name, make in STANDINS.items()}


def row_of(name, scored, actor):
    return record(SUITES[name], scored, actor, Conditions(), [0.9], 1.0)["rows"][0]


def test_every_benchmark_has_a_stand_in():
    assert set(STANDINS) == set(GROUPS["paper13"]) and len(STANDINS) == 13


@pytest.mark.parametrize("name", list(STANDINS))
def test_oracle_and_constant(data, name):
    """The oracle gets full marks, the constant model its hand-computed share, in one run; and the difference of the
    two by pairs is the difference of the scores."""
    root, gold = data
    actor = Actor(oracle(gold[name]), constant(name))
    suite = SUITES[name]
    scored = measure(suite, actor, Conditions(), None, root)
    row = row_of(name, scored, actor)
    assert row["dense"] == pytest.approx(suite.top)
    assert row["sparse"] == pytest.approx(CHANCE[name])
    assert row["difference"] == pytest.approx(CHANCE[name] - suite.top)
    low, high = row["difference_ci"]
    assert -suite.top <= low <= row["difference"] <= high <= suite.top
    assert row["n"] == len(actor.asked)
    for variant, score in ((0, suite.top), (1, CHANCE[name])):
        assert suite_units(suite, scored, variant).total == pytest.approx(score)


def test_media_kinds(data):
    root, gold = data
    for name in ("mmstar", "mlvu"):
        actor = Actor(oracle(gold[name]), constant(name))
        measure(SUITES[name], actor, Conditions(), 2, root)
        assert {m.kind for p in actor.asked for m in p.media} == {SUITES[name].kind}
        assert len(actor.asked) == 2


def test_limits_never_cut_mme_pairs(data):
    root, gold = data
    actor = Actor(oracle(gold["mme"]), constant("mme"))
    scored = measure(SUITES["mme"], actor, Conditions(), 3, root)
    assert len(actor.asked) == 4
    assert row_of("mme", scored, actor)["dense"] == pytest.approx(400)  # two categories of 200
    assert any("4 questions in place of 3" in note for note in scored[0].notes)
    assert measure(SUITES["mme"], actor, Conditions(), 4, root)[0].notes == []


def test_ocrbench_counts_what_was_asked(data):
    """lmms-eval divides by 1000 always, and its counter remembers earlier scorings."""
    root, gold = data
    actor = Actor(oracle(gold["ocrbench"]), oracle(gold["ocrbench"]))
    for _ in range(2):
        scored = measure(SUITES["ocrbench"], actor, Conditions(), 2, root)
        result = record(SUITES["ocrbench"], scored, actor, Conditions(), [0.9], 1.0)
        assert result["rows"][0]["dense"] == result["rows"][0]["sparse"] == pytest.approx(1000)
        assert any("OCRBench" in note for note in result["notes"])


def test_mvbench_counts_empty_answers(data):
    """One right and one empty answer of two: half, where lmms-eval says 100."""
    root, gold = data
    right = oracle(gold["mvbench"])
    actor = Actor(
        right, lambda p: right(p) if "question 0" in p.messages[-1]["content"][-1]["text"] else ""
    )
    suite = dataclasses.replace(SUITES["mvbench"], tasks=SUITES["mvbench"].tasks[:2])
    scored = measure(suite, actor, Conditions(), None, root)
    result = record(suite, scored, actor, Conditions(), [0.9], 1.0)
    assert scored[0].headline == [100.0, 100.0]
    assert result["rows"][0]["sparse"] == pytest.approx(50)
    assert any("MVBench" in note for note in result["notes"])


def test_mlvu_means_over_the_kinds_asked(data):
    root, gold = data
    actor = Actor(oracle(gold["mlvu"]), constant("mlvu"))
    scored = measure(SUITES["mlvu"], actor, Conditions(), 2, root)
    assert row_of("mlvu", scored, actor)["dense"] == pytest.approx(100)


def test_guesses_are_the_same_for_both(data):
    """Where no letter is found lmms-eval guesses; dense and sparse get the same guess, in every run."""
    root, _ = data
    found = []
    for _ in range(2):
        actor = Actor(lambda p: "?", lambda p: "no idea")
        for name in ("egoschema", "longvideobench", "nextqa", "mmmu_pro"):
            scored = measure(SUITES[name], actor, Conditions(), None, root)
            row = row_of(name, scored, actor)
            assert row["difference"] == pytest.approx(0)
            found.append(row["dense"])
            guesses = [note for note in scored[0].notes if "lmms-eval guesses" in note]
            assert len(guesses) == 1 and f"({row['n'] // len(scored)} of" in guesses[0]
    actor = Actor(lambda p: "A", lambda p: "no idea")
    [scored] = measure(SUITES["egoschema"], actor, Conditions(), None, root)
    assert "(5 of 5 at most)" in scored.notes[0]
    actor = Actor(lambda p: "A", lambda p: "B")
    assert measure(SUITES["egoschema"], actor, Conditions(), None, root)[0].notes == []
    assert found[:4] == found[4:]


@pytest.mark.parametrize(
    ("said", "wanted"),
    [("B", "B"), ("(B)", "B"), ("B.", "B"), ("B. a cat", "B"), ("The answer is C.", "C"), ("answer: (D)", "D"),
     ("I think it is (E)", "E"), ("A cat sits there", None), ("Because", None), ("", None), ("J", "J")],
)  # fmt: skip
def test_letters(said, wanted):
    assert letter(said) == wanted


def test_tiny_answers_every_benchmark(data):
    """The embedded model has never seen such questions, but it reads them all and its answers are scored."""
    root, _ = data
    answerer = Answerer(load_policy(Model()), Sparse(dense_below=0), [1.0, 0.9], batch=4)
    for name in STANDINS:
        suite = SUITES[name]
        scored = measure(suite, answerer, Conditions(max_new_tokens=2, frames=4), 2, root)
        row = record(suite, scored, answerer, Conditions(), [0.9], 1.0)["rows"][0]
        assert 0 <= row["sparse"] <= suite.top and 0 < row["token_ratio"] < 1
        assert row["kv_bytes"] < row["dense_kv_bytes"]


def test_missing_data_says_how_to_get_it(tmp_path):
    actor = Actor(constant(""), constant(""))
    with pytest.raises(InputError, match="hf download --repo-type dataset lmms-lab-encoder/MME"):
        measure(SUITES["mme"], actor, Conditions(), None, tmp_path)
    (tmp_path / "mme").mkdir()
    with pytest.raises(InputError, match="has no test-"):
        measure(SUITES["mme"], actor, Conditions(), None, tmp_path)


def test_offline_without_copies_says_how_to_get_it():
    actor = Actor(constant(""), constant(""))
    with pytest.raises(RunError, match="hf download --repo-type dataset Lin-Chen/MMStar"):
        measure(SUITES["mmstar"], actor, Conditions(), None, None)


def test_a_missing_clip_is_one_line(tmp_path):
    """lmms-eval leaves the process there."""
    gold = STANDINS["videomme"](tmp_path / "videomme")
    (tmp_path / "videomme/data/v1.mp4").unlink()
    with pytest.raises(RunError, match=r"v1\.mp4"):
        measure(SUITES["videomme"], Actor(oracle(gold), constant("")), Conditions(), None, tmp_path)


def test_a_wrong_column_is_one_line(tmp_path):
    from standins import picture, write

    write(tmp_path / "mme", None, "test", [{"image": picture(0), "prompt": "x"}])
    with pytest.raises(RunError, match=r"mme: .*question"):
        measure(SUITES["mme"], Actor(constant(""), constant("")), Conditions(), None, tmp_path)


def test_a_truncated_file_is_one_line(tmp_path):
    STANDINS["chartqa"](tmp_path / "chartqa")
    path = next((tmp_path / "chartqa").rglob("*.parquet"))
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(RunError, match="chartqa: "):
        measure(SUITES["chartqa"], Actor(constant(""), constant("")), Conditions(), None, tmp_path)


def test_a_truncated_clip_is_one_line(tmp_path):
    gold = STANDINS["mlvu"](tmp_path / "mlvu")
    path = next((tmp_path / "mlvu").rglob("m0.mp4"))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises((RunError, InputError), match=r"m0\.mp4"):
        measure(SUITES["mlvu"], Actor(oracle(gold), constant("")), Conditions(), None, tmp_path)


def test_a_picture_of_another_format_is_one_line(tmp_path):
    """lmms-eval's data sets decode pictures before we see them; EPS would start Ghostscript."""
    STANDINS["mmstar"](tmp_path / "mmstar")
    eps = io.BytesIO()
    Image.new("RGB", (32, 32)).save(eps, "EPS")
    for file in (tmp_path / "mmstar").rglob("*.parquet"):
        table = parquet.read_table(file)
        cells = [{"bytes": eps.getvalue(), "path": "a.png"}] * len(table)
        place = table.column_names.index("image")
        changed = pyarrow.array(cells, type=table.schema.field("image").type)
        parquet.write_table(table.set_column(place, table.schema.field(place), changed), file)
    with pytest.raises(RunError, match=r"mmstar: .*cannot identify image file") as error:
        measure(
            SUITES["mmstar"],
            Actor(constant("mmstar"), constant("mmstar")),
            Conditions(),
            None,
            tmp_path,
        )
    assert "\n" not in str(error.value)


def test_a_cut_off_picture_stays_an_error():
    """lmms-eval's import would have PIL fill it with grey."""
    import io

    from PIL import Image, ImageFile

    out = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(out, "PNG")
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    with Image.open(io.BytesIO(out.getvalue()[:-2000])) as picture, pytest.raises(OSError):  # noqa: PT011
        picture.load()
