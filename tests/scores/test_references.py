"""References: what is read, what is refused, and the cache of their features."""

import dataclasses
import io
import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runs import write_tiny_data

from flowdit.data.images import center_crop
from flowdit.data.manifest import Manifest
from flowdit.features.base import Extracted, FeatureNetwork
from flowdit.fields import FieldError
from flowdit.scores import feature_cache
from flowdit.scores.feature_cache import reference_features
from flowdit.scores.references import Reference, open_reference

WIDTH = 6


def pixels(count: int, side: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def decode(latents: np.ndarray) -> np.ndarray:
    """A stand-in for the VAE: grey images of the first value of each latent."""
    grey = (latents[:, 0, :1, :1] * 40 + 128).clip(0, 255).astype(np.uint8)
    return np.broadcast_to(grey[..., None], (len(latents), 64, 64, 3))


def extract(images: np.ndarray) -> Extracted:
    """A stand-in for a feature network: means of parts of the image, and two of them as logits."""
    parts = images.reshape(len(images), -1)[:, : WIDTH * 2000].reshape(len(images), WIDTH, 2000)
    features = parts.mean(axis=2).astype(np.float32)
    return Extracted(features, features[:, :2])  # type: ignore[arg-type]


def network(name: str = "inception", identity: str = "one") -> FeatureNetwork:
    return FeatureNetwork(name, extract, WIDTH, identity, num_classes=2)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model(tiny_data: Path) -> Manifest:
    """Of images of 64 x 64 pixels."""
    return Manifest.read(tiny_data)


def save_images(folder: Path, images: np.ndarray) -> Path:
    for i, image in enumerate(images):
        path = folder / ("cat", "dog")[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def all_images(reference: Reference, batch_size: int = 4) -> np.ndarray:
    assert reference.images is not None
    batches = list(reference.images(batch_size))
    assert max(map(len, batches)) <= batch_size
    return np.concatenate(batches)


class TestFolder:
    def test_images_with_their_labels(self, tmp_path, model):
        images = pixels(9)
        reference = open_reference(str(save_images(tmp_path / "real", images)), model, decode)
        assert (reference.count, reference.statistics, reference.captions) == (9, None, None)
        read = [image.tobytes() for image in all_images(reference)]
        assert sorted(read) == sorted(image.tobytes() for image in images)
        numbers = [read.index(image.tobytes()) for image in images]
        assert reference.labels is not None
        np.testing.assert_array_equal(reference.labels()[numbers], [0, 1] * 4 + [0])
        np.testing.assert_array_equal(all_images(reference), all_images(reference, 9))

    def test_identity_is_that_of_the_content(self, tmp_path, model):
        first, copy, other = (
            open_reference(str(save_images(tmp_path / name, pixels(4, seed=seed))), model, decode).identity
            for name, seed in (("a", 0), ("b", 0), ("c", 1))
        )
        assert first == copy != other

    def test_a_name_that_is_not_in_utf_8(self, tmp_path, model):
        folder = save_images(tmp_path / "real", pixels(2))
        (folder / "cat" / "000.png").rename(folder / "cat" / "\udcff.png")
        assert all_images(open_reference(str(folder), model, decode)).shape == (2, 64, 64, 3)

    def test_another_size_is_refused_or_cropped_as_prepare_does(self, tmp_path, model):
        folder = tmp_path / "real"
        folder.mkdir()
        wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8))
        wide.save(folder / "wide.png")
        message = "reference: must have images of 64 x 64 pixels, as the model draws, got 90 x 70 in wide.png; ref"
        with pytest.raises(FieldError, match=f"^{message}erence_resize=true crops and resizes as prepare does$"):
            open_reference(str(folder), model, decode)
        reference = open_reference(str(folder), model, decode, resize=True)
        np.testing.assert_array_equal(all_images(reference)[0], np.asarray(center_crop(wide, 64)))

    def test_an_image_of_another_size_that_comes_later_is_named(self, tmp_path, model):
        folder = save_images(tmp_path / "real", pixels(3))
        Image.fromarray(pixels(1, side=32)[0]).save(folder / "dog" / "small.png")
        with pytest.raises(ValueError, match=r"got 32 x 32 in dog/small\.png"):
            all_images(open_reference(str(folder), model, decode))

    def test_what_is_no_reference(self, tmp_path, model):
        with pytest.raises(FieldError, match="^reference: must be images as prepare reads them, .*, got '.*/none'$"):
            open_reference(str(tmp_path / "none"), model, decode)
        (tmp_path / "empty").mkdir()
        with pytest.raises(FieldError, match="^reference: .*/empty must have images or one sub-folder"):
            open_reference(str(tmp_path / "empty"), model, decode)
        save_images(tmp_path / "real", pixels(2))
        (tmp_path / "real" / "cat" / "000.png").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"^reference: .*000\.png: cannot be read as an image"):
            open_reference(str(tmp_path / "real"), model, decode)


class TestRecords:
    def test_decoded_images_labels_and_captions_of_a_split(self, tiny_data, model):
        counts = {split: model.num_records(split) for split in ("train", "validation")}
        assert min(counts.values()) > 0
        identities = set()
        for split, count in {**counts, "all": sum(counts.values())}.items():
            reference = open_reference(str(tiny_data), model, decode, split=split)
            identities.add(reference.identity)
            assert reference.count == count
            assert all_images(reference, 5).shape == (count, 64, 64, 3)
            assert reference.labels is not None
            assert reference.captions is not None
            assert len(reference.labels()) == len(reference.captions()) == count
        assert len(identities) == 3

    def test_another_vae_size_or_split(self, tiny_data, model):
        with pytest.raises(FieldError, match="^reference_split: must be one of validation, train, all, got 'test'"):
            open_reference(str(tiny_data), model, decode, split="test")
        vae = dataclasses.replace(model.vae, fingerprint="0" * 16)
        other = dataclasses.replace(model, vae=vae)
        with pytest.raises(FieldError, match=r"^reference: must have latents of the model's VAE \(fingerprint 0000"):
            open_reference(str(tiny_data), other, decode)
        channels, height, width = model.latent_shape
        other = dataclasses.replace(model, latent_shape=(channels, height * 2, width * 2), image_size=128)
        with pytest.raises(FieldError, match="^reference: must have latents of 16 x 16 x 16 with stride 8, as the mo"):
            open_reference(str(tiny_data), other, decode)

    def test_of_several_shapes_those_of_the_model_are_read(self, tmp_path, model):
        data = write_tiny_data(tmp_path / "shapes", sides=((4, 16), (8, 8)))
        reference = open_reference(
            str(data), model, lambda latents: np.zeros((len(latents), *latents.shape[2:], 3), np.uint8)
        )
        assert reference.count == 24 and all_images(reference).shape == (24, 8, 8, 3)
        assert reference.labels is not None and len(reference.labels()) == 24
        channels = model.latent_shape[0]
        other = dataclasses.replace(model, latent_shape=(channels, 16, 16), image_size=128)
        shapes = "16 x 4 x 16 or 16 x 8 x 8 with stride 8"
        with pytest.raises(FieldError, match=f"^reference: must have latents of 16 x 16 x 16 .* has {shapes}$"):
            open_reference(str(data), other, decode)


class TestWhere:
    def test_records_with_given_values_of_kept_columns(self, tmp_path, model):
        columns = lambda i: {"columns.style": "abc"[i % 3], "columns.number": i}
        name = str(write_tiny_data(tmp_path / "data", extra=columns))
        every = open_reference(name, model, decode, split="train")
        assert every.labels is not None and every.captions is not None
        styles = np.array(["abc"[i % 3] for count in (24, 24) for i in range(count)])
        identities = {every.identity}
        for where, chosen in (
            ({"style": "a"}, styles == "a"),
            ({"style": ["a", "b"]}, styles != "c"),
            ({"style": "b", "number": 4}, np.arange(48) % 24 == 4),
        ):
            part = open_reference(name, model, decode, split="train", where=where)
            assert part.labels is not None and part.captions is not None
            assert part.count == chosen.sum() and next(iter(where)) in part.description
            np.testing.assert_array_equal(all_images(part, 5), all_images(every)[chosen])
            np.testing.assert_array_equal(part.labels(), every.labels()[chosen])
            assert part.captions() == [text for text, fits in zip(every.captions(), chosen, strict=True) if fits]
            identities.add(part.identity)
        assert len(identities) == 4

    def test_images_of_a_source_with_such_values(self, tmp_path, model):
        images = pixels(6)
        folder = tmp_path / "real"
        folder.mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(folder / f"{i}.png")
        lines = [f"{i}.png,picture {i},{'ab'[i % 2]}" for i in range(6)]
        (folder / "metadata.csv").write_text("\n".join(["file_name,text,style", *lines]) + "\n")
        whole, part = (open_reference(str(folder), model, decode, where=some) for some in (None, {"style": "b"}))
        read = sorted(image.tobytes() for image in all_images(part))
        assert part.count == 3 and read == sorted(image.tobytes() for image in images[1::2])
        assert part.captions is not None and sorted(part.captions()) == ["picture 1", "picture 3", "picture 5"]
        assert whole.count == 6 and whole.identity != part.identity
        with pytest.raises(FieldError, match="^where: must be a column of .*metadata.csv, which has .*, got 'colour'$"):
            open_reference(str(folder), model, decode, where={"colour": "red"})
        with pytest.raises(FieldError, match='^where: must choose an image of .*, there is none where .*"style": ..c'):
            open_reference(str(folder), model, decode, where={"style": "c"})
        with pytest.raises(FieldError, match="^where: must be empty for source=openmoji"):
            open_reference("openmoji", model, decode, where={"style": "c"})

    def test_mistakes_are_named(self, tmp_path, model):
        name = str(write_tiny_data(tmp_path / "data", extra=lambda i: {"columns.style": "a"}))
        rule = r"must name columns that the train split of .* keeps \(style\), got held_out$"
        with pytest.raises(FieldError, match=f"^where: {rule}"):
            open_reference(name, model, decode, split="train", where={"style": "a", "held_out": "pair"})
        with pytest.raises(
            FieldError, match="^where: must choose an image of the train split of .*, there is none where"
        ):
            open_reference(name, model, decode, split="train", where={"style": "b"})
        path = save_archive(tmp_path / "adm.npz", arr_0=pixels(3))
        with pytest.raises(FieldError, match="^where: must be null for an .npz file, which has no columns, got"):
            open_reference(path, model, decode, where={"style": "a"})


def save_archive(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


class TestArchive:
    def test_images_and_statistics(self, tmp_path, model):
        images, sigma = pixels(7), np.eye(WIDTH)
        path = save_archive(tmp_path / "adm.npz", arr_0=images, mu=np.ones(WIDTH), sigma=sigma)
        reference = open_reference(path, model, decode)
        np.testing.assert_array_equal(all_images(reference), images)
        assert reference.statistics is not None
        np.testing.assert_array_equal(reference.statistics.covariance, sigma)

        found = reference_features(reference, network("inception"), extract, tmp_path / "cache")
        assert found.moments == reference.statistics
        assert found.features is not None
        others = reference_features(reference, network("dinov2"), extract, tmp_path / "cache")
        np.testing.assert_allclose(others.moments.mean, found.features.mean(axis=0), rtol=1e-5)

    def test_statistics_alone_are_for_one_network_of_their_width(self, tmp_path, model):
        path = save_archive(tmp_path / "adm.npz", mu=np.ones(WIDTH), sigma=np.eye(WIDTH))
        reference = open_reference(path, model, decode)
        found = reference_features(reference, network(), extract, tmp_path)
        assert found == (reference.statistics, None, None)
        with pytest.raises(FieldError, match="^features: must be inception alone: the reference holds only statistics"):
            reference_features(reference, network("dinov2"), extract, tmp_path)
        with pytest.raises(FieldError, match="^reference: must have statistics of 7 features, as inception has, got 6"):
            reference_features(reference, network()._replace(width=7), extract, tmp_path)

    def test_another_size(self, tmp_path, model):
        path = save_archive(tmp_path / "small.npz", arr_0=pixels(3, side=32))
        with pytest.raises(FieldError, match="^reference: must have images of 64 x 64 pixels.* got 32 x 32 in .*npz;"):
            open_reference(path, model, decode)
        assert all_images(open_reference(path, model, decode, resize=True)).shape == (3, 64, 64, 3)

    @pytest.mark.parametrize(
        ("arrays", "problem"),
        [
            ({"arr_0": pixels(2)[..., :1]}, "arr_0: must be uint8 images of shape"),
            ({"arr_0": np.zeros((2, 64, 64, 3))}, "arr_0: must be uint8 images of shape"),
            ({"arr_0": np.array([object()], object)}, "arr_0: must be uint8 images of shape"),
            ({"arr_0": np.asfortranarray(pixels(2))}, "fortran_order: must be False"),
            ({"mu": np.ones(3)}, "arrays: must be mu and sigma, or arr_0, or all three, got"),
            ({"mu": np.ones(3), "sigma": np.eye(4)}, "sigma: must be floats of shape"),
            ({"mu": np.ones(3), "sigma": np.eye(3) * np.nan}, "mu, sigma: must be finite"),
            ({"mu": np.ones(2), "sigma": np.array([[1.0, 5], [0, 1]])}, "sigma: must be symmetric"),
            ({"mu": np.ones(2, int), "sigma": np.eye(2)}, "mu: must be a vector of 1 to 4096 floats"),
            ({"mu": np.ones(5000), "sigma": np.eye(2)}, "mu: must be a vector of 1 to 4096 floats"),
        ],
    )
    def test_other_arrays_are_refused(self, tmp_path, model, arrays, problem):
        path = save_archive(tmp_path / "bad.npz", **arrays)
        with pytest.raises(FieldError, match=rf"^reference: .*bad\.npz: is not a readable \.npz file: {problem}"):
            open_reference(path, model, decode)

    def test_a_header_that_promises_more_than_there_is(self, tmp_path, model):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 64, 64, 3)}
        )
        path = tmp_path / "bad.npz"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", header.getvalue() + b"\0" * 1000)
        with pytest.raises(ValueError, match="is not a readable .npz file"):
            all_images(open_reference(str(path), model, decode))

    def test_damaged_files(self, tmp_path, model):
        whole = Path(save_archive(tmp_path / "whole.npz", arr_0=pixels(3), mu=np.ones(9), sigma=np.eye(9))).read_bytes()
        random, bad = np.random.default_rng(0), tmp_path / "bad.npz"
        for _ in range(60):
            damaged = bytearray(whole)
            where = int(random.integers(len(whole)))
            damaged[where] ^= 1 << int(random.integers(8))
            bad.write_bytes(damaged if random.random() < 0.7 else whole[:where])
            try:
                assert all_images(open_reference(str(bad), model, decode)).nbytes <= 10 * 64 * 64 * 3
            except ValueError as error:
                assert "\n" not in str(error)  # noqa: PT017 - some bytes do not matter
        with pytest.raises(FieldError, match="^reference: must be an existing .npz file, got"):
            open_reference(str(tmp_path / "none.npz"), model, decode)


class TestCache:
    def test_features_are_computed_once_for_a_content(self, tmp_path, model):
        calls = []

        def counted(images):
            calls.append(len(images))
            return extract(images)

        images = pixels(11)
        for copy in ("a", "b"):
            reference = open_reference(save_archive(tmp_path / f"{copy}.npz", arr_0=images), model, decode)
            found = reference_features(reference, network(), counted, tmp_path / "cache", batch_size=4)
            assert calls == [4, 4, 4]
            assert found.features is not None
            assert found.logits is not None
            np.testing.assert_array_equal(found.features, extract(images).features)
            np.testing.assert_array_equal(found.logits, extract(images).logits)
            assert found.moments.count == 11
            np.testing.assert_allclose(found.moments.covariance, np.cov(found.features.T), rtol=1e-4)
        reference_features(reference, network(identity="two"), counted, tmp_path / "cache", batch_size=4)
        assert calls == [4] * 6
        assert len(list((tmp_path / "cache").iterdir())) == 2

    @pytest.mark.parametrize("damage", ["flip", "cut", "other"])
    def test_a_damaged_file_is_computed_again(self, tmp_path, model, caplog, damage):
        reference = open_reference(save_archive(tmp_path / "real.npz", arr_0=pixels(5)), model, decode)
        first = reference_features(reference, network(), extract, tmp_path / "cache")
        [file] = (tmp_path / "cache").iterdir()
        whole = file.read_bytes()
        flipped = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
        file.write_bytes({"flip": flipped, "cut": whole[:-50], "other": b"{}"}[damage])
        with caplog.at_level(logging.WARNING):
            again = reference_features(reference, network(), extract, tmp_path / "cache")
        assert "is damaged, so the features are computed again" in caplog.text
        np.testing.assert_array_equal(again.features, first.features)
        caplog.clear()
        reference_features(reference, network(), extract, tmp_path / "cache")
        assert (caplog.text, list((tmp_path / "cache").iterdir())) == ("", [file])

    def test_a_folder_that_cannot_be_written(self, tmp_path, model, caplog):
        reference = open_reference(save_archive(tmp_path / "real.npz", arr_0=pixels(5)), model, decode)
        (tmp_path / "file").touch()
        assert reference_features(reference, network(), extract, tmp_path / "file").features is not None
        assert "cannot be written" in caplog.text

    def test_of_a_large_reference_a_part_of_the_features_is_kept(self, tmp_path, model, monkeypatch):
        monkeypatch.setattr(feature_cache, "MAX_KEPT", 4)
        images = pixels(10)
        reference = open_reference(save_archive(tmp_path / "real.npz", arr_0=images), model, decode)
        found = reference_features(reference, network(), extract, tmp_path / "cache", batch_size=3)
        features = np.asarray(extract(images).features)
        np.testing.assert_array_equal(found.features, features[[0, 2, 5, 7]])
        np.testing.assert_allclose(found.moments.mean, features.mean(axis=0), rtol=1e-6)
        assert found.moments.count == 10
