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
import torch.nn.functional as F
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
        corners: where the window of each image begins, (N,), as `window_corners` has it; None: images stay as they are.
        table: of `window_table`, for a whole batch.
        centres: row and column of the squares' centres, (2, N), or None where nothing is cut out.
    """

    settings: Augmented
    corners: Tensor | None
    table: Tensor
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
        mirrored = torch.rand(count, generator=generator) < 0.5
        if settings.flip == ALTERNATING:
            first = torch.rand(count, generator=random_stream(seed, 0, FIRST_FLIPS)) < 0.5
            mirrored = first[order] ^ (epoch % 2 == 1)
        elif not settings.flip:
            mirrored = torch.zeros(count, dtype=torch.bool)
        corners = window_corners(offsets, mirrored, crop, shape) if crop or settings.flip else None
        centres = None
        if settings.cutout:
            generator = random_stream(seed, epoch, CUTOUTS)
            centres = torch.stack([torch.randint(0, side, (count,), generator=generator) for side in shape[1:]])
        table = window_table(min(batch_size, count), crop, shape, with_mirrored=bool(settings.flip))
        return cls(settings, _sent(corners, device), table.to(device, non_blocking=True), _sent(centres, device))

    def moved(self, images: Tensor, part: slice) -> Tensor:
        """uint8 images (B, C, H, W) at the positions ``part`` of the order, cropped and mirrored."""
        if self.corners is None:
            return images
        return windows(images, self.settings.crop, self.corners[part], self.table, bool(self.settings.flip))

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


def window_corners(offsets: Tensor, mirrored: Tensor, padding: int, shape: Sequence[int]) -> Tensor:
    """Where each image's window begins, counted in bytes from the image's own first one.

    Args:
        offsets: row and column of the window in the padded image, in [0, 2 * padding], (2, N).
        mirrored: whether the window is mirrored, and so lies in the mirrored copy behind the image, (N,).
        padding: on every side.
        shape: of an image, (C, H, W).
    """
    channels, height, width = shape
    wide = width + 2 * padding
    column = torch.where(mirrored, 2 * padding - offsets[1], offsets[1])
    return offsets[0] * wide + column + mirrored * (channels * (height + 2 * padding) * wide)


def window_table(count: int, padding: int, shape: Sequence[int], *, with_mirrored: bool) -> Tensor:
    """Where the rows of ``count`` padded images begin, without the corners of their windows, (count, C * H)."""
    channels, height, width = shape
    wide, tall = width + 2 * padding, height + 2 * padding
    rows = (torch.arange(channels)[:, None] * tall + torch.arange(height)) * wide
    return torch.arange(count)[:, None] * (channels * tall * wide * (1 + with_mirrored)) + rows.flatten()


def windows(images: Tensor, padding: int, corners: Tensor, table: Tensor, with_mirrored: bool) -> Tensor:
    """One window of each black-padded image or of its mirrored copy.

    Every run of ``W`` bytes of the batch is a row of one view without memory, from which one selection of rows makes
    all windows.

    Args:
        images: (B, C, H, W) uint8.
        padding: on every side.
        corners: of `window_corners`, (B,).
        table: of `window_table`, for at least B images.
        with_mirrored: whether any window may be mirrored.
    """
    padded = F.pad(images, (padding,) * 4) if padding else images
    if with_mirrored:
        padded = torch.stack([padded, padded.flip(3)], 1)
    rows = (table[: len(images)] + corners[:, None]).flatten()
    return padded.view(-1).unfold(0, images.shape[3], 1).index_select(0, rows).view(images.shape)


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


def _sent(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)
