"""What ``bench npu-cost`` makes of a trace: no NPU, real or simulated, is needed."""

from __future__ import annotations

import json

import pytest

from ascend_plugin.bench.errors import BenchError
from ascend_plugin.bench.npu_cost import models, rows, runner, settings, trace
from ascend_plugin.bench.npu_cost.chip import ASCEND_910C_DIE, Chip, estimate
from ascend_plugin.bench.npu_cost.kernel_rows import kernel_row
from ascend_plugin.bench.npu_cost.messages import (
    Job,
    KernelShape,
    Launched,
    Probe,
    Probed,
    to_json,
)
from ascend_plugin.bench.npu_cost.trace import Work

#: Rates that make arithmetic easy.
CHIP = Chip("easy", memory=1e6, cube=1e6, vector=4e6, source="none")


def launch(operator: str, *tensors: tuple, moved: int = 0) -> dict:
    return {"operator": operator, "tensors": list(tensors), "bytes": moved}


MATMUL = launch(
    "aclnnMatmulWeightNz",
    ([2, 64], "bfloat16", "ND"),
    ([64, 32], "bfloat16", "NZ"),
    ([2, 32], "bfloat16", "ND"),
    moved=5000,
)


def test_products_are_counted_from_shapes() -> None:
    works = trace.add_up([MATMUL, MATMUL, launch("aclnnSwiGlu", moved=7)])
    assert works == {
        "aclnnMatmulWeightNz": Work(2, 10000, 2 * 2 * 2 * 64 * 32),
        "aclnnSwiGlu": Work(1, 7, 0),
    }


def test_a_bias_is_no_factor() -> None:
    bias = ([32], "bfloat16", "ND")
    addmm = launch("aclnnAddmm", bias, *MATMUL["tensors"])
    assert trace.add_up([addmm])["aclnnAddmm"].flops == 2 * 2 * 64 * 32


@pytest.mark.parametrize(("positions", "read"), [(4096, 2), (1, 1)])
def test_of_the_rotary_table_only_the_rows_read_count(positions: int, read: int) -> None:
    table = ([positions, 128], "bfloat16", "ND")
    rows_ = ([2, 512], "bfloat16", "ND")
    total = 100 + positions * 256
    rotary = launch(
        "aclnnRopeWithSinCosCacheV2", ([2], "int64", "ND"), rows_, rows_, table, moved=total
    )
    assert trace.add_up([rotary])["aclnnRopeWithSinCosCacheV2"].bytes == 100 + read * 256


def test_a_step_is_read_from_its_place_in_the_trace(tmp_path) -> None:
    path = tmp_path / "trace"
    lines = [json.dumps(launch(name, moved=3)) + "\n" for name in ("aclnnA", "aclnnB", "aclnnC")]
    path.write_text("".join(lines))
    begin, end = len(lines[0]), len(lines[0]) + len(lines[1])
    assert trace.read_step(path, begin, end) == {"aclnnB": Work(1, 3, 0)}
    assert trace.read_step(path, begin, begin) == {}


def test_a_layer_is_the_difference_shared_by_the_layers() -> None:
    shallow = {"norm": Work(3, 30), "matmul": Work(5, 500, 50), "once": Work(1, 9)}
    deep = {"norm": Work(7, 70), "matmul": Work(13, 1300, 130), "once": Work(1, 9)}
    assert trace.per_layer(shallow, deep, 2) == {
        "norm": Work(2, 20),
        "matmul": Work(4, 400, 40),
    }


@pytest.mark.parametrize("deep", [{"norm": Work(4)}, {}])
def test_layers_that_differ_have_no_number(deep: dict) -> None:
    with pytest.raises(BenchError, match="norm more, which is no multiple"):
        trace.per_layer({"norm": Work(1)}, deep, 2)


def test_bytes_follow_the_context() -> None:
    near = (132, {"attention": Work(1, 1320), "matmul": Work(4, 7, 3)})
    far = (260, {"attention": Work(1, 2600), "matmul": Work(4, 7, 3)})
    found = trace.at_context(near, far, 4096)
    assert found == {"attention": Work(1, 40960), "matmul": Work(4, 7, 3)}


def test_other_launches_at_another_context_are_refused() -> None:
    with pytest.raises(BenchError, match="other operators at context 132 than at 260"):
        trace.at_context((132, {"a": Work(1)}), (260, {"a": Work(2)}), 4096)


@pytest.mark.parametrize("name", ["aclnnFusedInferAttentionScoreV3", "paged_attention_c8d_bf16"])
def test_attention_gets_its_products(name: str) -> None:
    works = {name: Work(1, 5, cycles=3), "other": Work(1, 6)}
    assert trace.with_attention(works, 44) == {
        name: Work(1, 5, 44, cycles=3),
        "other": Work(1, 6),
    }


def test_kernels_say_their_cycles_and_what_stays_in_the_cache(tmp_path) -> None:
    kernel = launch("paged_attention_c8d_bf16", moved=900)
    kernel |= {"workspace": 300, "cycles": 70, "bound": "cube"}
    path = tmp_path / "trace"
    line = json.dumps(kernel) + "\n"
    path.write_text(line + line)
    assert trace.read_step(path, 0, 2 * len(line)) == {
        "paged_attention_c8d_bf16": Work(2, 1200, 0, 140)
    }
    assert trace.kernel_bounds(path, 0, len(line)) == {"paged_attention_c8d_bf16": "cube"}


@pytest.mark.parametrize(
    ("works", "bound", "us"),
    [
        ([Work(1, 3)], "memory", 3),
        ([Work(1, 3, 5)], "cube", 5),
        ([Work(1, 3), Work(1, 1, 9), Work(1, 3)], "cube", 15),
        ([Work(1, 3), Work(1, 1, 5), Work(1, 3)], "memory", 11),
        ([], "memory", 0),
    ],
)
def test_the_roofline_takes_each_operator_s_longest_time(works, bound, us) -> None:
    found = estimate(works, CHIP)
    assert (found.bound, found.us) == (bound, pytest.approx(us))


def test_slow_vector_units_bound_what_has_no_products() -> None:
    slow = Chip("slow vectors", memory=4e6, cube=1e6, vector=1e6, source="none")
    assert estimate([Work(1, 8)], slow).bound == "vector"
    assert estimate([Work(1, 8, 1)], slow).bound == "memory"


def test_a_die_has_half_of_its_package() -> None:
    assert (ASCEND_910C_DIE.memory, ASCEND_910C_DIE.cube) == (1.6e12, 376e12)
    assert "2506.12708" in ASCEND_910C_DIE.source


QWEN = models.GEOMETRIES["qwen3-8b"]


def test_weights_of_a_layer() -> None:
    # Qwen3-8B has 6.95 billion parameters beside its embeddings, in 36 layers.
    assert 36 * QWEN.layer_weight_bytes() / 2 == pytest.approx(6.95e9, rel=0.01)


def case(phase: str = "decode", variant: str = "bf16") -> rows.Case:
    return rows.Case(QWEN, phase, variant, "full", batch=4, context=100)


def test_the_row_of_a_traced_layer() -> None:
    row = rows.traced_row(case(), {"a": Work(3, 1.6e6), "b": Work(1, 0, 752e6)}, ASCEND_910C_DIE)
    assert (row.launches_per_layer, row.bytes_per_layer) == (4, 1600000)
    assert row.bytes_per_token == 1600000 * 36 // 4
    assert (row.bound, row.estimated_us) == ("cube", pytest.approx(3 * 36))
    assert row.measured_us is None


@pytest.mark.parametrize(
    ("variant", "token"), [("bf16", 4096), ("c8s", 2048), ("c8d", 2112), ("c8p", 2192)]
)
def test_the_row_of_a_measured_layer(variant: str, token: int) -> None:
    row = rows.measured_row(case(variant=variant), ASCEND_910C_DIE, 12.5)
    assert (row.launches_per_layer, row.measured_us) == (None, 450.0)
    assert row.bytes_per_layer == QWEN.layer_weight_bytes() + 4 * 100 * token
    assert row.bound == "memory"


def probed(*step_us: float) -> Probed:
    return Probed(((0, 0),) * len(step_us), step_us, "full", (), {}, "chip")


def test_layers_take_the_time_between_two_depths() -> None:
    assert runner.layer_time([probed(10, 11, 90), probed(30, 31, 32)]) == 10.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch": 0}, "--batch 0 is not possible; use 1 to 256"),
        ({"context": 3}, "--context 3 is not possible; use 4 to"),
        ({"variant": "c9"}, "--variant c9 is unknown; use bf16, c8d, c8s, c8p"),
        ({"drafts": 16}, "--drafts 16 is not possible; use 0 to 15"),
        ({"acceptance": 1.5}, "--acceptance 1.5 is not possible; use 0 to 1"),
        ({"graphs": "half"}, "--graphs half is unknown; use none, piecewise, full"),
    ],
)
def test_impossible_settings_are_refused(values: dict, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        settings.Settings(QWEN, **values)


@pytest.mark.parametrize(
    ("drafts", "acceptance", "tokens"),
    [(0, 0.7, 1.0), (3, 0.0, 1.0), (3, 1.0, 4.0), (2, 0.5, 1.75)],
)
def test_tokens_of_a_verification(drafts: int, acceptance: float, tokens: float) -> None:
    assert rows.Speculation(drafts, acceptance).tokens == pytest.approx(tokens)


def test_launches_of_an_accepted_token() -> None:
    """Layers and what is outside once for the verification, and a layer of each for a draft."""
    plain = rows.traced_row(case(), {"a": Work(10, 1.0)}, ASCEND_910C_DIE)
    assert plain.launches_per_accepted_token is None
    row = rows.with_speculation(plain, rows.Speculation(2, 0.5), outside=7)
    launches = 10 * plain.layers + 7 + 2 * (10 + 7)
    assert row.launches_per_accepted_token == pytest.approx(launches / (1.75 * row.batch), abs=0.01)
    assert (row.drafts, row.acceptance) == (2, 0.5)


def test_long_contexts_are_told_from_two_a_block_apart() -> None:
    assert settings.simulated_contexts(64) == (64,)
    near, far = settings.simulated_contexts(4096)
    assert far - near == 128


def test_probes_differ_in_layers_and_width(tmp_path) -> None:
    asked = settings.Settings(QWEN, "c8s", 8, 4096, "full")
    probes = settings.simulated_probes(asked, False, tmp_path)
    assert [(probe.contexts, probe.positions) for probe in probes] == [((132, 260), 384)] * 2
    told = [json.loads((tmp_path / p.folder / "config.json").read_text()) for p in probes]
    assert [config["num_hidden_layers"] for config in told] == [1, 3]
    assert {config["hidden_size"] for config in told} == {4096}
    # One prompt is prefilled, in one step's tokens; the others find its blocks.
    assert all(probe.warm and probe.share and probe.step_tokens == 128 for probe in probes)
    assert {(each - probe.steps) % 128 for probe in probes for each in probe.contexts} == {1}
    for probe in probes:
        assert probe.engine["kv_cache_dtype"] == "int8_per_token_head"
        assert probe.engine["load_format"] == settings.ZEROS
        assert probe.engine["compilation_config"]["cudagraph_capture_sizes"] == [8]


def test_the_naive_engine_captures_nothing(tmp_path) -> None:
    (probe, _) = settings.simulated_probes(settings.Settings(QWEN, context=8), True, tmp_path)
    assert probe.engine["enforce_eager"]
    assert probe.engine["compilation_config"] == {"custom_ops": ["none"]}


def test_short_contexts_are_prefilled_in_one_step(tmp_path) -> None:
    (probe, _) = settings.simulated_probes(
        settings.Settings(QWEN, batch=8, context=64), False, tmp_path
    )
    assert not probe.warm
    assert probe.step_tokens >= 8 * 61


@pytest.mark.parametrize(("asked", "timed"), [(4096, 4129), (5, 161), (64, 161)])
def test_timed_engines_have_prompts_of_their_own(tmp_path, asked: int, timed: int) -> None:
    probes = settings.timed_probes(settings.Settings(QWEN, context=asked), False, tmp_path)
    assert {probe.contexts for probe in probes} == {(timed,)}
    for probe in probes:
        assert probe.warm
        assert not probe.share
        assert (timed - probe.steps) % 128 == 1
        assert probe.positions >= timed + 2
        assert probe.engine["load_format"] == "dummy"


def test_models_that_do_not_fit_are_refused() -> None:
    wide = models.Geometry("wide", "llama", 1, 16384, 53248, 128, 8, 128, "test")
    with pytest.raises(BenchError, match=r"wide: 3 layers have .* Choose a smaller model"):
        settings.check_size(wide)


def test_a_folder_is_a_model(tmp_path) -> None:
    config = QWEN.config(36, 4096)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = models.resolve_geometry(str(tmp_path))
    shape = ("architecture", "layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim")
    assert [getattr(found, name) for name in shape] == [getattr(QWEN, name) for name in shape]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no known shape"),
        ({"architectures": ["MixtralForCausalLM"]}, "counted are LlamaForCausalLM"),
        ({"architectures": ["LlamaForCausalLM"]}, "has no num_hidden_layers, hidden_size"),
    ],
)
def test_other_folders_are_refused(tmp_path, config: dict | None, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BenchError, match=message):
        models.resolve_geometry(str(tmp_path))


def test_a_job_survives_the_pipe() -> None:
    probe = Probe("folder", 2, (64, 192), 3, 128, False, True, 128, {"enforce_eager": True})
    job = Job((probe,), (KernelShape("c8d", 4, 2, 64, 128, 2, 64, 1),), "trace")
    assert Job.from_json(to_json(job)) == job
    assert job.answers() == 3


def test_the_kernel_runs_at_the_asked_shape_first() -> None:
    asked = settings.Settings(QWEN, "c8p", 8, 4096, drafts=3)
    assert settings.kernel_cases(asked) == ((8, 4096, 1), (8, 4096, 4))
    (shape,) = settings.kernel_shapes(asked, (8, 4096, 4))
    assert shape == KernelShape("c8p", 32, 8, 128, 128, 8, 4096, 4)
    assert settings.kernel_cases(settings.Settings(QWEN, "c8d", drafts=0)) == ((8, 4096, 1),)
    assert settings.kernel_cases(settings.Settings(QWEN, "bf16")) == ()


def test_a_sweep_adds_shapes_once() -> None:
    cases = settings.kernel_cases(settings.Settings(QWEN, "c8d", 8, 4096, sweep=True))
    batches, contexts = settings.SWEEP
    assert len(cases) == len(set(cases)) == 2 * len(batches) * len(contexts)
    assert cases[0] == (8, 4096, 1)


def test_the_kernel_of_many_tokens_is_told_from_two_contexts_of_whole_blocks() -> None:
    assert settings.kernel_contexts(64, 4096) == (4096,)
    near, far = settings.kernel_contexts(64, 8192)
    assert (near, far) == (2048, 4096)
    asked = settings.Settings(QWEN, "c8d", 64, 8192)
    assert [each.context for each in settings.kernel_shapes(asked, (64, 8192, 1))] == [near, far]


def kernel_line(context: int, bound: str = "memory") -> str:
    line = {
        "operator": "paged_attention_c8d_bf16",
        "bytes": 1000 * context,
        "cores": 24,
        "workspace": 100 * context,
        "cycles": 1800 * context,
        "memory_cycles": 17 * context,
        "busiest": "AIV V",
        "busiest_cycles": 18 * context,
        "bound": bound,
        "clock_ghz": 1.8,
        "tensors": [],
        "reads": {"pages": 640 * context, "extras": 20 * context, "query": 9},
    }
    return json.dumps(line) + "\n"


@pytest.mark.parametrize("contexts", [(512,), (128, 256)])
def test_the_row_of_a_kernel(tmp_path, contexts: tuple[int, ...]) -> None:
    path, launched, lines = tmp_path / "trace", [], ""
    for context in contexts:
        line = kernel_line(context, "vector")
        launched.append(Launched((len(lines), len(lines) + len(line)), 600.0 * context, None))
        lines += line
    path.write_text(lines)
    shapes = [KernelShape("c8d", 32, 8, 128, 128, 2, context, 4) for context in contexts]
    row = kernel_row(QWEN, 512, shapes, launched, path, ASCEND_910C_DIE)
    assert (row.phase, row.query_tokens, row.context) == ("verification", 4, 512)
    assert (row.cycles, row.estimated_us) == (1800 * 512, 512.0)
    assert (row.bound, row.busiest, row.busiest_cycles) == ("vector", "AIV V", 18 * 512)
    assert (row.pages_read, row.pages_read_ratio) == (660 * 512, 1.1)
    assert (row.bytes, row.workspace_bytes) == (900 * 512, 100 * 512)
    assert row.roofline_us == pytest.approx(1e6 * 900 * 512 / 1.6e12, abs=0.05)
    assert (row.note is None) == (len(contexts) == 1)


def test_a_layer_gets_the_kernel_of_the_asked_context() -> None:
    name = "paged_attention_c8d_bf16"
    works = {name: Work(1, 5, 7, 3), "other": Work(1, 6)}
    assert trace.with_kernel(works, 11, 13) == {name: Work(1, 11, 7, 13), "other": Work(1, 6)}


def test_on_hardware_the_row_of_a_kernel_has_its_time_and_no_estimate() -> None:
    shape = KernelShape("c8d", 32, 8, 128, 128, 8, 4096, 1)
    launched = Launched((0, 0), 8 * 4096 * 2112.0, 77.0)
    row = kernel_row(QWEN, 4096, [shape], [launched], None, ASCEND_910C_DIE)
    assert (row.measured_us, row.cycles, row.bound, row.pages_read_ratio) == (77.0, *[None] * 3)
    assert (row.roofline_bound, row.pages_bytes) == ("memory", 8 * 4096 * 2112)
