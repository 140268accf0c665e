"""Proves that a Hugging Face `Trainer` and a Lightning `Trainer` train with these optimizers as with torch's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from twins import batch, linear

import gradstep.torch

STEPS = 30
PAIRS = [
    pytest.param(gradstep.torch.AdamW, torch.optim.AdamW, {"lr": 0.05}, id="AdamW"),
    pytest.param(gradstep.torch.SGD, torch.optim.SGD, {"lr": 0.03, "momentum": 0.9}, id="SGD"),
]


class Regression(torch.nn.Module):
    """A model as the Hugging Face trainer wants it: it returns its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = linear(dtype=torch.float32)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.body(inputs)
        return {"loss": (outputs - labels).square().mean(), "logits": outputs}


def examples() -> list[dict[str, torch.Tensor]]:
    batches = [batch(place, torch.float32) for place in range(8)]
    return [{"inputs": x, "labels": y} for xs, ys in batches for x, y in zip(xs, ys, strict=True)]


def assert_same_training(mine: Any, other: Any) -> None:
    """Losses that fall, and agree to the end, from weights that agree."""
    (my_losses, my_weights), (losses, weights) = mine, other
    assert len(losses) == len(my_losses) >= 3
    assert losses[-1] < 0.5 * losses[0]
    torch.testing.assert_close(my_losses, losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(my_weights, weights, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("mine", "theirs", "kwargs"), PAIRS)
def test_a_hugging_face_trainer_ends_where_torchs_optimizer_does(
    mine: Any, theirs: Any, kwargs: dict[str, Any], tmp_path: Path
):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def train(cls: Any) -> tuple[list[float], Any]:
        model = Regression()
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / cls.__module__), max_steps=STEPS, per_device_train_batch_size=16, use_cpu=True,
            logging_steps=10, save_steps=20, report_to=[], disable_tqdm=True, lr_scheduler_type="cosine", seed=0,
            warmup_steps=3,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=examples(), optimizers=(cls(model.parameters(), **kwargs), None)
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model.state_dict()

    def resume(cls: Any, of: Any) -> Any:
        """Go on from what was saved after 20 steps, perhaps by another class."""
        model = Regression()
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "resumed"), max_steps=STEPS, per_device_train_batch_size=16, use_cpu=True,
            save_strategy="no", report_to=[], disable_tqdm=True, lr_scheduler_type="cosine", seed=0, warmup_steps=3,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=examples(), optimizers=(cls(model.parameters(), **kwargs), None)
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / of.__module__ / "checkpoint-20"))
        return model.state_dict()

    results = train(mine), train(theirs)
    assert_same_training(*results)
    for cls, of in ((mine, theirs), (theirs, mine)):
        torch.testing.assert_close(resume(cls, of), results[0][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("mine", "theirs", "kwargs"), PAIRS)
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # lightning's own use of torch
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_a_lightning_trainer_ends_where_torchs_optimizer_does(
    mine: Any, theirs: Any, kwargs: dict[str, Any], tmp_path: Path
):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, cls: Any) -> None:
            super().__init__()
            self.model, self.cls = Regression(), cls
            self.losses: list[float] = []

        def training_step(self, data: dict[str, torch.Tensor], _place: int) -> torch.Tensor:
            loss = self.model(**data)["loss"]
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            opt = self.cls(self.model.parameters(), **kwargs)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS)
            return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train(cls: Any) -> tuple[list[float], Any]:
        module = Module(cls)
        trainer = lightning.Trainer(
            max_steps=STEPS, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, gradient_clip_val=1.0,
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(examples(), batch_size=16)  # type: ignore[arg-type]
        trainer.fit(module, loader)
        return module.losses, module.model.state_dict()

    assert_same_training(train(mine), train(theirs))
