# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a Hugging Face MoE model with LoRA on its experts, on our kernels.

    pip install transformers peft
    python examples/finetune_lora.py                        # a tiny Mixtral with random weights, half a minute on a CPU
    python examples/finetune_lora.py --model DIR_OR_NAME    # any model that transformers loads

The model is replaced in place, its experts get adapters, and a Monitor watches how the load of the experts moves. At
the end the adapters are merged into the weights, and the merged model has to give the same logits.
"""

from __future__ import annotations

import argparse

import peft
import torch
import transformers

import moe_kernels as mk
from moe_kernels.demo.text import batch, standard_library


def load(name: str | None) -> transformers.PreTrainedModel:
    """The named model, or a tiny one that reads bytes."""
    if name is not None:
        return transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    config = transformers.MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or name; none: a tiny Mixtral")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    asked = parser.parse_args()
    model = load(asked.model)
    print(mk.replace(model))
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    model = peft.get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    share = sum(p.numel() for p in trained) / sum(p.numel() for p in model.parameters())
    print(f"{share:.1%} of the parameters are trained")
    optimizer, monitor = torch.optim.AdamW(trained, lr=5e-3), mk.Monitor(model)
    text = standard_library()
    for step in range(asked.steps):
        tokens = batch(text, step, asked.rows, asked.length)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step()
        if step % 10 == 0 or step == asked.steps - 1:
            worst = max(r["max_violation"] for r in monitor.records if r["step"] == step)
            print(f"step {step:>4}: loss {float(loss.detach()):.3f}, largest MaxVio {worst:.2f}", flush=True)
    model.eval()
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        after = model.merge_and_unload()(input_ids=tokens).logits
    print(f"merged: logits differ by {float((after - before).abs().max()):.1e}")


if __name__ == "__main__":
    main()
