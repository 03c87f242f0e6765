# SPDX-License-Identifier: Apache-2.0
"""Blocks that Hugging Face's experts interface does not reach: one file a family, one table for all."""

from __future__ import annotations

from . import dbrx, grok1, jetmoe, llama4, longcat_flash, nllb_moe, step3p7, switch_transformers, vitpose
from .adapter import Adapter

FAMILIES = (dbrx, grok1, jetmoe, llama4, longcat_flash, nllb_moe, step3p7, switch_transformers, vitpose)

TABLE: dict[str, Adapter] = {adapter.kind: adapter for family in FAMILIES for adapter in family.ADAPTERS}
"""Class name -> how it is taken over."""

REFUSED: dict[str, str] = {
    "FP8Experts": "its experts are FP8, and quantised experts are not supported: load the model dequantised",
    "Mxfp4GptOssExperts": "its experts are MXFP4: load the model with Mxfp4Config(dequantize=True)",
    "SequentialLlama4TextExperts": "its experts are split for quantisation: load the model dequantised",
    "DogeCDMoE": "its experts are one hidden unit wide, and our kernels work on blocks of 32 units",
}
"""Class name -> why it is left alone."""

__all__ = ["REFUSED", "TABLE", "Adapter"]
