"""The operators exist once: under ``ascend_plugin.ops``, never as a bare ``ops``."""

from __future__ import annotations

from pathlib import Path

import torch
from processes import run_python

import ascend_plugin.ops


def test_a_bare_import_is_refused(repository: Path) -> None:
    done = run_python("import ops", cwd=repository)
    assert done.returncode == 1
    assert "ImportError: import this package as 'ascend_plugin.ops', not as 'ops'" in done.stderr
    assert "would register every operator twice" in done.stderr


def test_a_bare_module_is_refused_too(repository: Path) -> None:
    done = run_python("import ops.paged_attention", cwd=repository)
    assert done.returncode == 1
    assert "import this package as 'ascend_plugin.ops'" in done.stderr


def test_the_operators_import_without_vllm() -> None:
    done = run_python(
        "import sys\n"
        "import ascend_plugin.ops.paged_attention, ascend_plugin.ops.kv_cache_write\n"
        "print(sorted(m for m in ('vllm', 'torch_npu') if m in sys.modules))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_package_is_the_folder_of_the_checkout(repository: Path) -> None:
    found = Path(ascend_plugin.ops.__file__).resolve().parent
    assert found == repository / "ops"
    assert hasattr(torch.ops, "ascend_plugin")
