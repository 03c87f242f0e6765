# SPDX-License-Identifier: Apache-2.0
"""What expert parallelism will move and how long that takes: `moe_kernels.plan`. Nothing here needs a group of ranks.

planner.py   transports compared, one chosen        traffic.py    rows and bytes of a given choice, counted
flows.py     rows a class of link, expected         calibrate.py  the speeds of this very cluster
chances.py   the chances behind a plan              report.py     `python -m moe_kernels plan`
"""

from .planner import Cost, Links, Plan, plan
from .traffic import Traffic, exact_traffic, metadata_bytes, owners, row_bytes

__all__ = ["Cost", "Links", "Plan", "Traffic", "exact_traffic", "metadata_bytes", "owners", "plan", "row_bytes"]
