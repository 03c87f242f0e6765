# SPDX-License-Identifier: Apache-2.0
"""Experts spread over ranks: `ExpertParallel`. One file a question, in the order of a token's way:

layer.py    the module: settings, placement, parameters      rows.py       a row as bytes
engine.py   one forward: chunks, order, what goes where      header.py     the record that opens an exchange
hops.py     which rows go to which rank, and their sum       link.py       a private group with deadlines
slots.py    the same with a static capacity                  heartbeat.py  who is alive
journey.py  there and back, for autograd                     carrier.py    what carries rows: csrc/comm, or torch
faults.py   MoECommError                                     torchtitan.py where torchtitan lets others move tokens
"""

from .faults import MoECommError
from .layer import ExpertParallel, ignore_in_ddp, local_parameters

__all__ = ["ExpertParallel", "MoECommError", "ignore_in_ddp", "local_parameters"]
