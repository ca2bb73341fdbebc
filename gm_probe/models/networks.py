"""The paper's networks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


def cnn6(channels: int, height: int, width: int, classes: int) -> nn.Sequential:
    """Build 6CNN as in the authors' code: four convolutions without bias and two linear layers, ReLU between.

    511,926 parameters on 3×32×32 and 10 classes.
    """
    flat = 64 * (height // 4) * (width // 4)
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(32, 32, 4, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(64, 64, 4, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(flat, 100),
        nn.ReLU(),
        nn.Linear(100, classes),
    )


def mlp(inputs: int, widths: tuple[int, ...], classes: int) -> nn.Sequential:
    """Build a fully connected ReLU network with hidden layers of the given widths."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in widths:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


class _Block(nn.Module):
    """Pre-activation residual block; a 1×1 convolution carries the shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = functional.relu(self.bn1(x))
        out = self.conv2(functional.relu(self.bn2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """WRN-depth-widen (Zagoruyko & Komodakis 2016), pre-activation.

    Args:
        blocks: residual blocks in each of the three stages; standard is (depth - 4) / 6.
        widen: width factor over 16, 32, 64 channels.
    """

    def __init__(self, channels: int, classes: int, blocks: int, widen: int) -> None:
        super().__init__()
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        layers = []
        for stage in range(3):
            for index in range(blocks):
                inputs = widths[stage] if index == 0 else widths[stage + 1]
                stride = 2 if stage > 0 and index == 0 else 1
                layers.append(_Block(inputs, widths[stage + 1], stride))
        self.blocks = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(widths[3])
        self.head = nn.Linear(widths[3], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        features = functional.relu(self.bn(self.blocks(self.stem(x))))
        return self.head(features.mean((2, 3)))


def resnet(depth: int, channels: int, classes: int, *, cifar_stem: bool) -> nn.Module:
    """Build torchvision's ResNet (He et al. 2016) of 18, 34, 50, 101 or 152 layers.

    Args:
        channels: of the images; other than 3 needs a first convolution of its own.
        cifar_stem: 3×3 convolution of stride 1 and no max-pool in front, as small images want it.
    """
    # imported here: torchvision takes a second or two, and only its own models need it
    from torchvision.models import get_model

    model = get_model(f"resnet{depth}", weights=None, num_classes=classes)
    if cifar_stem or channels != 3:
        size, stride = (3, 1) if cifar_stem else (7, 2)
        model.conv1 = nn.Conv2d(channels, 64, size, stride=stride, padding=size // 2, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if cifar_stem:
        model.maxpool = nn.Identity()
    return model
