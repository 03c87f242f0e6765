# SPDX-License-Identifier: Apache-2.0
"""Faults that no run can report, and why each is harmless. The key is "file | what | line of source"."""

HARMLESS: dict[str, str] = {}
