"""What classifiers are trained on, and measured on: timm's RandAugment, mixup and cutmix, with every draw named.

timm draws from the global generators of Python and NumPy, which threads share. Here an augmentation is a function of (seed,
epoch, number) of the picture and a mixture of (seed, step), whatever threads, processes and micro-batches there are.
"""

import importlib.util
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.mixup import Mixup, mixup_target
from timm.data.transforms_factory import transforms_imagenet_eval
from torch import Tensor

from sami_cache.data.views import VIEW_DRAWS, ViewConfig, crop_image, random_view
from sami_cache.errors import SamiCacheError


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Defaults: MAE's fine-tuning (arXiv 2111.06377, table 9), of which SAMI's paper names RandAugment, smoothing and mixup."""

    randaugment: str = "rand-m9-mstd0.5-inc1"
    """As timm spells it; empty: none."""
    crop: float = 0.08
    """The smallest area of a random crop as a share of the picture's; 1 and `flip` 0: no more than a change of ratio."""
    flip: float = 0.5
    mixup: float = 0.8
    """Alpha of the mixture's Beta distribution; 0: none. With cutmix too, every step draws one of them."""
    cutmix: float = 1.0
    smoothing: float = 0.1
    """Share of a label that is spread over all classes."""

    def __post_init__(self):
        limits = {"crop": (1e-4, 1), "flip": (0, 1), "mixup": (0, 1e3), "cutmix": (0, 1e3), "smoothing": (0, 0.99)}
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise SamiCacheError(f"--{name} {getattr(self, name)}: expected {low:g} to {high:g}")

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


class Augment:
    """Random crop, flip and RandAugment of pictures. Safe to call from several threads."""

    def __init__(self, size: int, config: AugmentConfig, mean: tuple[float, ...], seed: int) -> None:
        """`size`: pixels a side. `mean`: of R, G, B in 0..1, what empty corners are filled with.

        Raises SamiCacheError where timm does not understand `config.randaugment`.
        """
        self.size, self.seed = size, seed
        self.views = ViewConfig(scale=(config.crop, 1.0), flip=config.flip)
        self._randaugment: Any = None
        if config.randaugment:
            # What timm's own transforms_imagenet_train hands over.
            hparams = {
                "translate_const": int(size * 0.45),
                "img_mean": tuple(min(255, round(255 * value)) for value in mean),
                "interpolation": Image.Resampling.BICUBIC,
            }
            try:
                self._randaugment = _timm.rand_augment_transform(config.randaugment, hparams)
            except (AssertionError, ValueError, KeyError) as error:
                raise SamiCacheError(
                    f"--randaugment {config.randaugment}: timm does not understand it ({error}). Expected something like "
                    "rand-m9-mstd0.5-inc1, or an empty text for none"
                ) from error

    def __call__(self, image: Image.Image, epoch: int, number: int) -> Tensor:
        """uint8 [3, size, size]."""
        rng = np.random.default_rng((self.seed, epoch, number))
        view = random_view(rng.random(VIEW_DRAWS).tolist(), image.width, image.height, self.views)
        pixels = crop_image(image, view, self.size)
        if self._randaugment is not None:
            _draws.rng = random.Random(int(rng.integers(1 << 62)))
            picture, chosen = Image.fromarray(pixels), self._randaugment
            for operation in _draws.rng.choices(chosen.ops, chosen.choice_weights, k=chosen.num_layers):
                picture = operation(picture)
            pixels = np.array(picture)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class Mixing:
    """timm's mixup and cutmix, one draw a step for all its pictures, as in MAE; labels become shares of classes.

    A picture is mixed with its neighbour: 0 with 1, 2 with 3, so that it does not matter how a step is cut into even parts.
    Neighbours must come in random order.
    """

    def __init__(self, classes: int, config: AugmentConfig, seed: int) -> None:
        self.classes, self.smoothing, self.seed = classes, config.smoothing, seed
        self._mixup = (
            Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=classes) if config.mixes else None
        )

    def __call__(self, pixels: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Float [B, 3, H, W] and int64 [B], B even where there is mixing -> the mixed pixels, float32 [B, classes].

        In another order than they came.
        """
        if self._mixup is None:
            return pixels, mixup_target(labels, self.classes, smoothing=self.smoothing)
        # timm mixes the first with the last, and draws from NumPy's global generator, which is nobody else's to feel.
        order = torch.arange(len(pixels), device=pixels.device)
        order = torch.cat([order[::2], order[1::2].flip(0)])
        before = np.random.get_state()
        np.random.seed(np.random.SeedSequence((self.seed, step)).generate_state(4))
        try:
            return self._mixup(pixels[order], labels[order])
        finally:
            np.random.set_state(before)


def evaluation_view(size: int, crop_ratio: float, interpolation: str = "bicubic") -> Callable[[Image.Image], Tensor]:
    """A picture as uint8 [3, size, size]: the short side resized to size / crop_ratio (256 for 224 at 0.875), its middle."""
    if not 0 < crop_ratio <= 1:
        raise SamiCacheError(f"--crop-ratio {crop_ratio}: expected a share above 0, up to 1; 0.875 resizes to 256 for 224")
    return transforms_imagenet_eval(size, crop_pct=crop_ratio, interpolation=interpolation, use_prefetcher=True)  # type: ignore[return-value]


class _Draws(threading.local):
    """Python's `random`, as far as timm's augmentations ask it, of this thread's picture alone."""

    rng = random.Random(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rng, name)


def _private_copy() -> ModuleType:
    """timm's module of augmentations, loaded once more, with random numbers of ours; the other one is left alone."""
    spec = importlib.util.find_spec("timm.data.auto_augment")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    own: Any = module
    own.random, theirs = _draws, own.posterize

    def posterize(image: Image.Image, bits: int, **rest: Any) -> Image.Image:
        # At the highest magnitude timm asks for none of the 8 bits: black, which Pillow 13 refuses and those before gave.
        return theirs(image, bits, **rest) if bits else Image.new(image.mode, image.size)

    own.NAME_TO_OP |= {name: posterize for name, call in own.NAME_TO_OP.items() if call is theirs}
    return module


_draws = _Draws()
_timm: Any = _private_copy()
