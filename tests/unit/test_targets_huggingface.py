"""Image classifiers of transformers, randomly initialized and saved to disk: fed as their own config says."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from besiege.core.errors import BadInput
from besiege.core.images import Images
from besiege.core.threat import Access
from besiege.targets import expects, open_target

PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 16, "width": 16},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.25, 0.5],
}


def saved(folder, **processor):
    """A small vision transformer and its processor in a folder; the network itself."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    names = {0: "cat", 1: "dog", 2: "eel"}
    net = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, id2label=names, **sizes)).eval()
    net.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | processor))
    return net


@pytest.fixture
def images():
    x = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return Images.of(x, torch.arange(6) % 3, names=["cat", "dog", "eel"])


def test_preprocessing_is_its_own_and_inside(tmp_path, images):
    net = saved(tmp_path)
    target = open_target(f"hf:{tmp_path}", data=images)
    assert (target.access, target.classes, target.shape) == (Access.WEIGHTS, 3, (3, 16, 16))
    assert expects(f"hf:{tmp_path}") == ((16, 16), 3, "embedded:digits-rgb")
    assert open_target(f"hf:{tmp_path}").shape == (3, 16, 16)
    mean, std = (torch.tensor(PROCESSOR[key]).reshape(1, 3, 1, 1) for key in ("image_mean", "image_std"))
    torch.testing.assert_close(target.scores(images.x), net((images.x - mean) / std).logits.detach())


def test_a_rescale_to_minus_one_and_one(tmp_path, images):
    net = saved(tmp_path, rescale_factor=1 / 127.5, rescale_offset=True, do_normalize=False)
    target = open_target(f"hf:{tmp_path}", data=images)
    torch.testing.assert_close(target.scores(images.x), net(images.x * 2 - 1).logits.detach(), atol=1e-5, rtol=1e-4)


def test_classes_are_matched_by_name(tmp_path, images):
    saved(tmp_path)
    other = Images.of(images.x, images.y, names=["dog", "cat", "eel"])
    with pytest.raises(BadInput, match=r"numbers the class 'dog' 0, but .* numbers it 1"):
        open_target(f"hf:{tmp_path}", data=other)


def test_what_cannot_be_used_is_said_in_one_sentence(tmp_path, images, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BadInput, match="is no image classifier that can be opened") as caught:
        open_target(f"hf:{tmp_path}", data=images)
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="brings its own weights"):
        open_target(f"hf:{tmp_path}", data=images, weights="w.safetensors")
