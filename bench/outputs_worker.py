"""One way of returning: a step of a Hugging Face Llama, checked against eager, timed, its peak taken."""

from __future__ import annotations

import os
import statistics
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.launch import report, task
from bench.memory import peak_growth
from bench.worker import clock

os.environ.setdefault("HF_HUB_OFFLINE", "1")


class LossAlone(nn.Module):
    """The same model, of which the compiled graph returns nothing but the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs).loss


def llama(work: dict[str, Any]) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": work["layers"]}
    widths = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": work["V"]}
    others = {"max_position_embeddings": work["T"], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**heads, **widths, **others))


def main() -> None:
    work = task()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group("gloo")
    report(**measure(work))
    dist.destroy_process_group()


def measure(work: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    model = llama(work)
    ids = torch.randint(3, work["V"], (1, work["T"]))
    alone, held = work["returns"] == "the loss alone", work["returns"] == "all, held"
    options = {"outputs": "whole"} if work["returns"] == "all, at once" else {}
    function = LossAlone(model) if alone else model
    compiled = torch.compile(function, backend=work["backend"], options=options)

    def step() -> Tensor:
        out = compiled(input_ids=ids, labels=ids)
        loss = out if alone else out.loss
        kept = out if held else None
        del out
        loss.backward()
        del kept
        return loss.detach()

    def run() -> None:
        model.zero_grad()
        step()

    error = check(model, step, ids)
    times = clock(run, work["budget"], work["ranks"])
    model.zero_grad()
    return {"error": error, "seconds": statistics.median(times), "bytes": peak_growth(run)}


def check(model: nn.Module, step: Any, ids: Tensor) -> float:
    """The relative error of the loss and of the head's gradient against eager."""
    found = step(), model.lm_head.weight.grad
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    expected = loss.detach(), model.lm_head.weight.grad
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


if __name__ == "__main__":
    main()
