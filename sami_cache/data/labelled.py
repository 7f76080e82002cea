"""Pictures with a class, numbered, of any source that knows labels."""

import numpy as np
from PIL import Image

from sami_cache.data.images import decode_image
from sami_cache.data.sources import Source
from sami_cache.errors import ImageError, SamiCacheError

_SHOWN = 4


class LabelledPictures:
    """`len(pictures)` pictures with labels below `classes`; those of the source that have no label are left out.

    labels: int64 [n]. class_names: text [classes], or None where the data names none. unlabelled: how many were left out.
    """

    def __init__(self, source: Source, like: "LabelledPictures | None" = None) -> None:
        """`like`: the pictures whose classes these are to have, matched by name where both name theirs, else by number.

        Raises SamiCacheError where no picture has a label, or one has a class that `like` does not know.
        """
        known = np.array([label is not None for label in source.labels], bool)
        self.source, self.numbers = source, np.flatnonzero(known)
        self.unlabelled = len(known) - len(self.numbers)
        if not len(self.numbers):
            raise SamiCacheError(
                f"no picture at {source.location} has a label: expected a folder for each class, tars with .cls or .json "
                "beside the pictures, or Parquet with a column of labels"
            )
        self.labels = np.array([source.labels[number] for number in self.numbers], np.int64)
        self.class_names = source.class_names
        self.classes = len(source.class_names) if source.class_names else int(self.labels.max()) + 1
        if like is not None:
            self._match(like)

    def __len__(self) -> int:
        return len(self.numbers)

    def key(self, number: int) -> str:
        """The name of picture `number` in its source."""
        return self.source.keys[self.numbers[number]]

    def read(self, number: int) -> bytes:
        """The encoded picture `number`. Raises ImageError naming it."""
        try:
            return self.source.read(int(self.numbers[number]))
        except ImageError as error:
            raise self._unusable(number, error) from error

    def image(self, number: int) -> Image.Image:
        """Picture `number`, upright, in RGB. Raises ImageError naming it."""
        data = self.read(number)
        try:
            return decode_image(data)
        except ImageError as error:
            raise self._unusable(number, error) from error

    def _match(self, like: "LabelledPictures") -> None:
        where = f"{self.source.location} has other classes than {like.source.location}"
        if self.class_names and like.class_names:
            place = {name: number for number, name in enumerate(like.class_names)}
            if unknown := [name for name in self.class_names if name not in place]:
                shown = ", ".join(unknown[:_SHOWN]) + (", ..." if len(unknown) > _SHOWN else "")
                raise SamiCacheError(
                    f"{where}: {len(unknown)} of its {len(self.class_names)} are unknown there ({shown}), which has "
                    f"{', '.join(like.class_names[:_SHOWN])}, ... Give both with one folder for each class, of the same names"
                )
            self.labels = np.array([place[name] for name in self.class_names], np.int64)[self.labels]
        elif (highest := int(self.labels.max())) >= like.classes:
            raise SamiCacheError(f"{where}: label {highest} here, 0 to {like.classes - 1} there")
        self.class_names, self.classes = like.class_names, like.classes

    def _unusable(self, number: int, error: ImageError) -> ImageError:
        return ImageError(f"{self.source.location}: {self.key(number)}: {error}. Mend the picture, or move it away")
