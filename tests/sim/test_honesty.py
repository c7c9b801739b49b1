"""What is not simulated, or goes wrong, is named; nothing hangs and nothing is quietly wrong."""

from __future__ import annotations

import ctypes

import pytest
import torch

from ascend_plugin.ops.sim.runtime import Runtime, library

pytestmark = pytest.mark.timeout(120)


def test_an_operator_that_is_not_simulated_is_named():
    from ascend_plugin.ops.sim.table import OPERATORS

    assert "aclnnLinalgVectorNorm" not in OPERATORS, "choose another operator for this test"
    x = torch.zeros(4, device="npu")
    with pytest.raises(RuntimeError, match="aclnnLinalgVectorNorm is not simulated"):
        torch.linalg.vector_norm(x)
    assert x.add(1).cpu().tolist() == [1.0] * 4  # the process goes on


def test_operators_that_cannot_be_imported_are_named(child, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['ascend_plugin.ops.sim.operators'] = None\n"
    )
    import os

    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = child(
        "import torch; torch.ones(4, device='npu'); torch.npu.synchronize()",
        env={"PYTHONPATH": path},
    )
    assert done.code != 0
    assert "cannot be computed: importing ascend_plugin.ops.sim.bind failed" in done.output
    assert "ascend_plugin.ops.sim.operators" in done.output


def test_an_aclop_that_is_not_simulated_is_named():
    acl = library()
    acl.aclGetRecentErrMsg.restype = ctypes.c_char_p
    acl.aclCreateTensorDesc.restype = acl.aclCreateDataBuffer.restype = ctypes.c_void_p
    desc = (ctypes.c_void_p * 1)(acl.aclCreateTensorDesc(0, 0, None, 2))
    buffer = (ctypes.c_void_p * 1)(acl.aclCreateDataBuffer(None, 0))
    code = acl.aclopCompileAndExecute(
        b"MadeUp", 1, desc, buffer, 1, desc, buffer, None, 0, 0, None, None
    )
    assert code != 0
    assert "the operator MadeUp of the aclop interface is not simulated" in (
        acl.aclGetRecentErrMsg().decode()
    )


def test_a_c_function_that_is_not_simulated_is_named():
    acl = library()
    acl.aclGetRecentErrMsg.restype = ctypes.c_char_p
    assert acl.aclmdlInitDump() != 0
    assert "aclmdlInitDump is not simulated" in acl.aclGetRecentErrMsg().decode()


def test_an_atb_operator_is_named(child):
    done = child(
        """
        import torch, torch_npu
        k = torch.zeros(2, 2, 8, dtype=torch.bfloat16).npu()
        cache = torch.zeros(4, 16, 2, 8, dtype=torch.bfloat16).npu()
        slots = torch.zeros(2, dtype=torch.int32).npu()
        torch_npu._npu_reshape_and_cache(k, k, cache, cache, slots)
        torch.npu.synchronize()
        """
    )
    assert done.code != 0
    assert "is not simulated" in done.output
    assert "atb::" in done.output


def test_a_failed_task_surfaces_at_the_next_synchronisation_and_stays(child):
    done = child(
        """
        import torch
        from ascend_plugin.ops.sim.table import OPERATORS, Operator
        import ascend_plugin.ops.sim.operators, dataclasses
        def broken(*arguments): raise ValueError("planted")
        OPERATORS["aclnnNeg"] = dataclasses.replace(OPERATORS["aclnnNeg"], compute=broken)
        x = torch.ones(4, device="npu")
        y = -x
        print("enqueued")
        for turn in range(2):
            try: torch.npu.synchronize()
            except RuntimeError as error: print("turn", turn, str(error).replace("\\n", " "))
        """
    )
    assert "enqueued" in done.output, done.output
    for turn in (0, 1):
        line = next(line for line in done.output.splitlines() if line.startswith(f"turn {turn}"))
        assert "task aclnnNeg of stream" in line
        assert "ValueError: planted" in line


def test_a_pointer_that_is_no_object_has_no_kind():
    runtime = Runtime()
    buffer = ctypes.create_string_buffer(1024)
    assert runtime.object_kind(ctypes.addressof(buffer)) == 0
    assert runtime.object_kind(0) == 0


def test_op_api_objects_do_not_leak():
    runtime = Runtime()
    x = torch.ones(4, device="npu")
    torch.npu.synchronize()
    before = runtime.object_count()
    for _ in range(50):
        x.add_(1)
        torch.cat([x, x])
    torch.npu.synchronize()
    assert runtime.object_count() <= before + 8


def test_executors_are_released_after_their_launch():
    from ascend_plugin.ops.sim.bind import TABLE

    x = torch.ones(4, device="npu")
    torch.npu.synchronize()
    before = len(TABLE)
    for _ in range(50):
        x.add_(1)
    assert len(TABLE) > before  # the lazy schedule: nothing has run
    torch.npu.synchronize()
    assert len(TABLE) == before


def test_events_between_processes_are_refused():
    acl = library()
    acl.aclGetRecentErrMsg.restype = ctypes.c_char_p
    event = ctypes.c_void_p()
    assert acl.aclrtCreateEventExWithFlag(ctypes.byref(event), 0x40) != 0
    assert "are not simulated" in acl.aclGetRecentErrMsg().decode()


def test_a_destroyed_stream_is_refused():
    acl = library()
    acl.aclGetRecentErrMsg.restype = ctypes.c_char_p
    stream = ctypes.c_void_p()
    torch.npu.synchronize()
    assert acl.aclrtCreateStream(ctypes.byref(stream)) == 0
    assert acl.aclrtDestroyStream(stream) == 0
    assert acl.aclrtSynchronizeStream(stream) != 0
    assert "is no stream, or a destroyed one" in acl.aclGetRecentErrMsg().decode()


def test_outside_the_simulator_the_runtime_says_how_to_start_it(child):
    done = child(
        """
        from ascend_plugin.ops.sim.runtime import Runtime
        Runtime()
        """,
        env={"LD_LIBRARY_PATH": "", "PYTHONPATH": ""},
    )
    assert "start it with: ascend-plugin sim run" in done.output, done.output


def test_the_version_of_cann_is_the_documented_one():
    from torch_npu.npu.utils import get_cann_version

    assert get_cann_version() == "9.0.0"
