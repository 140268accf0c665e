"""A character transformer in PyTorch, on text that every machine has: the source of Python's standard library."""

import inspect
import os
import pathlib

import torch
from torch import nn

from gradstep.torch import AdamW

CONTEXT, WIDTH = 64, 64


class Transformer(nn.Module):
    """Predicts the next character at every place."""

    def __init__(self, characters: int, layers: int = 2) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.out = nn.Linear(WIDTH, characters)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        length = text.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.characters(text) + self.places(torch.arange(length))
        return self.out(self.layers(x, mask=mask, is_causal=True))


def train(steps: int = 300, seed: int = 0) -> float:
    """The loss at the end, in nats per character."""
    folder = pathlib.Path(os.path.dirname(inspect.__file__))
    text = "".join((folder / name).read_text() for name in ("argparse.py", "inspect.py", "typing.py"))
    alphabet = sorted(set(text))
    codes = torch.tensor([alphabet.index(character) for character in text])

    torch.manual_seed(seed)
    model = Transformer(len(alphabet))
    optimizer = AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []

    for _ in range(steps):
        starts = torch.randint(len(codes) - CONTEXT - 1, (16,))
        batch = torch.stack([codes[start : start + CONTEXT + 1] for start in starts])
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())

    last = losses[-10:]
    return sum(last) / len(last)


if __name__ == "__main__":
    print(f"loss: {train():.2f} nats per character")
