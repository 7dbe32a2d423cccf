import gzip
import importlib
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch

from fastmeta.data import (
    EpisodeSampler,
    LabelledImages,
    collate_episodes,
    digits,
    mnist,
    nearest_pixels,
    omniglot,
    omniglot_runs,
    pixel_floor,
    sinusoids,
)

# The functions have the names of their modules.
digits_module = importlib.import_module("fastmeta.data.digits")
omniglot_module = importlib.import_module("fastmeta.data.omniglot")


def floor(data, **options):
    """Mean pixel accuracy in percent and the half width of its 95% interval."""
    sampler = EpisodeSampler(data, tasks=16, seed=1, **options)
    values = 100 * torch.cat([pixel_floor(episode) for episode in sampler])
    return values.mean().item(), 1.96 * values.std().item() / len(values) ** 0.5


class TestLabelledImages:
    data = LabelledImages(
        torch.arange(24, dtype=torch.uint8).view(6, 1, 2, 2), torch.tensor([2, 0, 1, 0, 2, 1]),
        ("a", "b", "c"), torch.arange(6), tuple("uvwxyz"), torch.tensor([7, 8, 9]),
    )  # fmt: skip

    def test_is_a_dataset(self):
        image, label = self.data[1]
        assert label == 0
        torch.testing.assert_close(image, torch.tensor([[[4.0, 5], [6, 7]]]) / 255)
        assert len(self.data) == 6

    def test_select_renumbers(self):
        some = self.data.select([2, 0])
        assert some.classes == ("c", "a")
        assert some.labels.tolist() == [0, 1, 1, 0]
        assert some.sources.tolist() == [0, 1, 3, 4]
        assert some.groups.tolist() == [9, 7]
        assert torch.equal(some.images, self.data.images[[0, 1, 3, 4]])
        assert len(self.data.select([])) == 0

    def test_wrong_use_is_told(self):
        with pytest.raises(ValueError, match=r"classes must be labels in \[0, 3\), got \[3\]"):
            self.data.select([3])
        with pytest.raises(ValueError, match=r"classes must be distinct"):
            self.data.select([1, 1])
        with pytest.raises(ValueError, match=r"labels must be of shape \[6\], got \[5\]"):
            LabelledImages(self.data.images, self.data.labels[:5], ("a", "b", "c"))
        with pytest.raises(ValueError, match=r"labels must be in \[0, 2\)"):
            LabelledImages(self.data.images, self.data.labels, ("a", "b"))


class TestPixelFloor:
    def test_against_a_loop(self):
        g = torch.Generator().manual_seed(0)
        parts = EpisodeSampler(
            torch.rand(60, 5, generator=g), torch.arange(60) % 6, ways=(2, 5), shots=(1, 3),
            queries=(1, 4), tasks=20,
        )  # fmt: skip
        episode = parts[0]
        got, labels = pixel_floor(episode), nearest_pixels(episode)
        assert torch.equal(labels == -100, episode.query_y == -100)
        for t in range(20):
            sx, sy, qx, qy = (part[0].double().numpy() for part in episode.task(t))
            right = 0
            for q, y in zip(qx, qy, strict=True):
                cosine = [s @ q / np.linalg.norm(s) / np.linalg.norm(q) for s in sx]
                right += sy[int(np.argmax(cosine))] == y
            assert got[t].item() == pytest.approx(right / len(qy))


class TestDigits:
    def test_what_they_are(self):
        sklearn = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn ([train])")
        data = digits()
        raw = sklearn.load_digits()
        assert data.images.shape == (1797, 1, 28, 28)
        assert data.labels.tolist() == raw.target.tolist()
        border = data.images.clone()
        border[..., 4:24, 4:24] = 0
        assert (border == 0).all()
        # Linear interpolation of rows, then of columns, between the middles of the old pixels.
        middles = (np.arange(20) + 0.5) * 8 / 20 - 0.5
        for label in (0, 5, 1234):
            rows = [np.interp(middles, np.arange(8), row) for row in raw.images[label] / 16]
            want = np.array([np.interp(middles, np.arange(8), col) for col in np.array(rows).T]).T
            got = data.images[label, 0, 4:24, 4:24].numpy() / 255
            np.testing.assert_allclose(got, want, atol=0.5 / 255 + 1e-6)

    def test_published_floor(self):
        pytest.importorskip("sklearn.datasets", reason="needs scikit-learn ([train])")
        # 10-way 1-shot 65.1, 10-way 5-shot 86.0.
        for shots, want in ((1, 65.1), (5, 86.0)):
            mean, width = floor(digits(), ways=10, shots=shots, queries=10, batches=20)
            assert abs(mean - want) < width + 0.7

    def test_missing_package_is_told(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(ImportError, match=r"pip install fastmeta\[train\]"):
            digits()


def idx(array):
    shape = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


class TestMnist:
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    labels = np.array([3, 1, 4, 1, 5], np.uint8)

    @pytest.mark.parametrize("place", ["", "mnist", "MNIST/raw"])
    @pytest.mark.parametrize("zipped", [False, True])
    def test_reads_idx_files(self, tmp_path, place, zipped):
        folder = tmp_path / place
        folder.mkdir(parents=True, exist_ok=True)
        for kind, array in (("images-idx3", self.images), ("labels-idx1", self.labels)):
            data, name = idx(array), f"train-{kind}-ubyte"
            if zipped:
                data, name = gzip.compress(data), f"{name}.gz"
            (folder / name).write_bytes(data)
        data = mnist("train", tmp_path)
        assert np.array_equal(data.images[:, 0], self.images)
        assert data.labels.tolist() == [3, 1, 4, 1, 5]

    def test_damaged_files_are_told(self, tmp_path):
        (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(self.labels))
        path = tmp_path / "t10k-images-idx3-ubyte"
        for data, text in (
            (idx(self.images)[:-1], "3919 bytes of data where its header says"),
            (b"\x00\x00\x0d" + idx(self.images)[3:], "not an IDX file of unsigned bytes"),
            (b"", "not an IDX file"),
            (idx(self.images[:4]), r"images \[N, H, W\] and as many labels"),
        ):
            path.write_bytes(data)
            with pytest.raises(ValueError, match=text):
                mnist("test", tmp_path)
        path.unlink()
        path.with_suffix(".gz").write_bytes(gzip.compress(idx(self.images))[:-9])
        with pytest.raises(ValueError, match="damaged gzip file"):
            mnist("test", tmp_path)

    def test_missing_files_are_told_and_nothing_is_downloaded_unasked(self, tmp_path, monkeypatch):
        monkeypatch.setattr(digits_module, "download_file", lambda *_: pytest.fail("downloaded"))
        with pytest.raises(FileNotFoundError, match=r"t10k-images.*download=True fetches them"):
            mnist("test", tmp_path)

    def test_real_files_are_those_of_the_checksums(self, data_root, tmp_path, monkeypatch):
        source = data_root / "mnist_t10k"
        if not source.is_dir():
            pytest.skip(f"needs MNIST's test files in {source}")
        # The download, from the folder: its checksums are those of the real files.
        monkeypatch.setattr(digits_module, "MNIST_URL", source.as_uri() + "/")
        data = mnist("test", tmp_path, download=True)
        assert len(list((tmp_path / "mnist").iterdir())) == 2
        assert data.images.shape == (10000, 1, 28, 28)
        assert torch.bincount(data.labels).tolist() == [
            980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
        ]  # fmt: skip
        mean, width = floor(data, ways=10, shots=1, queries=10, batches=20)
        assert abs(mean - 44.2) < width + 0.7  # published: 44.2


class TestPackedOmniglot:
    def test_counts_of_the_splits(self, omniglot_root):
        sizes = {split: omniglot(split, omniglot_root) for split in ("train", "val", "test")}
        assert [d.num_classes for d in sizes.values()] == [1028, 172, 423]
        names = [set(d.classes) for d in sizes.values()]
        everything = omniglot("all", omniglot_root)
        assert set.union(*names) == set(everything.classes)
        assert everything.num_classes == 1623
        assert (torch.bincount(everything.labels) == 20).all()
        assert everything.groups.unique().numel() == 50
        assert omniglot("trainval", omniglot_root).num_classes == 1200
        lake = [omniglot(s, omniglot_root, protocol="lake") for s in ("background", "evaluation")]
        assert [d.num_classes for d in lake] == [964, 659]
        alphabets = [{name.split("/")[0] for name in d.classes} for d in lake]
        assert [len(a) for a in alphabets] == [30, 20]
        assert not alphabets[0] & alphabets[1]

    def test_ink_and_both_sizes_of_it(self, omniglot_root):
        sharp = omniglot("val", omniglot_root)
        soft = omniglot("val", omniglot_root, resize="box")
        assert sharp.classes == soft.classes
        assert sharp.images.unique().tolist() == [0, 255]
        assert soft.images.unique().tolist() == list(range(0, 256, 17))
        assert 0.03 < (sharp.images / 255).mean() < 0.2
        # One drawing each: where the sharp one has ink, the soft one has some around.
        near = torch.nn.functional.max_pool2d(soft.images.float(), 3, 1, 1)
        assert (near[sharp.images == 255] > 0).float().mean() > 0.999

    def test_published_floor(self, omniglot_root):
        # 5-way 1-shot 44.6 with rotations is published; with 3,000 tasks it is 45.5 +- 0.3.
        mean, width = floor(
            omniglot("test", omniglot_root), ways=5, shots=1, queries=10, batches=40,
            rotations=True,
        )  # fmt: skip
        assert abs(mean - 44.6) < width + 1.0
        assert abs(mean - 45.5) < width + 0.3

    def test_runs(self, omniglot_root):
        episode = omniglot_runs(omniglot_root)
        assert episode.support_x.shape == episode.query_x.shape == (20, 20, 1, 28, 28)
        assert (episode.queries == 1).all()
        evaluation = omniglot("evaluation", omniglot_root, protocol="lake")
        known = {image.numpy().tobytes() for image in evaluation.images}
        images = (torch.cat([episode.support_x, episode.query_x]) * 255).round().byte()
        assert all(image.numpy().tobytes() in known for image in images.flatten(0, 1))
        # A trial's answer is drawn by another hand, and is the same character.
        owner = {image.numpy().tobytes(): label for image, label in zip(
            evaluation.images, evaluation.labels.tolist(), strict=True)}  # fmt: skip
        labels = [[owner[i.numpy().tobytes()] for i in run] for run in images]
        for run in range(20):
            support, query = labels[run], labels[20 + run]
            assert [support[y] for y in episode.query_y[run].tolist()] == query
        # Pixels know little of it: chance is 5%.
        assert 0.1 < pixel_floor(episode).mean() < 0.3


@pytest.fixture
def official(tmp_path, monkeypatch):
    """Official folders in small: three characters, drawings as 1-bit PNG files."""
    image = pytest.importorskip("PIL.Image", reason="needs pillow (the [train] extra)")
    monkeypatch.setattr(omniglot_module, "CLASSES", {"background": 2, "evaluation": 1})
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path / "cache"))
    g = np.random.default_rng(0)
    drawn = {}
    for part, alphabet, number in (
        ("background", "B", 1), ("background", "A", 12), ("evaluation", "A2", 3),
    ):  # fmt: skip
        folder = tmp_path / "omniglot" / f"images_{part}" / alphabet / f"character{number:02d}"
        folder.mkdir(parents=True)
        for drawer in range(1, 21):
            ink = g.random((105, 105)) < 0.3
            image.fromarray(np.where(ink, 0, 255).astype(np.uint8)).convert("1").save(
                folder / f"0007_{drawer:02d}.png"
            )
            drawn[f"{alphabet}/character{number:02d}", drawer] = ink
    return tmp_path, drawn


class TestOfficialOmniglot:
    order = ("A/character12", "B/character01", "A2/character03")  # background, then evaluation

    def test_folders_and_zips_nearest_and_box(self, official):
        root, drawn = official
        data = omniglot("all", root)
        assert data.classes == self.order
        # Nearest neighbour: the pixel under the middle of each of the 28, as pillow has it.
        pixels = [int((k + 0.5) * 105 / 28) for k in range(28)]
        for image, label, drawer in zip(
            data.images, data.labels.tolist(), data.sources.tolist(), strict=True
        ):
            ink = drawn[self.order[label], drawer + 1]
            assert np.array_equal(image[0].numpy() > 0, ink[pixels][:, pixels])
        soft = omniglot("evaluation", root, protocol="lake", resize="box")
        want = torch.nn.functional.interpolate(
            # Every pixel as 4x4: then 15x15 of them are one of the 28x28.
            torch.tensor(drawn[self.order[2], 1])[None, None].double(), scale_factor=4
        ).unfold(2, 15, 15).unfold(3, 15, 15).mean((-1, -2))  # fmt: skip
        assert (soft.images[0, 0] / 255 - want[0, 0]).abs().max() < 0.5 / 255 + 1e-6
        for part in ("background", "evaluation"):
            folder = root / "omniglot" / f"images_{part}"
            with zipfile.ZipFile(root / f"images_{part}.zip", "w") as archive:
                for path in sorted(folder.glob("*/*/*.png"), reverse=True):
                    archive.write(path, path.relative_to(folder.parent))
                archive.writestr(f"__MACOSX/images_{part}/A/character01/._0007_01.png", b"x")
            folder.rename(folder.with_name(f"gone_{part}"))
        zipped = omniglot("all", root)
        assert torch.equal(zipped.images, data.images)
        assert zipped.classes == data.classes

    def test_read_once_and_again_when_changed(self, official, monkeypatch):
        root, _ = official
        first = omniglot("all", root)
        monkeypatch.setattr(omniglot_module, "_open_pngs", lambda _: pytest.fail("read again"))
        assert torch.equal(omniglot("all", root).images, first.images)
        monkeypatch.undo()
        monkeypatch.setenv("FASTMETA_CACHE", str(root / "cache"))
        (root / "omniglot/images_background/B/character01/0007_20.png").unlink()
        monkeypatch.setattr(omniglot_module, "CLASSES", {"background": 2, "evaluation": 1})
        with pytest.raises(ValueError, match=r"drawings 01 to 20, got 2 characters, 1 of them"):
            omniglot("all", root)

    def test_lists_of_the_split(self, official):
        root, _ = official
        with pytest.raises(FileNotFoundError, match=r"splits_vinyals.npz, or with train.txt"):
            omniglot("train", root)
        lines = [f"A2/character03/rot{turn:03d}" for turn in (0, 90, 180, 270)]
        (root / "train.txt").write_text("\n".join([*lines, "A/character12/rot000\n"]))
        assert omniglot("train", root).classes == ("A/character12", "A2/character03")
        (root / "val.txt").write_text("B/character99/rot000")
        with pytest.raises(ValueError, match="no such character: B/character99"):
            omniglot("trainval", root)

    def test_wrong_files_are_told(self, official, monkeypatch):
        root, _ = official
        (root / "images_background.zip").write_bytes(b"no zip")
        with pytest.raises(ValueError, match="damaged zip file"):
            omniglot("all", root)
        (root / "images_background.zip").unlink()
        stray = root / "omniglot/images_evaluation/A2/character03/drawing.png"
        stray.write_bytes(b"")
        with pytest.raises(ValueError, match=r"drawing.png is not alphabet/characterNN"):
            omniglot("all", root)
        stray.unlink()
        empty = root / "empty"
        empty.mkdir()
        monkeypatch.setattr(omniglot_module, "download_file", lambda *_: pytest.fail("downloaded"))
        with pytest.raises(FileNotFoundError, match=r"images_background.zip .*download=True"):
            omniglot("all", empty)
        with pytest.raises(FileNotFoundError, match=r"omniglot_20runs.npz"):
            omniglot_runs(empty)
        with pytest.raises(ValueError, match="split must be one of 'background'"):
            omniglot("train", root, protocol="lake")

    def test_downloads_ask_for_the_published_checksums(self, tmp_path, monkeypatch):
        asked = []

        def refuse(url, path, sha256):
            asked.append((url, path, sha256))
            raise OSError("no network")

        monkeypatch.setattr(omniglot_module, "download_file", refuse)
        with pytest.raises(OSError, match="no network"):
            omniglot("background", tmp_path, protocol="lake", download=True)
        ((url, path, sha256),) = asked
        assert url.endswith("brendenlake/omniglot/raw/master/python/images_background.zip")
        assert path == tmp_path / "omniglot" / "images_background.zip"
        assert len(sha256) == 64


class TestSinusoids:
    def test_tasks_are_sines_of_the_published_ranges(self):
        episode = sinusoids(shots=10, queries=5, tasks=500, seed=1)[3]
        assert episode.support_x.shape == episode.support_y.shape == (500, 10, 1)
        assert episode.query_y.shape == (500, 5, 1)
        assert episode.query_y.dtype == torch.float32
        x = torch.cat([episode.support_x, episode.query_x], 1).double()
        y = torch.cat([episode.support_y, episode.query_y], 1).double()
        # y = a sin x + b cos x, fitted; then amplitude and phase of each task.
        waves = torch.cat([x.sin(), x.cos()], -1)
        fit = torch.linalg.lstsq(waves, y).solution
        assert (waves @ fit - y).abs().max() < 1e-4
        amplitude = fit.norm(dim=1).flatten()
        phase = torch.atan2(-fit[:, 1], fit[:, 0]).flatten() % (2 * torch.pi)
        for values, low, high in ((amplitude, 0.1, 5), (phase, 0, torch.pi), (x, -5, 5)):
            assert values.min() >= low - 1e-4
            assert values.max() <= high + 1e-4
            # Uniform: mean and variance within 5 standard errors.
            error = (high - low) / 12**0.5 / values.numel() ** 0.5
            assert abs(values.mean() - (low + high) / 2) < 5 * error
            assert abs(values.std() * 12**0.5 / (high - low) - 1) < 0.15

    def test_noise_is_on_the_supports_only(self):
        options = dict(shots=200, queries=50, tasks=3, seed=4)
        clean, noisy = sinusoids(**options)[0], sinusoids(noise=0.5, **options)[0]
        assert torch.equal(clean.query_y, noisy.query_y)
        assert torch.equal(clean.support_x, noisy.support_x)
        assert (noisy.support_y - clean.support_y).std().item() == pytest.approx(0.5, rel=0.15)

    def test_joins_and_tells_wrong_use(self):
        stream = sinusoids(shots=5, tasks=2)
        assert collate_episodes([stream[0], stream[1]]).tasks == 4
        with pytest.raises(ValueError, match=r"sinusoids: amplitude must be \(low, high\)"):
            sinusoids(amplitude=(2.0, 1.0))
        with pytest.raises(ValueError, match="noise must be at least 0, got -1"):
            sinusoids(noise=-1)
        with pytest.raises(ValueError, match="shots must be an integer of at least 1"):
            sinusoids(shots=0)
