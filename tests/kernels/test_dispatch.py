"""Which code runs an operation, for which part of the process, and on which device a kernel is launched."""

import contextlib
import importlib
import os
import subprocess
import sys
import threading

import pytest
import torch
from zipr1_kernels import (
    dispatch,
    kv_compact,
    launch,
    norm_rope,
    pack_indices,
    probe_scores,
    ran,
    select_top_p,
    sparse_decode,
    sparse_prefill,
    unusable,
    use,
)
from zipr1_kernels.select_top_p import kernel as selecting

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = (
    "kv_compact",
    "norm_rope",
    "probe_scores",
    "select_top_p",
    "sparse_decode",
    "sparse_prefill",
)


def every_operation(device=DEVICE):
    """Runs each kernel once, gradients included, on a ragged batch long enough to be split; returns the outputs."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device).requires_grad_()

    q, k, v = normal(2, 4, 80, 16), normal(2, 2, 80, 16), normal(2, 2, 80, 16)
    probes = torch.tensor([[3, 79], [7, 78]], device=device)
    every = torch.ones(2, 80, dtype=torch.bool, device=device)
    with use("triton"):
        index = probes[:, None, :, None].expand(-1, 4, -1, 16)
        scores = probe_scores(q.gather(2, index), k, probes, every)
        p = torch.tensor([0.3, 0.8], device=device)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(selecting, "LONGEST", 0)
            by_sort = select_top_p(scores, p, every, ~every)
        kept = pack_indices(select_top_p(scores, p, every, ~every))
        out = sparse_prefill(q, k, v, kept)
        grads = torch.autograd.grad(out.sum() + scores.sum(), (q, k, v))
        with torch.no_grad():
            cache = kv_compact(k, v, kept)
            step = sparse_decode(q[:, :, :1], *cache, kept.real)
            turned = norm_rope(k.transpose(1, 2), v[:, 0], v[:, 1], k[0, 0, 0])
    return [out, scores, by_sort, *grads, *cache, step, turned]


@pytest.fixture
def launches(monkeypatch):
    """Stand-ins for all kernels: (name, the device that is current at its launch, those of its tensors)."""
    found, current = [], [None]

    @contextlib.contextmanager
    def on(device):
        current.append(device)
        yield
        current.pop()

    class StandIn:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            def run(*args, **options):
                tensors = [x for x in args if isinstance(x, torch.Tensor)]
                found.append((self.name, current[-1], {x.device for x in tensors}))
                return self.kernel[grid](*args, **options)

            return run

    monkeypatch.setattr(launch, "on", on)
    for op in KERNELS:
        module = importlib.import_module(f"zipr1_kernels.{op}.kernel")
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, name, StandIn(f"{op}.{name}", getattr(module, name)))
    return found


def test_every_launch_is_on_the_device_of_its_tensors(launches):
    every_operation()
    names = {name for name, _, _ in launches}
    every = set()
    for op in KERNELS:
        module = importlib.import_module(f"zipr1_kernels.{op}.kernel")
        every |= {f"{op}.{n}" for n in vars(module) if n.endswith("_kernel")}
    assert names == every, "a kernel was not launched, or one was launched unseen"
    for name, current, devices in launches:
        assert {current} == devices, name


def test_a_gpu_is_made_the_current_one_and_a_cpu_is_not(monkeypatch):
    entered = []

    class Current:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *problem):
            entered.append("out")

    monkeypatch.setattr(torch.cuda, "device", Current)
    with launch.on(torch.device("cuda", 1)):
        assert entered == [torch.device("cuda", 1)]
    with launch.on(torch.device("cpu")):
        pass
    assert entered == [torch.device("cuda", 1), "out"]


def test_configurations_are_of_the_device_at_hand(monkeypatch):
    """Hopper has its own; newer and older cards, and a CPU, take those that fit everywhere."""
    tables = {80: {128: "fits everywhere"}, 90: {128: "Hopper"}}
    found = {"cuda:0": (9, 0), "cuda:1": (8, 6), "cuda:2": (12, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found[str(device)])
    monkeypatch.setattr(launch, "capability", launch.capability.__wrapped__)
    taken = [launch.table(tables, torch.device(name))[128] for name in (*found, "cpu")]
    assert taken == ["Hopper", *["fits everywhere"] * 3]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_second_gpu_gives_what_the_first_gives():
    assert torch.cuda.current_device() == 0
    for a, b in zip(every_operation("cuda:0"), every_operation("cuda:1"), strict=True):
        assert b.device.index == 1 and torch.equal(a.cpu(), b.cpu())


class Somewhere:
    """All that `plan` looks at."""

    def __init__(self, kind):
        self.device = torch.device(kind)


def fresh(**environment):
    """What a new process with these variables makes of three operations."""
    script = (
        "import torch; from zipr1_kernels import dispatch, ran, unusable\n"
        "class X: device = torch.device('cuda:0')\n"
        "dispatch.has_triton = dispatch.has_compiler = lambda: True\n"
        "if unusable(True): raise SystemExit(unusable(True))\n"
        "for op in ('probe_scores', 'select_top_p', 'kv_compact'): dispatch.plan(op, X()); print(ran(op))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    return done.stdout.splitlines() or [done.stderr.strip()]


def test_operations_are_switched_off_by_name():
    off = "torch: switched off by ZIPR1_KERNELS"
    assert fresh(ZIPR1_KERNELS="auto,-select_top_p") == ["triton", off, "triton"]
    assert fresh(ZIPR1_KERNELS="triton,-probe_scores,-kv_compact") == [off, "triton", off]
    assert fresh(ZIPR1_KERNELS="auto") == ["triton"] * 3


@pytest.mark.parametrize("switch", ["-select", "select_top_p", "", "-"])
def test_an_unknown_switch_is_refused(switch):
    said = fresh(ZIPR1_KERNELS=f"auto,{switch}")[0]
    assert said.startswith(f"ZIPR1_KERNELS has '{switch}' after the path; allowed: -NAME")
    assert "probe_scores, select_top_p" in said


def test_every_operation_that_asks_has_a_switch(monkeypatch):
    """Whatever asks `plan` is named in OPS, so that it can be switched off."""
    asked = set()
    plan = dispatch.plan
    monkeypatch.setattr(dispatch, "plan", lambda op, *x, **y: asked.add(op) or plan(op, *x, **y))
    every_operation()
    assert asked and asked <= set(dispatch.OPS)


def test_without_a_c_compiler_torch_runs_and_triton_is_refused(monkeypatch):
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "has_compiler", lambda: False)
    assert not dispatch.plan("kv_compact", Somewhere("cuda:0"))
    assert ran("kv_compact") == "torch: Triton finds no C compiler"
    with use("triton"):
        assert unusable(True) == (
            "Triton was asked for and Triton finds no C compiler: install gcc, or set CC"
        )
        assert unusable(False) is None or not dispatch.interpreted(), "the interpreter needs none"


def test_a_compiler_is_looked_for_as_triton_does(monkeypatch, tmp_path):
    find = dispatch.has_compiler.__wrapped__
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not find()
    (tmp_path / "clang").write_text("")
    (tmp_path / "clang").chmod(0o755)
    assert find()
    (tmp_path / "clang").unlink()
    monkeypatch.setenv("CC", "/opt/cc")
    assert find()


def test_a_forced_path_holds_in_autograds_threads_and_what_ran_is_ones_own():
    """Checkpointed layers are computed again in a thread that autograd starts."""
    seen = []

    def again():
        dispatch.plan("kv_compact", Somewhere("cpu"))
        seen.append(ran("kv_compact"))

    before = ran("kv_compact")
    with use("torch"):
        thread = threading.Thread(target=again)
        thread.start()
        thread.join()
    assert seen == ["torch: forced"] and ran("kv_compact") == before
    again()
    assert seen[1] == "torch: not on a GPU"
