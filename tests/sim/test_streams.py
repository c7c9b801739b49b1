"""Streams and events are real: work is not visible before what it waits for."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def idle():
    torch.npu.synchronize()
    yield
    torch.npu.synchronize()


def pinned(*values: float) -> torch.Tensor:
    return torch.tensor(values).pin_memory()


def test_a_wait_orders_two_streams():
    x, y = torch.zeros(4, device="npu"), torch.zeros(4, device="npu")
    side = torch.npu.Stream()
    side.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(side):
        x.fill_(7)
    torch.npu.current_stream().wait_stream(side)
    y.copy_(x)
    assert y.cpu().tolist() == [7.0] * 4


def test_a_missing_wait_is_seen():
    x, y = torch.zeros(4, device="npu"), torch.zeros(4, device="npu")
    torch.npu.synchronize()
    side = torch.npu.Stream()
    with torch.npu.stream(side):
        x.fill_(7)
    y.copy_(x)  # should have waited
    torch.npu.current_stream().synchronize()
    assert y.cpu().tolist() == [0.0] * 4
    side.synchronize()
    assert x.cpu().tolist() == [7.0] * 4


def test_a_wait_sees_the_record_before_it_not_a_later_one():
    x, y = torch.zeros(1, device="npu"), torch.zeros(1, device="npu")
    torch.npu.synchronize()
    side, event = torch.npu.Stream(), torch.npu.Event()
    with torch.npu.stream(side):
        x.fill_(1)
        event.record()
    torch.npu.current_stream().wait_event(event)
    with torch.npu.stream(side):
        x.fill_(2)
        event.record()
    y.copy_(x)
    assert y.cpu().item() == 1.0


def test_a_query_is_false_until_the_work_is_done():
    event = torch.npu.Event()
    x = torch.zeros(1, device="npu")
    torch.npu.synchronize()
    for _ in range(3):
        x.add_(1)
    event.record()
    answers = [event.query()]
    while not answers[-1] and len(answers) < 100:
        answers.append(event.query())
    assert answers[0] is False
    assert answers[-1] is True


def test_elapsed_time_needs_events_that_were_recorded():
    first, last = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    first.record()
    torch.ones(4, device="npu").add_(1)
    last.record()
    assert first.elapsed_time(last) >= 0


def test_a_pinned_buffer_that_is_reused_too_early_is_seen():
    source, x = pinned(1, 2), torch.zeros(2, device="npu")
    torch.npu.synchronize()
    x.copy_(source, non_blocking=True)
    source.fill_(9)  # before the copy has run
    assert x.cpu().tolist() == [9.0, 9.0]


def test_a_pageable_buffer_may_be_reused_at_once():
    source, x = torch.tensor([1.0, 2.0]), torch.zeros(2, device="npu")
    torch.npu.synchronize()
    x.copy_(source, non_blocking=True)
    source.fill_(9)
    assert x.cpu().tolist() == [1.0, 2.0]


def test_a_pinned_result_is_not_there_before_its_event():
    x, result = torch.full((2,), 5.0, device="npu"), pinned(0, 0)
    torch.npu.synchronize()
    event = torch.npu.Event()
    result.copy_(x, non_blocking=True)
    event.record()
    assert result.tolist() == [0.0, 0.0]
    event.synchronize()
    assert result.tolist() == [5.0, 5.0]


def test_a_full_stream_runs_its_oldest_tasks():
    x = torch.zeros(1, device="npu")
    for _ in range(3000):
        x.add_(1)
    assert x.cpu().item() == 3000


EAGER = """
    import torch
    x, y = torch.zeros(4, device="npu"), torch.zeros(4, device="npu")
    side = torch.npu.Stream()
    with torch.npu.stream(side): x.fill_(7)
    y.copy_(x)  # no wait
    print("y is", y.cpu().tolist())
"""


def test_the_eager_schedule_hides_a_missing_wait(child):
    done = child(EAGER, schedule="eager")
    assert "y is [7.0, 7.0, 7.0, 7.0]" in done.output, done.output


RANDOM = """
    import torch
    seen = []
    streams = [torch.npu.Stream() for _ in range(4)]
    for turn in range(8):
        x = torch.zeros(1, device="npu"); torch.npu.synchronize()
        for i, stream in enumerate(streams):
            with torch.npu.stream(stream): x.fill_(i)  # a race
        torch.npu.synchronize()
        seen.append(int(x.cpu().item()))
    print("seen", seen)
"""


def test_the_random_schedule_repeats_for_a_seed_and_differs_between_seeds(child):
    runs = [child(RANDOM, schedule="random", seed=seed).output for seed in (1, 1, 2)]
    seen = [run.partition("seen ")[2].strip() for run in runs]
    assert seen[0], runs[0]
    assert seen[0] == seen[1] != seen[2]


def test_a_wait_that_nothing_ends_is_an_error_that_names_stream_and_value(child):
    done = child(
        """
        import torch
        event = torch.npu.ExternalEvent()
        torch.npu.synchronize()
        event.wait(torch.npu.current_stream())
        torch.npu.synchronize()
        """,
        timeout=1.0,
    )
    assert done.code != 0
    assert "never ends: stream" in done.output
    assert "an external event" in done.output


def test_two_devices_are_apart(child):
    done = child(
        """
        import torch
        a, b = torch.ones(4, device="npu:0"), torch.full((4,), 2.0, device="npu:1")
        assert torch.npu.device_count() == 2
        assert b.to("npu:0").add(a).cpu().tolist() == [3.0] * 4
        print("right")
        """,
        devices=2,
    )
    assert "right" in done.output, done.output


def test_the_task_queue_of_torch_npu_works(child):
    done = child(
        """
        import torch
        x = torch.zeros(4, device="npu")
        for _ in range(100): x.add_(1)
        torch.npu.synchronize()
        assert x.cpu().tolist() == [100.0] * 4
        print("right")
        """,
        env={"TASK_QUEUE_ENABLE": "1"},
    )
    assert "right" in done.output, done.output


def test_cann_s_list_of_visible_devices_counts(child):
    code = """
        import ctypes
        from ascend_plugin.ops.sim.runtime import library
        count = ctypes.c_uint32()
        library().aclrtGetDeviceCount(ctypes.byref(count))
        print("devices", count.value)
    """
    for visible, count in [("2,0", 2), ("1", 1), ("0,9,1", 1), ("", 0)]:
        done = child(code, devices=3, env={"ASCEND_RT_VISIBLE_DEVICES": visible})
        assert f"devices {count}" in done.output, (visible, done.output)
