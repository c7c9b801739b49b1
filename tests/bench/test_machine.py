"""What a result says about the machine."""

from __future__ import annotations

from ascend_plugin.bench import machine


def test_cpu_model(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n")
    assert machine.cpu_model(cpuinfo) == "AMD EPYC (cpu family 25, model 17)"
    assert machine.cpu_model(tmp_path / "missing")


def test_huge_pages(tmp_path):
    setting = tmp_path / "enabled"
    setting.write_text("always [madvise] never\n")
    assert machine.huge_pages(setting) == "madvise"
    assert machine.huge_pages(tmp_path / "missing") is None


def test_last_level_cache(tmp_path):
    for index, size in enumerate(("32K", "1024K", "32M")):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        (folder / "size").write_text(f"{size}\n")
    assert machine.last_level_cache_bytes(tmp_path) == 32 * 2**20
    assert machine.last_level_cache_bytes(tmp_path / "missing") > 0


def test_available_memory(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       100 kB\nMemAvailable:    50 kB\n")
    assert machine.available_memory(meminfo) == 50 * 1024
    assert machine.available_memory(tmp_path / "missing") is None


def test_a_busy_machine_is_remarked():
    assert machine.busy_remark(0.0) is None
    remark = machine.busy_remark(1000.0)
    assert remark
    assert "load 1000" in remark
