"""Mean and spread of the pixels of a set, which its images are normalised with."""

from __future__ import annotations

import numpy as np

from rlsearch.training.data_decode import Pixels


def pixel_statistics(images: Pixels) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each of 3 channels, where 1 is white; exact sums over blocks of images."""
    num_channels = images.shape[1]
    total = np.zeros(num_channels)
    squares = np.zeros(num_channels)
    for start in range(0, len(images), 256):
        block = images[start : start + 256].astype(np.float64)
        total += block.sum(axis=(0, 2, 3))
        squares += np.square(block).sum(axis=(0, 2, 3))
    num_pixels = images.size / num_channels
    mean = total / num_pixels
    # A channel of one colour has no spread; one grey level keeps its normalisation finite.
    std = np.maximum(np.sqrt(np.maximum(squares / num_pixels - mean**2, 0)), 1)
    expanded_mean, expanded_std = ([float(v) / 255 for v in np.broadcast_to(values, 3)] for values in (mean, std))
    return (expanded_mean[0], expanded_mean[1], expanded_mean[2]), (expanded_std[0], expanded_std[1], expanded_std[2])
