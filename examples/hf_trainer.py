"""transformers.Trainer, the sequence over all ranks.

Trainer gives each process other data, which is right for data parallel and wrong along the sequence: the
loader below gives all ranks the same. Its closed list of Dynamo backends has no "spcompile", so the model is
compiled before Trainer gets it.

PYTHONHASHSEED=0 torchrun --nproc-per-node 2 examples/hf_trainer.py
python examples/hf_trainer.py --eager       # the same on one process, without spcompile
"""

import sys
import tempfile
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from spcompile.data import sampler

EAGER = "--eager" in sys.argv


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Six sequences of 101 tokens."""

    def __init__(self) -> None:
        self.ids = torch.randint(3, 128, (6, 101), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class SequenceTrainer(Trainer):
    """A Trainer whose ranks all read the same batches."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The loader as it is: Accelerate would deal its batches out to the ranks."""
        assert self.train_dataset is not None
        order = sampler(self.train_dataset, shuffle=True, seed=1)
        return DataLoader(self.train_dataset, self.args.train_batch_size, sampler=order)


class Show(TrainerCallback):
    """Prints each step's loss on rank 0."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.is_world_process_zero and "loss" in logs:
            print(f"step {state.global_step - 1} loss {float(logs['loss']):.8f}", flush=True)


torch.manual_seed(0)
size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=128, pad_token_id=0, **size, use_cache=False))
if not EAGER:
    torch._dynamo.config.optimize_ddp = False  # Trainer wraps the model in DDP, which would cut the graph
    model.compile(backend="spcompile")

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=2,
        num_train_epochs=1,
        learning_rate=1e-3,
        logging_steps=1,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    SequenceTrainer(model, arguments, train_dataset=Tokens(), callbacks=[Show()]).train()
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
