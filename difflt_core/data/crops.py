"""Large images from their files, for the ImageNet classifiers: random crops in training, the centre in
testing, decoded by worker processes while the device computes (docs/protocol.md, ImageNet-LT)."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..engine.parallel import n_cores
from ..engine.seeding import derive_seed
from .image_files import eight_bits, open_image

__all__ = ["CropSource", "centre_crops", "n_workers_for"]


NO_IMAGES, NO_ROWS = np.zeros((0, 1, 1, 3), np.uint8), np.zeros(0, np.int64)


@dataclass(frozen=True)
class CropSource:
    """Batches of random crops of image files and of generated images.

    A crop has 8 to 100 % of the area, is mirrored half of the time, and brightness, contrast and
    saturation vary by 0.4. Crop k of step s is a function of (seed, s, k) alone, so a resumed run goes
    on exactly, whatever the number of workers.

    Args:
        files: of the real images, index 0 to N-1. generated: uint8 (N_gen, H, W, 3), which follow.
        size: pixels of a crop. n_workers: processes that decode; 0 is this one.
    """

    files: list[Path]
    generated: np.ndarray
    kept: np.ndarray
    size: int
    device: str = "cpu"
    n_workers: int = 0

    def batches(
        self, indices: Callable[[int], np.ndarray], steps: range, seed: int, n_views: int = 1
    ) -> Iterator[list[torch.Tensor]]:
        """The views of each step in turn, each float (B, 3, size, size) in [-1, 1]. indices: of a
        step, int64 (B,)."""
        plan = (
            [(int(i), derive_seed(seed, "crop", step, k)) for k, i in enumerate(indices(step))]
            for step in steps
        )
        images = _Images(self.files, self.generated, self.kept, _random_crop(self.size), n_views)
        for batch in _loader(images, plan, self.n_workers, self.device):
            x = batch.to(self.device, non_blocking=True).float() / 127.5 - 1
            yield list(x.unbind(dim=1))


def centre_crops(
    files: list[Path], size: int, device: str = "cpu", n_workers: int = 0, batch_size: int = 256
) -> Iterator[torch.Tensor]:
    """All files in order, in batches float (B, 3, size, size): the shorter side to size * 256 / 224,
    then the centre."""
    starts = range(0, len(files), batch_size)
    plan = ([(i, 0) for i in range(s, min(s + batch_size, len(files)))] for s in starts)
    images = _Images(files, NO_IMAGES, NO_ROWS, _centre_crop(size), 1)
    for batch in _loader(images, plan, n_workers, device):
        yield batch[:, 0].to(device).float() / 127.5 - 1


def n_workers_for(threads: int | None) -> int:
    """Decoding processes of a stage that may use so many threads; None is all cores."""
    n = threads or n_cores()
    return n if n > 1 else 0


class _Images(Dataset):
    """Item (i, seed): uint8 (n_views, 3, size, size)."""

    def __init__(self, files, generated, kept, transform, n_views: int):
        self.files, self.generated, self.kept = files, generated, kept
        self.transform, self.n_views = transform, n_views

    def __getstate__(self) -> dict:
        """A decoding process that is not forked maps the generated images itself: they may be 14 GB."""
        mapped = isinstance(self.generated, np.memmap) and self.generated.offset
        where = Path(self.generated.filename) if mapped else self.generated
        return self.__dict__ | {"generated": where, "files": list(map(str, self.files))}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        if isinstance(self.generated, Path):
            self.generated = np.load(self.generated, mmap_mode="r", allow_pickle=False)

    def __getitem__(self, item: tuple[int, int]) -> torch.Tensor:
        i, seed = item
        picture = self._picture(i)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return torch.stack([self.transform(picture) for _ in range(self.n_views)])

    def _picture(self, i: int):
        from PIL import Image

        if i >= len(self.files):
            row = self.kept[i - len(self.files)]
            return Image.fromarray(np.asarray(self.generated[row])).convert("RGB")
        try:
            with open_image(self.files[i]) as image:
                return eight_bits(image).convert("RGB")
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(
                f"{self.files[i]} cannot be read ({error}), though it could when the data were "
                "converted; put it back and run again: the last checkpoint is kept"
            ) from None


def _loader(images: _Images, plan, n_workers: int, device: str) -> DataLoader:
    options = {"pin_memory": torch.device(device).type == "cuda", "worker_init_fn": _apart}
    return DataLoader(images, batch_sampler=plan, num_workers=n_workers, **options)


def _apart(_worker: int) -> None:
    """A signal to the process group is for the training, which writes a checkpoint and needs its next
    batch until then; a worker ends with it."""
    os.setsid()


def _random_crop(size: int):
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.08, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.4, 0.4, 0.4),
            v2.PILToTensor(),
        ]
    )


def _centre_crop(size: int):
    from torchvision.transforms import v2

    return v2.Compose([v2.Resize(size * 256 // 224), v2.CenterCrop(size), v2.PILToTensor()])
