"""The character LSTM of FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629): predict the next character."""

from __future__ import annotations

import torch
from torch import nn

from fedlth.errors import StudyError, wrong


class CharLstm(nn.Module):
    """Embed tokens (8), run a stacked LSTM (2 x 256), and read the next character off the last position.

    The alphabet is the classes: tokens (B, T) int64 in [0, num_classes) give logits (B, num_classes).
    """

    def __init__(
        self,
        *,
        num_classes: int,
        input_shape: tuple[int, ...],
        embedding: int = 8,
        hidden: int = 256,
        layers: int = 2,
    ) -> None:
        super().__init__()
        if len(input_shape) != 1 or input_shape[0] < 1:
            raise StudyError(f"model: char_lstm must have tokens (T,), got the input shape {input_shape}")
        for option, value in (("embedding", embedding), ("hidden", hidden), ("layers", layers)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise wrong(f"model.options.{option}", "an integer of at least 1", value)
        self.embedding = nn.Embedding(num_classes, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, x_BT: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(self.embedding(x_BT))
        logits: torch.Tensor = self.head(states[:, -1])
        return logits
