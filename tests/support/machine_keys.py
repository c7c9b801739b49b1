"""What ``meta`` of every ``--json`` output holds."""

from __future__ import annotations

MACHINE_KEYS = frozenset(
    {
        "versions",
        "cpu",
        "isa",
        "threads",
        "cpus_available",
        "load_average",
        "huge_pages",
        "time",
        "argv",
    }
)
