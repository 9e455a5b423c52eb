"""Who stands still, from what ranks tell of themselves; and what of it a rank does."""

from __future__ import annotations

from datetime import timedelta

import pytest

from zipr1.core import activity, distributed, files, signals, watch
from zipr1.core.errors import InputError, RunError
from zipr1.core.judge import Judge, Sign
from zipr1.core.load import validate
from zipr1.core.watch import Ending


def judge(*signs: Sign | None, limit: float = 60) -> Judge:
    """Of ranks that told these signs at second 10, and nothing after."""
    made = Judge(len(signs), limit)
    for rank, sign in enumerate(signs):
        if sign is not None:
            made.note(rank, sign, 10)
    return made


def test_who_has_not_come_where_the_others_wait_is_named_once_it_is_silent():
    found = judge(Sign("rollout", 5), Sign("rollout", 4), Sign("update", 5, 2))
    assert found.stuck(69) == [] and found.stuck(71) == [1]
    found.note(1, Sign("rollout", 4, count=1), 60)  # a sign of life
    assert found.stuck(119) == [] and found.stuck(121) == [1]
    found.note(1, Sign("rollout", 5), 125)
    # All are at the same place, but for one that did some of the work after it.
    assert found.stuck(186) == [0, 1]


@pytest.mark.parametrize("minutes", [0, -1.0, 721.0, "5"])
def test_a_limit_that_is_none_is_refused_by_name(minutes):
    """Above 720 the words between ranks would end first."""
    with pytest.raises(InputError, match=r"train\.stall_minutes: "):
        validate({"train": {"stall_minutes": minutes}})
    assert timedelta(minutes=720) == distributed.PATIENCE


def test_who_waits_is_never_named_while_the_others_are_at_work():
    """However long: an evaluation, a download, a checkpoint that is written by one alone."""
    found = judge(Sign("held-out", 5), Sign("held-out", 4))
    for second in range(10, 5000, 50):
        found.note(1, Sign("held-out", 4, count=second), second)
        assert found.stuck(second + 49) == []


def test_time_that_a_disk_may_take_is_added():
    found = judge(Sign("saving", 4, more=30), Sign("saving", 5))
    assert found.stuck(99) == [] and found.stuck(101) == [0]


def test_a_rank_that_never_came_is_named_from_the_start():
    found = judge(Sign("starting"), None, Sign("starting"))
    assert found.stuck(59) == [] and found.stuck(61) == [1]
    text = found.text([1])
    assert text.startswith("rank 1 did not come within 1 min 0 s; ranks 0 and 2 wait in 'starting'")


def test_nobody_waits_for_the_last_one():
    ended = Sign("done", 9, ended=True)
    assert judge(ended, Sign("pictures", 9), ended).stuck(10**6) == []
    assert judge(ended, Sign("pictures", 9), Sign("pictures", 8)).stuck(100) == [2]


def test_all_may_stand_still_together():
    """As where the network between them is gone."""
    found = judge(Sign("step 1: update", 3), Sign("step 1: update", 3))
    assert found.stuck(71) == [0, 1]
    told = "ranks 0 and 1 have shown no sign of life for 1 min 0 s, last seen in 'step 1: update'; "
    assert found.text([0, 1]).startswith(told + "what is saved is complete")


def test_the_line_says_who_where_and_what_to_do():
    signs = [Sign("step 3: update", 7), Sign("step 3: rollout", 6), Sign("step 3: rollout", 7)]
    assert judge(*signs, limit=300).text([1]) == (
        "rank 1 has shown no sign of life for 5 min 0 s, last seen in 'step 3: rollout'; ranks 0 and 2 wait in "
        "'step 3: update' (rank 0), 'step 3: rollout' (rank 2); what is saved is complete, the same command with "
        "--output goes on (train.stall_minutes sets the limit)"
    )


def test_ranks_that_died_are_told_apart_from_one_that_nobody_knows():
    found = judge(Sign("a"), Sign("step 2: rollout"))
    assert found.gone([1]).startswith("rank 1 is gone, last seen in 'step 2: rollout'; ")
    assert found.gone([]).startswith("another rank is gone, the launcher names it below")


class Store(dict):
    """What torch's stores do, in this process."""

    def compare_set(self, key, expected, value):
        if self.get(key, b"") == expected.encode():
            self[key] = value.encode()
        return self[key]

    def set(self, key, value):
        self[key] = value.encode()

    def multi_get(self, keys):
        return [self[key] for key in keys]

    def set_timeout(self, timeout):
        pass


class Clock:
    """Time that passes where it is waited for. then: what happens at which second."""

    def __init__(self):
        self.now, self.then = 0.0, {}

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        for second in [s for s in self.then if s <= self.now]:
            self.then.pop(second)()


@pytest.fixture
def two(here, monkeypatch):
    """What two ranks have of each other, without their threads; time passes by itself."""
    monkeypatch.setattr(watch.Watch, "start", lambda self: None)
    monkeypatch.setattr(watch.Watch, "join", lambda self, timeout: None)
    monkeypatch.setattr(watch, "time", Clock())
    monkeypatch.setattr(watch, "moved", lambda: 0)
    store = Store()
    with watch.Watch(store, 0, 2, 60.0) as first, watch.Watch(store, 1, 2, 60.0) as second:
        yield first, second


def test_the_first_reason_is_told_by_all(two):
    first, second = two
    watch.at("step 1: update")
    first.leave(InputError("cat.jpg: not on this machine"))
    second.leave(RunError("what came of it"))
    second._hear(0.0)
    told = Ending([0], 2, "rank 0 ended, in 'step 1: update': cat.jpg: not on this machine")
    assert first.ending == second.ending == told
    assert first.gone() == told


@pytest.mark.parametrize("second_hears", [0.7, 6.0, None])
def test_who_ends_with_the_store_waits_until_the_others_know_why(two, second_hears):
    """A busy machine may leave another rank's thread no time for seconds: it would say that this one is gone. One that
    is dead is not waited for much longer."""
    first, second = two
    assert (watch.PATIENT, watch.HEARD * first.every) == (10.0, 1.5)

    def hears():
        second._hear(0.0)
        watch._here.heard = True
        second._tell()

    if second_hears:
        watch.time.then[second_hears] = hears
    first.leave(RunError("a bug"))
    assert watch.time.now == pytest.approx(second_hears or 10.0, abs=0.1)
    assert (second.ending == first.ending) == bool(second_hears)


def test_a_rank_whose_fault_it_is_or_that_has_not_come_is_not_waited_for(two):
    first, _ = two
    first._end(Ending([1], 1, "rank 1 has shown no sign of life"))
    first._outstay()
    assert watch.time.now == 0
    first.ending = Ending([0], 1, "rank 0 ended")
    first.store["1"] = watch.NOTHING.encode()
    first._outstay()
    assert watch.time.now == pytest.approx(1.5, abs=0.1)


def test_a_signal_on_which_all_agreed_is_no_reason_to_hurry(two):
    """Another rank may still be writing the checkpoint that the signal asks for."""
    first, second = two
    first.leave(signals.Stopped(15, agreed=True))
    second._hear(0.0)
    assert first.ending is None and second.ending is None
    first.leave(signals.Stopped(15))
    second._hear(0.0)
    assert second.ending == Ending([0], 143, "rank 0 ended, in 'starting': stopped by signal 15")


class Ended(BaseException):
    pass


@pytest.mark.parametrize("hangs", [False, True])
def test_who_is_told_to_end_may_finish_what_it_writes(two, monkeypatch, hangs):
    """It is made to end after GRACE without a sign of life, and at once if it is the one that hangs."""
    first, _ = two
    looks, said = [], []

    def waited(seconds):
        looks.append(seconds)
        if len(looks) <= 100:
            watch.alive()
        return False

    def leave(code):
        raise Ended(code)

    monkeypatch.setattr(first._closed, "wait", waited)
    monkeypatch.setattr(watch, "say", lambda text, code: said.append((text, code)))
    monkeypatch.setattr(watch.os, "_exit", leave)
    with pytest.raises(Ended, match="1"):
        first._part(Ending([0 if hangs else 1], 1, "why"))
    assert said == [("why", 1)]
    assert len(looks) == (watch.HEARD if hangs else 100 + watch.GRACE / first.every)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(watch, "_here", watch._Here())
    return watch._here


def test_what_is_told_to_people_is_told_to_the_other_ranks(here):
    activity.tell("reading rows", 1200, 4000)
    assert here.doing == "reading rows 1,200 of 4,000" and here.count == 1
    activity.tell("")  # hides the line; the work goes on
    assert here.doing == "reading rows 1,200 of 4,000"


def test_places_count_from_the_last_word_that_all_exchanged(here):
    """How many passes a rank made before it does not matter: ranks have different numbers of them."""
    for _ in range(3):
        watch.arrive(meeting=False)
    assert (here.meetings, here.passes) == (0, 3)
    watch.arrive()
    assert (here.meetings, here.passes) == (1, 0)


def test_a_disk_that_is_waited_for_gets_the_time_of_a_slow_one(here, tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(b"x" * 50_000_000)
    seen = []
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: seen.append(here.more))
    files.sync(tmp_path / "f")
    assert seen == [5.0] and here.more == 0  # 50 MB at 10 MB a second


def test_what_the_process_reads_and_writes_is_counted(tmp_path):
    before = watch.moved()
    if not before:
        pytest.skip("/proc/self/io is not there")
    (tmp_path / "f").write_bytes(b"x" * 3_000_000)
    (tmp_path / "f").read_bytes()
    assert watch.moved() - before > 6_000_000


def test_a_rank_that_arrives_after_the_end_is_told_why(here, monkeypatch):
    class Over:
        ending = Ending([1], 2, "rank 1 ended: no such file")

    monkeypatch.setattr(watch, "_watches", [Over()])
    watch.alive()  # in other threads too: says nothing
    with pytest.raises(InputError, match="rank 1 ended: no such file") as told:
        watch.arrive()
    assert told.value.exit_code == 2
    for code in (1, 143):
        error = Ending([1], code, "x").error()
        assert isinstance(error, RunError) and error.exit_code == code
