"""Random changes of training images, a batch at a time on the device: crop, flip, cutout, normalisation.

Everything random is drawn by the host's generators, a whole epoch at once, and sent over without waiting for the
device: a run that moves to another device, or resumes, sees the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

ALTERNATING = "alternating"

# What a random stream is for; each purpose has its own, so that none repeats another.
ORDER, AUGMENTATION, VIEWS, FIRST_FLIPS, CUTOUTS, RESIZED_CROPS = range(6)


class Augmented(Protocol):
    """Says how images are varied.

    Attributes:
        flip: ``True`` mirrors half of the images at random; ``alternating`` does so in the first epoch and turns each
            image over in every epoch after (airbench, arXiv 2404.00498); ``False`` mirrors none.
        crop: by how many pixels images are shifted at most, black moving in.
        cutout: the side of the square that is set to the channels' means; 0: none (arXiv 1708.04552).
    """

    @property
    def flip(self) -> bool | str: ...
    @property
    def crop(self) -> int: ...
    @property
    def cutout(self) -> int: ...


def random_stream(seed: int, epoch: int, purpose: int) -> torch.Generator:
    """A stream of the host for one purpose in one epoch; neighbouring numbers give unrelated streams."""
    state = np.random.SeedSequence([seed, epoch, purpose]).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


def random_offsets(count: int, padding: int, generator: torch.Generator) -> Tensor:
    """Where ``count`` windows begin in images padded by ``padding``: row and column, (2, count) int64."""
    return torch.randint(0, 2 * padding + 1, (2, count), generator=generator)


@dataclass(frozen=True)
class EpochAugmentation:
    """What is random in one epoch, for every position of its order, on the device.

    Attributes:
        settings: how images are varied.
        windows: cuts windows out of the images of a batch; None: images stay as they are.
        corners: where the window of each image begins, (N,), as `Windows.corners` has it.
        centres: row and column of the squares' centres, (2, N), or None where nothing is cut out.
    """

    settings: Augmented
    windows: Windows | None
    corners: Tensor
    centres: Tensor | None

    @classmethod
    def draw(
        cls,
        settings: Augmented,
        order: Tensor,
        shape: Sequence[int],
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        device: torch.device,
    ) -> EpochAugmentation:
        """The changes of one epoch; what is random in them depends on ``seed`` and ``epoch`` alone.

        Args:
            settings: how images are varied.
            order: the images of the epoch in their order, (N,) on the host.
            shape: of an image, (C, H, W).
            batch_size: the most images that `moved` is given at once.
            seed: of the training.
            epoch: which one.
            device: where the images are.
        """
        count, crop = len(order), settings.crop
        generator = random_stream(seed, epoch, AUGMENTATION)
        offsets = random_offsets(count, crop, generator)
        mirrored: Tensor | None = torch.rand(count, generator=generator) < 0.5
        if settings.flip == ALTERNATING:
            first = torch.rand(count, generator=random_stream(seed, 0, FIRST_FLIPS)) < 0.5
            mirrored = first[order] ^ (epoch % 2 == 1)
        elif not settings.flip:
            mirrored = None
        centres = None
        if settings.cutout:
            generator = random_stream(seed, epoch, CUTOUTS)
            sides = [torch.randint(0, side, (count,), generator=generator) for side in shape[1:]]
            centres = torch.stack(sides).to(device, non_blocking=True)
        if not (crop or settings.flip):
            return cls(settings, None, offsets, centres)
        windows = Windows(min(batch_size, count), crop, shape, device, with_mirrored=mirrored is not None)
        return cls(settings, windows, windows.corners(offsets, mirrored).to(device, non_blocking=True), centres)

    def moved(self, images: Tensor, part: slice) -> Tensor:
        """uint8 images (B, C, H, W) at the positions ``part`` of the order, cropped and mirrored."""
        return images if self.windows is None else self.windows(images, self.corners[part])

    def cut_out(self, images: Tensor, part: slice) -> Tensor:
        """Normalised images (B, 3, H, W), each with its square set to 0 in place; it may hang over the edge."""
        if self.centres is None:
            return images
        side = self.settings.cutout
        inside = []
        for extent, centre in zip(images.shape[2:], self.centres[:, part], strict=True):
            place = torch.arange(extent, device=images.device) - (centre[:, None] - side // 2)
            inside.append((place >= 0) & (place < side))
        return images.masked_fill_(inside[0][:, None, :, None] & inside[1][:, None, None, :], 0)


class Normalisation:
    """``(x / 255 - mean) / std`` of bytes, as one multiplication and one addition.

    Args:
        mean: of 3 channels, where 1 is white.
        std: likewise.
        width: of the images in pixels.
        device: where they are.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], width: int, device: torch.device) -> None:
        spread = torch.tensor(std, dtype=torch.float64)
        # Once for each pixel of a row: with channels last a row is one run of memory, which is passed over at full
        # speed; three values that repeat would stop it at every pixel.
        self._scale = (1 / (255 * spread)).float().repeat(width).to(device)
        self._shift = (-torch.tensor(mean, dtype=torch.float64) / spread).float().repeat(width).to(device)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W), C being 1 or 3, to float32 (B, 3, H, W) channels_last; grey is expanded."""
        pixels = images.float().expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        rows = pixels.permute(0, 2, 3, 1).flatten(2)  # a view
        torch.addcmul(self._shift, rows, self._scale, out=rows)
        return pixels

    def described(self) -> tuple[Tensor, Tensor]:
        """Scale and shift of the 3 channels."""
        return self._scale[:3], self._shift[:3]


class Windows:
    """Cuts one window out of each black-padded image of a batch, or out of its mirrored copy.

    The images are written into a frame of zeros, where every run of ``W`` bytes is a row of one view without memory:
    one selection of rows makes all windows.

    Args:
        count: the most images of a batch.
        padding: on every side.
        shape: of an image, (C, H, W).
        device: where the images are.
        with_mirrored: whether any window may be mirrored.
    """

    def __init__(
        self, count: int, padding: int, shape: Sequence[int], device: torch.device, *, with_mirrored: bool
    ) -> None:
        channels, height, width = shape
        tall, wide = height + 2 * padding, width + 2 * padding
        self._frame = torch.zeros(count, 1 + with_mirrored, channels, tall, wide, dtype=torch.uint8, device=device)
        self._inner = self._frame[..., padding : padding + height, padding : padding + width]
        self._padding = padding
        # Where each row of each image begins in the frame, as if its window began at the first byte.
        rows = (torch.arange(channels)[:, None] * tall + torch.arange(height)) * wide
        images = torch.arange(count)[:, None] * self._frame[:1].numel()
        self._rows = (images + rows.flatten()).to(device, non_blocking=True)

    def corners(self, offsets: Tensor, mirrored: Tensor | None) -> Tensor:
        """Where windows begin, counted in bytes from the image's own first one, (N,).

        Args:
            offsets: row and column in the padded image, in [0, 2 * padding], (2, N).
            mirrored: whether the window is mirrored, (N,); None: none is.
        """
        rows, columns = offsets[0], offsets[1]
        wide = self._frame.shape[4]
        if mirrored is None:
            return rows * wide + columns
        columns = torch.where(mirrored, 2 * self._padding - columns, columns)
        return rows * wide + columns + mirrored * self._frame[:1, :1].numel()

    def __call__(self, images: Tensor, corners: Tensor) -> Tensor:
        """The windows at ``corners`` (B,) of uint8 images (B, C, H, W), of the same shape."""
        count, width = len(images), images.shape[3]
        self._inner[:count, 0] = images
        if self._frame.shape[1] == 2:
            self._inner[:count, 1] = images.flip(3)
        rows = (self._rows[:count] + corners[:, None]).flatten()
        return self._frame.view(-1).unfold(0, width, 1).index_select(0, rows).view(images.shape)


def shifted(
    features: Tensor,
    cells: int,
    generator: torch.Generator,
    whole: int | None = None,
    own: slice = slice(None),
) -> Tensor:
    """Each feature map of a batch shifted by up to ``cells`` cells in both directions, zeros moving in.

    Args:
        features: (B, C, H, W); its memory format is kept.
        cells: the greatest shift, >= 1.
        generator: a stream of the host, as `DeviceData.generator` gives it.
        whole: how many images the batch has, where these are only the ``own`` part of it.
        own: which of the batch's images these are.
    """
    count, channels, height, width = features.shape
    offsets = (random_offsets(whole or count, cells, generator)[:, own] - cells).to(features.device, non_blocking=True)
    rows, rows_inside = _moved_axis(offsets[0], height)
    columns, columns_inside = _moved_axis(offsets[1], width)
    # With the channels last a cell is one run of memory, so that this one gather is all the copying there is.
    image = torch.arange(count, device=features.device)[:, None, None]
    cell = (image * height + rows[:, :, None]) * width + columns[:, None, :]
    cells_of_all = features.permute(0, 2, 3, 1).reshape(-1, channels)
    inside = (rows_inside[:, :, None] & columns_inside[:, None, :]).view(-1, 1)
    moved = cells_of_all.index_select(0, cell.flatten()).mul_(inside)
    moved = moved.view(count, height, width, channels).permute(0, 3, 1, 2)
    return moved if features.is_contiguous(memory_format=torch.channels_last) else moved.contiguous()


def _moved_axis(offsets: Tensor, extent: int) -> tuple[Tensor, Tensor]:
    """For every image (B,) and position of one axis, where it is read from and whether that is inside: (B, extent)."""
    source = torch.arange(extent, device=offsets.device) + offsets[:, None]
    return source.clamp(0, extent - 1), (source >= 0) & (source < extent)
