"""Lightning, the sequence over all ranks: a LightningModule with a compiled module inside.

Lightning gives each process other data unless `use_distributed_sampler=False`; the loader here gives all
the same.

PYTHONHASHSEED=0 torchrun --nproc-per-node 2 examples/lightning_module.py
python examples/lightning_module.py --eager # the same on one process, without spcompile
"""

import sys

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

from spcompile.data import sampler
from spcompile.example import tiny

EAGER = "--eager" in sys.argv


class Language(lightning.LightningModule):
    """The model and its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny("LN")
        if not EAGER:
            torch._dynamo.config.optimize_ddp = False  # Lightning wraps it in DDP, which would cut the graph
            self.model.compile(backend="spcompile")

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """One loss."""
        ids, labels = batch
        loss = self.model(ids, labels=labels)
        if self.global_rank == 0:
            print(f"step {index} loss {loss.item():.8f}", flush=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


torch.manual_seed(0)
tokens = torch.randint(0, 256, (6, 102))
dataset = TensorDataset(tokens[:, :-1], tokens[:, 1:])
loader = DataLoader(dataset, batch_size=2, sampler=sampler(dataset, shuffle=True, seed=1))
quiet = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
trainer = lightning.Trainer(
    accelerator="cpu",
    devices=1 if EAGER else 2,
    strategy="auto" if EAGER else "ddp",
    max_epochs=1,
    use_distributed_sampler=False,
    **quiet,
)
trainer.fit(Language(), loader)
