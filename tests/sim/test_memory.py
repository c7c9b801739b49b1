"""Device memory: a limit, accounts, poison, and pointers that are checked."""

from __future__ import annotations

import ctypes

import pytest
import torch

from ascend_plugin.ops.sim.runtime import Runtime, library

pytestmark = pytest.mark.timeout(120)

HUGE_FIRST = 0
TO_DEVICE, TO_HOST = 1, 2


@pytest.fixture(scope="module")
def acl() -> ctypes.CDLL:
    torch.npu.synchronize()
    loaded = library()
    loaded.aclGetRecentErrMsg.restype = ctypes.c_char_p
    return loaded


def allocate(acl: ctypes.CDLL, size: int) -> ctypes.c_void_p:
    pointer = ctypes.c_void_p()
    assert acl.aclrtMalloc(ctypes.byref(pointer), ctypes.c_size_t(size), HUGE_FIRST) == 0
    return pointer


def told(acl: ctypes.CDLL) -> str:
    return acl.aclGetRecentErrMsg().decode()


@pytest.mark.parametrize("elements", [3, 1 << 20])
def test_fresh_memory_is_poisoned(elements):
    # A pool of its own: what other tests have cached is not fresh.
    with torch.npu.use_mem_pool(torch.npu.MemPool()):
        x = torch.empty(elements, device="npu").cpu()
    assert x.isnan().all()


def test_accounts_follow_the_allocator():
    runtime = Runtime()
    torch.npu.empty_cache()
    before = runtime.memory(0)
    x = torch.empty(64 << 20, dtype=torch.uint8, device="npu")
    during = runtime.memory(0)
    assert 64 << 20 <= during.allocated - before.allocated <= 68 << 20
    assert torch.npu.mem_get_info()[0] == during.limit - during.allocated
    assert runtime.device_of(x.data_ptr()) == 0
    assert runtime.bytes_left(x.data_ptr() + 100) >= (64 << 20) - 100
    address = x.data_ptr()
    del x
    torch.npu.empty_cache()
    assert runtime.memory(0).allocated == before.allocated
    assert runtime.memory(0).peak >= during.allocated
    assert runtime.device_of(address) == -1


def test_too_much_is_torchs_out_of_memory_error():
    limit = Runtime().memory(0).limit
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(limit + 1, dtype=torch.uint8, device="npu")
    assert torch.ones(4, device="npu").cpu().tolist() == [1.0] * 4


def test_memory_that_is_never_written_costs_the_host_nothing():
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident()
    x = torch.empty(1 << 30, dtype=torch.uint8, device="npu")
    assert resident() - before < 64 << 20
    del x
    torch.npu.empty_cache()


def test_freeing_what_was_not_allocated_is_refused(acl):
    pointer = allocate(acl, 1024)
    inside = ctypes.c_void_p(pointer.value + 512)
    assert acl.aclrtFree(inside) != 0
    assert "inside an allocation" in told(acl)
    assert acl.aclrtFree(pointer) == 0
    assert acl.aclrtFree(pointer) != 0
    assert "is no device memory" in told(acl)


def test_a_copy_beyond_an_allocation_is_refused(acl):
    pointer, host = allocate(acl, 1024), ctypes.create_string_buffer(4096)
    code = acl.aclrtMemcpy(pointer, ctypes.c_size_t(4096), host, ctypes.c_size_t(4096), TO_DEVICE)
    assert code != 0
    assert "leave its allocation, which has 1024 left" in told(acl)
    acl.aclrtFree(pointer)


def test_a_copy_of_the_wrong_kind_is_refused(acl):
    pointer, host = allocate(acl, 1024), ctypes.create_string_buffer(1024)
    size = ctypes.c_size_t(64)
    assert acl.aclrtMemcpy(pointer, size, host, size, TO_HOST) != 0
    assert "pageable host memory, but the kind of copy wants device" in told(acl)
    acl.aclrtFree(pointer)


def test_pinned_memory_is_told_apart():
    assert torch.ones(4).pin_memory().is_pinned()
    assert not torch.ones(4).is_pinned()


def test_expandable_segments_work(child):
    done = child(
        """
        import torch
        x = [torch.full((n << 20,), float(n), device="npu") for n in (1, 7, 30, 2)]
        assert [t.sum().item() / t.numel() for t in x] == [1.0, 7.0, 30.0, 2.0]
        del x; torch.npu.empty_cache()
        assert torch.empty(1 << 20, device="npu").cpu().isnan().all()
        try: torch.empty(200 << 20, dtype=torch.uint8, device="npu")
        except torch.OutOfMemoryError: print("limited")
        """,
        env={"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"},
        memory=190 << 20,
    )
    assert done.code == 0, done.output
    assert "limited" in done.output
