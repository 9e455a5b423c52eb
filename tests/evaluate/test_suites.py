"""The table of benchmarks against lmms-eval's own register."""

import pytest
from standins import MVBENCH

from zipr1.core.errors import InputError
from zipr1.core.load import load
from zipr1.evaluate import names as module
from zipr1.evaluate.names import own_tasks, suites_of
from zipr1.evaluate.suites import EMBEDDED, GROUPS, SUITES, resolve
from zipr1.models.manifest import TINY
from zipr1.models.open import find_source


def test_groups_hold_thirteen():
    assert len(GROUPS["paper13"]) == 13 == len(set(GROUPS["paper13"]))
    assert set(SUITES) == {*GROUPS["paper13"], *EMBEDDED}
    assert all(SUITES[name].kind == kind for kind in ("image", "video") for name in GROUPS[kind])


def test_names_open_groups_once():
    assert [s.name for s in resolve(["digits", "image", "mme"])] == ["digits", *GROUPS["image"]]
    assert [s.tasks[0].name for s in resolve(["ai2d"], others=["ai2d"])] == ["ai2d"]
    with pytest.raises(InputError, match="did you mean videomme"):
        resolve(["video_mme"])
    with pytest.raises(InputError, match="names no benchmark"):
        resolve([])


def test_tasks_and_metrics_are_lmms_evals():
    """Names, metrics and data sets as the installed version has them."""
    pytest.importorskip("lmms_eval")
    from lmms_eval.tasks.mvbench.utils import DATA_LIST

    from zipr1.evaluate.harness import TASKS

    known = set(own_tasks())
    for suite in SUITES.values():
        if suite.name in EMBEDDED:
            continue
        for task in suite.tasks:
            assert task.name in known
            yaml = next(TASKS.rglob(f"{task.name}.yaml"))
            texts = [
                p.read_text() for p in yaml.parent.glob("*") if p.is_file() and "yaml" in p.name
            ]
            for word in (*task.metric, task.hub, task.split):
                assert any(word in text for text in texts), (task.name, word)
    assert MVBENCH == DATA_LIST


def test_names_are_read_from_its_files_as_it_reads_them_itself():
    pytest.importorskip("lmms_eval")
    from zipr1.evaluate.harness import _register

    assert list(own_tasks()) == sorted(_register().all_tasks) and len(own_tasks()) > 1000
    assert [suite.name for suite in suites_of(["ai2d", "digits"])] == ["ai2d", "digits"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("task: a_b\ngroup: ['c', d.e]\n", {"a_b", "c", "d.e"}),
        ('\ufeff"task" : "a b" # not c\ntag:\n  - x\n  - "y"\nother: z\n', {"a b", "x", "y"}),
        ("group: g\ntask:\n- of_another_file\n- task: inside\n", {"g"}),
        ("task_list:\n- no\ndataset: {task: no}\nlast: no\n", set()),
    ],
)
def test_a_task_file_names_its_task_group_and_tags(text, names, tmp_path, monkeypatch):
    (tmp_path / "tasks" / "one").mkdir(parents=True)
    (tmp_path / "tasks" / "one" / "_default_template_yaml").write_text(text, encoding="utf-8")
    (tmp_path / "tasks" / "one" / "make_yaml.py").write_text("task: no\n")
    monkeypatch.setattr(module, "lmms_eval_folder", lambda: tmp_path)
    assert set(own_tasks.__wrapped__()) == names


def test_the_embedded_model_is_evaluated_as_it_is_trained():
    assert load("recipes/tiny.yaml").sparse == TINY == find_source("tiny").sparse


def test_averages_scale_as_the_paper_does():
    assert SUITES["mme"].top / SUITES["mme"].average == 100
    assert SUITES["ocrbench"].top / SUITES["ocrbench"].average == 100
    for suite in SUITES.values():
        assert suite.top / suite.average == 100
