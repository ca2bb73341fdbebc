"""Models of one's own for the command line's ``path/file.py:callable``."""

from torch import Tensor, nn


def dropout_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 10))


class BagOfWords(nn.Module):
    """Of token ids (n, words)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids).mean(1).tanh())
