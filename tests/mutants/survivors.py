# SPDX-License-Identifier: Apache-2.0
"""Faults that no run can report, and why each is harmless. The key is "file | what | line of source"."""

HARMLESS: dict[str, str] = {
    "tests/simt/rules_sync.cu | delete griddepcontrol_launch_dependents | griddepcontrol_launch_dependents();": (
        "It only lets the next kernel start sooner; without it that starts when this one ends, which is always allowed."
    ),
    "tests/simt/rules_async.cu | delete fence_mbarrier_init | fence_mbarrier_init();": (
        "It publishes the init to the other blocks of a cluster; inside a block the __syncthreads that follows does."
    ),
}
