"""Which fixed views of the images are stored, and how the prefix's outputs of them are made.

METHODS, section 4: reconstruction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsearch.learn_drop import FeatureCache
from rlsearch.learn_drop.features import FeatureForm
from rlsearch.training.device_data import DeviceData

# Views an image where crops cannot be made on the features: a plain one, and fixed crops, every second one mirrored.
_CROPPED_VIEWS = 4

# Images (B, 3, H, W), or features, to the features behind the dropped prefix.
Prefix = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Views:
    """How random flips and crops become fixed views, for features of one shape.

    Feature maps (C, H, W) of the image's proportions: two views where the data are flipped (plain and mirrored), else
    one; the crop is made at every step, as a shift of the features by whole cells. Anything else (tokens (L, D), say)
    cannot be shifted: where the data are cropped, four views, the first plain, the others each with one fixed crop an
    image. View v is mirrored where v is odd and the data are flipped. Nothing is cut out of any view: features come
    from whole images, and no value of theirs stands for nothing.

    Attributes:
        number: V.
        cells: the greatest shift of a stored feature map; 0: they are not shifted.
        cropped: whether the views after the first are crops.
    """

    number: int
    cells: int
    cropped: bool

    @classmethod
    def of(cls, data: DeviceData, shape: tuple[int, ...]) -> Views:
        """The views for features of ``shape``."""
        number = 2 if data.flip else 1
        if _is_map(shape, data.input_shape):
            return cls(number, round(data.crop * shape[-1] / data.input_shape[-1]), cropped=False)
        return cls(_CROPPED_VIEWS, 0, cropped=True) if data.crop else cls(number, 0, cropped=False)

    def images(self, data: DeviceData, view: int, seed: int, num_images: int, batch_size: int) -> Iterator[Tensor]:
        """The first ``num_images`` training images in one view: the same tensors for the same seed, every time."""
        offsets = data.view_offsets(view, seed) if self.cropped else None
        for start in range(0, num_images, batch_size):
            indices = torch.arange(start, min(start + batch_size, num_images), device=data.device)
            yield data.view(indices, bool(data.flip) and view % 2 == 1, offsets)

    def fill(self, cache: FeatureCache, data: DeviceData, prefix: Prefix, seed: int, batch_size: int) -> None:
        """Runs the prefix over every view of every image of the cache."""
        for view in range(self.number):
            images = self.images(data, view, seed, cache.form.num_images, batch_size)
            for batch, inputs in enumerate(images):
                cache.write(view, batch * batch_size, prefix(inputs))

    def form(self, data: DeviceData, sample: Tensor) -> FeatureForm:
        """What is to be kept, for a ``sample`` (B, *shape) of the prefix's output under the training's precision."""
        return FeatureForm(data.num_train, self.number, tuple(sample.shape[1:]), sample.dtype)


def _is_map(shape: tuple[int, ...], image: tuple[int, ...]) -> bool:
    """Whether features are maps, channels first, whose cells lie as the image's pixels do; maps with the channels last
    (Swin) and tokens are not."""
    if len(shape) != 3:
        return False
    height, width = (pixels / cells for pixels, cells in zip(image[1:], shape[1:], strict=True))
    return height >= 1 and width >= 1 and abs(height - width) <= 0.1 * max(height, width)
