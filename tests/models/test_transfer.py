"""Many tensors in one copy, either way."""

import standingpu
import torch
from standingpu import DEVICE

from zipr1.models.transfer import fetch, send

CPU = torch.device("cpu")


def several():
    return [
        torch.arange(5),
        torch.rand(3, 7, dtype=torch.float64).T,
        torch.tensor([[True, False, True]]),
        torch.empty(0, 4),
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.rand(11, dtype=torch.float16)[::2],
        torch.arange(3, dtype=torch.int32),
    ]


def test_tensors_come_as_they_were_in_one_copy_each_way():
    with standingpu.gpu() as gpu:
        there = send(DEVICE, *several())
        assert {t.device for t in there} == {DEVICE}
        assert gpu.launches == 1 and not gpu.waits
        back = fetch(*there)
        assert gpu.waits.total() == 1
    torch.manual_seed(0)
    for t, wanted in zip(back, several(), strict=True):
        assert t.device == CPU and t.dtype == wanted.dtype and t.shape == wanted.shape
    for i in (0, 2, 4, 6):
        assert torch.equal(back[i], several()[i])


def test_values_survive_the_way_there_and_back():
    wanted = several()
    with standingpu.gpu():
        back = fetch(*send(DEVICE, *wanted))
    for one, other in zip(back, wanted, strict=True):
        assert torch.equal(one, other)


def test_what_is_there_already_is_not_copied():
    x = torch.rand(3)
    assert send(CPU, x)[0] is x and fetch(x)[0] is x
    with standingpu.gpu() as gpu:
        y = torch.ones(3, device=DEVICE)
        again, new = send(DEVICE, y, x)
        assert again is y and torch.equal(fetch(new)[0], x)
        waits = gpu.waits.total()
        assert fetch(y, x)[1] is x and gpu.waits.total() == waits + 1
