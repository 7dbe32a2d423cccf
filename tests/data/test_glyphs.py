import importlib
import sys
import unicodedata
from collections import defaultdict

import numpy as np
import pytest
import torch

from fastmeta.data import EpisodeSampler, glyphs, pixel_floor

# The function has the name of its module.
recipe = importlib.import_module("fastmeta.data.glyphs")

pytest.importorskip("matplotlib", reason="glyphs need matplotlib (the [train] extra)")


@pytest.fixture(scope="module")
def everything(cache):
    return glyphs("all", digits=True)


@pytest.fixture(scope="module")
def splits(cache):
    return {split: glyphs(split) for split in ("train", "val", "test")}


def chars(data):
    return [name[0] for name in data.classes]


def test_size_and_shape(everything):
    assert 1600 < everything.num_classes < 2100
    assert 19000 < len(everything) < 25000
    assert everything.images.shape[1:] == (1, 28, 28)
    assert everything.images.dtype == torch.uint8
    styles = torch.bincount(everything.labels)
    assert styles.min() >= 8
    assert styles.max() <= len(everything.source_names) == 21
    for label in range(0, everything.num_classes, 50):
        rows = everything.labels == label
        assert everything.sources[rows].unique().numel() == rows.sum()  # one image a face
        assert everything.images[rows].flatten(1).unique(dim=0).shape[0] == rows.sum()


def test_ink_fills_a_box_of_20_in_the_middle(everything):
    ink = everything.images[:, 0] > 0
    sizes = []
    for line in (ink.any(2), ink.any(1)):
        first, last = line.int().argmax(1), 27 - line.flip(1).int().argmax(1)
        assert ((first + last - 27).abs() <= 1).all()
        sizes.append(last - first + 1)
    longer = torch.maximum(*sizes)
    assert longer.min() >= 18
    assert longer.max() <= 22
    assert (longer >= 20).float().mean() > 0.9
    assert (everything.images.flatten(1).amax(1) > 100).all()


def test_identical_pictures_are_one_class(everything):
    owners = defaultdict(set)
    for image, face, label in zip(
        everything.images.numpy(), everything.sources.tolist(), everything.labels.tolist(),
        strict=True,
    ):  # fmt: skip
        owners[face, image.tobytes()].add(label)
    assert all(len(labels) == 1 for labels in owners.values())
    # Latin, Greek and Cyrillic capitals of one shape.
    present = set(chars(everything))
    for latin, *twins in ("AΑА", "BΒВ", "EΕЕ", "HΗН", "KΚ", "MΜМ", "OΟО", "PΡР", "TΤТ", "XΧХ"):
        assert latin in present
        assert not present & set(twins)
    # The Cyrillic letter that some italics draw like "n" is a class of its own.
    assert {"n", "п"} <= present


def test_no_two_classes_look_the_same(everything):
    count, faces = everything.num_classes, len(everything.source_names)
    total, times = torch.zeros(count, count), torch.zeros(count, count)
    for face in range(faces):
        rows = (everything.sources == face).nonzero()[:, 0]
        images = torch.nn.functional.normalize(everything.images[rows].flatten(1).float(), dim=1)
        here = torch.zeros(count, images.shape[1] + 1)
        here[everything.labels[rows]] = torch.nn.functional.pad(images, (0, 1), value=1.0)
        total += here[:, :-1] @ here[:, :-1].T
        times += here[:, -1:] * here[:, -1]
    alike = (total / times).fill_diagonal_(0).nan_to_num(0)
    assert alike.max() < 0.95 + 1e-4


def test_splits_are_disjoint_by_base_character(splits, everything):
    names = [set(data.classes) for data in splits.values()]
    assert sum(map(len, names)) == len(set.union(*names)) == glyphs("all").num_classes
    owner = {}
    for split, data in splits.items():
        for char in chars(data):
            base = unicodedata.normalize("NFD", char)[0].lower()
            assert owner.setdefault(base, split) == split, char
    for family in ("aàáâãäåāăąǎạảấ", "oòóôõöōŏőøơọỏ", "eèéêëēĕėęě", "ωὠὡὢώῶ", "cçćĉċč"):
        here = {owner[c] for c in family if c in owner}
        assert len(here) == 1, family
    shares = [data.num_classes / len(set.union(*names)) for data in splits.values()]
    np.testing.assert_allclose(shares, [0.7, 0.1, 0.2], atol=0.06)


def test_digits_are_left_out_when_they_are_the_target(splits, everything):
    assert set("0123456789½") <= set(chars(everything))
    for data in splits.values():
        for char in chars(data):
            assert not any(c.isdigit() for c in unicodedata.normalize("NFKD", char))


def test_rendered_once_and_kept(everything, cache, monkeypatch):
    assert len(list(cache.glob("glyphs-*matplotlib*.npz"))) == 1
    monkeypatch.setattr(recipe, "make_glyphs", lambda: pytest.fail("rendered again"))
    again = glyphs("all", digits=True)
    assert torch.equal(again.images, everything.images)
    assert again.classes == everything.classes


def test_unchanged_glyphs_are_nearly_trivial(splits):
    # 90.5 is published for pixels, 5-way 1-shot; the split and the cleaning are our own.
    floor = torch.cat(
        [
            pixel_floor(episode)
            for episode in EpisodeSampler(splits["test"], queries=5, batches=25, tasks=16)
        ]
    )
    assert abs(100 * floor.mean() - 90.5) < 2.5 + 1.96 * 100 * floor.std() / len(floor) ** 0.5


def test_wrong_use_is_told(monkeypatch):
    with pytest.raises(ValueError, match="split must be one of 'train', 'val', 'test', 'all'"):
        glyphs("training")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install fastmeta\[train\]"):
        glyphs("train")


def test_missing_fonts_are_told(monkeypatch, tmp_path):
    fonts = importlib.import_module("fastmeta.data._fonts")
    monkeypatch.setattr("matplotlib.get_data_path", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"fonts must be in .*'DejaVuSans', .* are missing"):
        fonts.render_faces()
