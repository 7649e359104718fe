"""Class folders: what is read, in which order and view; every fault of a folder or a file is told with its path."""

import errno
import multiprocessing
import os
import pickle
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms
from torchvision.datasets import ImageFolder

from condzoo.data import BatchPlan, StoredData, check_images, data_info, epoch_order, load_data, stored
from condzoo.data.augment import cut_out, draw_moves
from condzoo.data.image_files import ImageError, read_image
from condzoo.data.image_folder import MEAN, STD
from condzoo.data.stored import Views, outlive_signals, signals_held, usual_workers
from condzoo.data.views import random_view, seeded

PLAN = BatchPlan(batch_size=4, seed=3)
Folders = Callable[..., Path]


def load(root: Path, workers: int = 0, **fields: Any) -> StoredData:
    data = load_data("imagefolder", root, image_size=16, eval_resize=20, workers=workers, **fields)
    assert isinstance(data, StoredData)
    return data


def test_images_classes_and_sizes(folders: Folders) -> None:
    data = load(folders())
    assert data.class_names == ("ant", "bee", "cat")
    assert (data.num_classes, data.size("train"), data.size("test")) == (3, 12, 6)
    assert data.image_shape == (3, 16, 16)


def test_evaluation_sees_what_torchvision_does(folders: Folders) -> None:
    root = folders()
    prepared = transforms.Compose(
        [
            transforms.Resize(20),
            transforms.CenterCrop(16),
            transforms.ToTensor(),
            transforms.Normalize([m / 255 for m in MEAN], [s / 255 for s in STD]),
        ]
    )
    expected = ImageFolder(root / "val", transform=prepared)
    batches = list(load(root).ordered_batches("test", BatchPlan(4)))
    assert [len(y) for _, y in batches] == [4, 2]
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert y.tolist() == expected.targets
    assert torch.allclose(x, torch.stack([image for image, _ in expected]), atol=1e-5)
    bicubic, _ = next(load(root, interpolation="bicubic").ordered_batches("test", BatchPlan(4)))
    assert not torch.allclose(bicubic, x[:4], atol=0.02)


@pytest.mark.parametrize(
    ("augment", "cutout"), [("none", None), ("standard", 6), ("alternating", None), ("paper", None)]
)
def test_views_depend_on_neither_workers_nor_parts_nor_start(
    augment: str, cutout: int | None, folders: Folders
) -> None:
    root, plan = folders(), replace(PLAN, augment=augment, cutout=cutout)
    whole = list(load(root).train_batches(plan, 1))
    state = torch.get_rng_state()
    again = list(load(root, workers=2).train_batches(plan, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(whole) == len(again) == 3
    for (x, y), (x_again, y_again) in zip(whole, again, strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)
    for part in (0, 1, 2):
        split = load(root).train_batches(replace(plan, part=part, parts=3), 1, start=1)
        for (x, y), (x_part, y_part) in zip(whole[1:], split, strict=True):
            assert torch.equal(x[part::3], x_part)
            assert torch.equal(y[part::3], y_part)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the system does not say who sent a signal")
def test_a_worker_that_a_server_forked_ends_by_the_process_that_trains(folders: Folders) -> None:
    usual = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)  # Linux's own from Python 3.14 on
    batches = load(folders(), workers=1).train_batches(PLAN, 0)
    try:
        next(batches)
        (worker,) = multiprocessing.active_children()
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
        worker.join(0.5)
        assert worker.is_alive(), "a signal of another process, as a launcher sends it to the whole group"
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0
    finally:
        for left in multiprocessing.active_children():
            left.kill()
        multiprocessing.set_start_method(usual, force=True)


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no signal masks")
def test_a_worker_can_be_ended_where_the_system_does_not_say_who_sent_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "sigwaitinfo", raising=False)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with signals_held():  # as a worker that is spawned begins
        outlive_signals(os.getppid(), 0)
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_alternating_views_are_the_standard_boxes_flipped_in_every_second_epoch(folders: Folders) -> None:
    data = load(folders())
    for epoch in range(3):
        moves = draw_moves("alternating", torch.arange(12), seed=3, epoch=epoch, batch=0)
        first = draw_moves("alternating", torch.arange(12), seed=3, epoch=0, batch=0)
        assert moves is not None
        assert first is not None
        assert torch.equal(moves.flip, first.flip ^ bool(epoch % 2))
        assert 0 < int(moves.flip.sum()) < 12
        views = Views(data.train, data.view, "alternating", 3, epoch)
        for index, flip in enumerate(moves.flip.tolist()):
            with seeded(3, epoch, index):
                unflipped = random_view(data.train.read(index)[0], data.view, "standard", flip=False)
            view = views[index]
            assert isinstance(view, tuple)
            assert torch.equal(view[0], unflipped.flip(-1) if flip else unflipped)


def test_a_square_is_cut_out_of_each_view(folders: Folders) -> None:
    data, plan = load(folders()), replace(PLAN, cutout=6, drop_last=False)
    batches = zip(data.train_batches(PLAN, 1), data.train_batches(plan, 1), strict=False)
    order = epoch_order(12, PLAN.seed, 1)
    for number, ((x, _), (cut, _)) in enumerate(batches):
        index = order[4 * number : 4 * number + 4]
        assert torch.equal(cut, cut_out(x, index, 6, seed=PLAN.seed, epoch=1))
        assert not torch.equal(cut, x)
    assert all(bool((x != 0).any(1).all()) for x, _ in data.ordered_batches("train", plan))


class Copies(TorchDispatchMode):
    """Counts copies between devices."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def test_the_numbers_of_images_are_copied_to_the_device_once_an_epoch(folders: Folders) -> None:
    """By which their squares are drawn; the meta device stands in for a GPU."""
    data, found = load(folders()).to("meta"), []
    for cutout in (None, 6):
        with Copies() as copies:
            assert len(list(data.train_batches(replace(PLAN, cutout=cutout), 0))) == 3
        found.append(copies.count)
    assert found[1] - found[0] == 1


@pytest.mark.parametrize("augment", ["standard", "paper"])
def test_views_are_drawn_anew_each_epoch_and_seed(augment: str, folders: Folders) -> None:
    data, plan = load(folders()), replace(PLAN, augment=augment)
    first, _ = next(data.train_batches(plan, 0))
    for other in (data.train_batches(plan, 1), data.train_batches(replace(plan, seed=4), 0)):
        assert not torch.equal(first, next(other)[0])


def test_an_epoch_holds_every_image_once(folders: Folders) -> None:
    root = folders()
    for image, path in enumerate(sorted((root / "train").glob("*/*"))):
        Image.new("RGB", (24, 24), (image, image, image)).save(path)
    data, plan = load(root), replace(PLAN, batch_size=5, drop_last=False, augment="standard")
    seen = [(x[:, 0].amax((1, 2)) * STD[0] + MEAN[0]).round().int().tolist() for x, _ in data.train_batches(plan, 2)]
    assert [len(batch) for batch in seen] == [5, 5, 2]
    assert sorted(chain(*seen)) == list(range(12))


def test_a_part_of_a_last_batch_may_be_empty(folders: Folders) -> None:
    data = load(folders())
    *_, (x, y) = data.ordered_batches("test", BatchPlan(5, part=1, parts=2))
    assert (x.shape, y.shape) == ((0, 3, 16, 16), (0,))


def test_grey_palette_and_cmyk_images_become_rgb(folders: Folders, tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    grey = colours[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(read_image(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, 2))
    for mode, name in (("CMYK", "cmyk.jpg"), ("L", "grey.jpg"), ("P", "palette.png"), ("1", "bits.png")):
        image = Image.new("RGB", (32, 32), (200, 40, 40)).convert(mode)
        image.save(tmp_path / name)
        expected = np.array(image.convert("RGB"), dtype=int)
        assert np.abs(np.array(read_image(tmp_path / name), dtype=int) - expected).max() <= 8
        assert read_image(tmp_path / name).mode == "RGB"


def test_an_image_of_more_than_8_bits_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 60_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ImageError, match=r"deep\.png: its pixels are of mode 'I;16'; convert it to 8 bits a channel"):
        read_image(tmp_path / "deep.png")


def truncated(path: Path) -> str:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return "cannot be read (image file is truncated"


def empty(path: Path) -> str:
    path.write_bytes(b"")
    return "is no image"


def text(path: Path) -> str:
    path.write_text("not an image")
    return "is no image"


def gone(path: Path) -> str:
    path.unlink()
    return "cannot be read ([Errno 2] No such file or directory); replace it"


@pytest.mark.parametrize("damage", [truncated, empty, text, gone])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_one_line_with_its_path(damage: Any, workers: int, folders: Folders) -> None:
    root = folders()
    data = load(root, workers)
    victim = root / "train/bee/2.jpg"
    expected = f"{victim} {damage(victim)}"
    with pytest.raises(ImageError) as caught:
        list(data.train_batches(replace(PLAN, augment="standard"), 0))
    assert str(caught.value).startswith(expected)
    assert str(caught.value).endswith("; replace it, or remove it")
    assert "\n" not in str(caught.value)
    if damage is not gone:
        assert [line.partition(" ")[0] for line in check_images(root, workers)] == [str(victim)]


def test_whole_folders_have_no_fault(folders: Folders) -> None:
    assert list(check_images(folders(), workers=0)) == []


def remove(path: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for file in sorted((root / path).rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        (root / path).rmdir()

    return change


def add(path: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_bytes(b"")

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("val"), r"/val is missing: an imagefolder's root holds train/ and val/, each with a folder of images"),
        (remove("train"), r"/train is missing: .* name the root by --data-root or data\.root"),
        (lambda root: (root / "train/dog").mkdir(), r"class folder \S+/train/dog holds no image; fill it, or remove"),
        (remove("val/bee"), r"/val has no class folder 'bee', which \S+/train has; both must hold the same classes"),
        (remove("train/cat"), r"/train has no class folder 'cat', which \S+/val has; both must hold the same"),
        (add("train/ant/notes.txt"), r"/train/ant/notes\.txt is no image by its name \(\.jpg \.jpeg .*\); remove it"),
        (add("val/ILSVRC_1.JPEG"), r"/val/ILSVRC_1\.JPEG lies outside a class folder; move it into the folder of"),
        (
            lambda root: (root / "train/ant/all").symlink_to(root),
            r"/train/ant/all is a link that leads back to \S+/imag",
        ),
        (lambda root: [remove("val/" + c)(root) for c in ("ant", "bee", "cat")], r"/val is empty: it must hold a"),
    ],
)
def test_faulty_folders(change: Callable[[Path], Any], message: str, folders: Folders) -> None:
    root = folders()
    change(root)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load(root)
    assert str(root) in str(caught.value)


def test_another_number_of_classes_is_told(folders: Folders) -> None:
    root = folders()
    assert load(root, num_classes=3).num_classes == 3
    message = r"/train holds 3 classes, the recipe's data\.num_classes is 1000; name the .*, or train with 3 or without"
    with pytest.raises(ValueError, match=message):
        load(root, num_classes=1000)


def test_no_folders_at_all_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDZOO_DATA", str(tmp_path / "variable"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError) as caught:
        load_data("imagefolder")
    for part in (f"{tmp_path / 'variable'} (from CONDZOO_DATA)", str(tmp_path / "cache"), "--data-root DIR"):
        assert part in str(caught.value)


def test_the_folder_is_offered_where_a_name_is_unknown() -> None:
    with pytest.raises(ValueError, match=r"unknown data set 'imagefoldr'; did you mean 'imagefolder'\?"):
        data_info("imagefoldr")


def test_a_source_pickles_for_workers_that_are_not_forked(folders: Folders) -> None:
    source = load(folders()).train
    again = pickle.loads(pickle.dumps(source))
    assert np.array_equal(again.read(5)[0], source.read(5)[0])


@pytest.mark.filterwarnings("error")
def test_transparency_of_a_palette_is_dropped_without_a_word(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 40, 40])
    image.save(tmp_path / "clear.png", transparency=bytes([0, 128]))
    with Image.open(tmp_path / "clear.png") as written:
        assert isinstance(written.info["transparency"], bytes)
    assert np.array(read_image(tmp_path / "clear.png"))[0, 0].tolist() == [200, 40, 40]


def test_a_folder_that_may_not_be_read_is_an_error(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folders()
    inner = root / "train" / "ant" / "more"
    inner.mkdir()
    real = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path) == inner:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match=r"Permission denied: '.*ant.more'"):
        load(root)


def test_memory_is_pinned_for_the_gpu_that_is_trained_on_and_cores_are_shared(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A DataLoader pins for the current GPU, of which it then takes memory; of torchrun's processes each has one."""
    current, started = [0], []

    @contextmanager
    def set_to(device: torch.device) -> Iterator[None]:
        current.append(device.index)
        yield
        current.pop()

    class Loader:
        def __init__(self, views: Views, **options: Any) -> None:
            self.workers, self.pins = options["num_workers"], options["pin_memory"]

        def __iter__(self) -> Iterator[Any]:
            started.append((current[-1], self.workers, self.pins))
            return iter(())

    monkeypatch.setattr(torch.cuda, "device", set_to)
    monkeypatch.setattr(stored, "DataLoader", Loader)
    monkeypatch.setattr(stored, "normalizer", lambda *_: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    data = replace(load(folders()), workers=None)
    for device in ("cuda:1", "cpu"):
        assert list(data.to(device).ordered_batches("train", replace(PLAN, batch_size=1))) == []
    assert started == [(1, 3, True), (0, 3, False)]
    assert (usual_workers(), usual_workers(2), usual_workers(100)) == (8, 6, 1)
