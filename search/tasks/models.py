"""The networks of the built-in tasks."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional


class _SliceAndPad(nn.Module):
    """Option-A shortcut: every second pixel, new channels zero on both sides [He2016, sec. 4.2]."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.pad = new_channels // 2

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class _BasicBlock(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int, zero_padded: bool
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = (
                _SliceAndPad(out_channels - in_channels)
                if zero_padded
                else _projection(in_channels, out_channels, stride)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def _stage(
    in_channels: int, out_channels: int, n_blocks: int, *, stride: int, zero_padded: bool
) -> nn.Sequential:
    first = _BasicBlock(in_channels, out_channels, stride=stride, zero_padded=zero_padded)
    rest = (
        _BasicBlock(out_channels, out_channels, stride=1, zero_padded=zero_padded)
        for _ in range(n_blocks - 1)
    )
    return nn.Sequential(first, *rest)


class CifarResNet(nn.Module):
    """ResNet-20, 32, 44, 56 for 32x32 images with option-A shortcuts [He2016, sec. 4.2].

    Parameter names are those of the checkpoints in wide use: conv1, bn1, layer1..3, linear.
    Input (batch, 3, 32, 32), output (batch, 10) logits.
    """

    def __init__(self, depth: int, n_classes: int = 10) -> None:
        super().__init__()
        assert depth % 6 == 2, "depth is 6 n + 2"
        n_blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, n_blocks, stride=1, zero_padded=True)
        self.layer2 = _stage(16, 32, n_blocks, stride=2, zero_padded=True)
        self.layer3 = _stage(32, 64, n_blocks, stride=2, zero_padded=True)
        self.linear = nn.Linear(64, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(functional.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


class ResNet18(nn.Module):
    """ResNet-18 for small images: a 3x3 stem without pooling, projection shortcuts [He2016].

    11.2 M parameters. Input (batch, in_channels, height, width), output (batch, n_classes) logits.

    Args:
        in_channels: of the images.
        n_classes: logits.
        strides: of the four stages.
    """

    def __init__(
        self, in_channels: int, n_classes: int = 10, strides: Sequence[int] = (1, 2, 2, 2)
    ) -> None:
        super().__init__()
        widths = (64, 128, 256, 512)
        self.conv1 = nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            _stage(before, width, 2, stride=stride, zero_padded=False)
            for before, width, stride in zip((64, *widths), widths, strides, strict=False)
        )
        self.fc = nn.Linear(512, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


class DigitsMLP(nn.Module):
    """Three fully connected layers, small enough to be a circuit: 2,720 weights.

    Input (batch, 1, 8, 8), output (batch, n_classes) logits.
    """

    def __init__(self, n_classes: int = 10) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 16)
        self.logits = nn.Linear(16, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.first(x.flatten(1)))
        return self.logits(functional.relu(self.second(x)))  # type: ignore[no-any-return]


class SmallCNN(nn.Module):
    """Four convolutions and two fully connected layers for 28x28 grey images.

    Input (batch, 1, 28, 28), output (batch, n_classes) logits.
    """

    def __init__(self, n_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_conv_norm_relu(1, 16, stride=1),
            *_conv_norm_relu(16, 32, stride=2),
            *_conv_norm_relu(32, 48, stride=1),
            *_conv_norm_relu(48, 64, stride=2),
            nn.MaxPool2d(2),
        )
        self.hidden = nn.Linear(64 * 3 * 3, 128)
        self.logits = nn.Linear(128, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).flatten(1)
        return self.logits(functional.relu(self.hidden(x)))  # type: ignore[no-any-return]


def _conv_norm_relu(in_channels: int, out_channels: int, *, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]
