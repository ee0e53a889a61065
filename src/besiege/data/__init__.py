"""Images from anywhere: a spec string becomes `besiege.core.images.Images`."""

from besiege.data.open import open_images

__all__ = ["open_images"]
