"""Config values from anywhere: read back equal, or one ModelError."""

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsearch.errors import MmsearchError, ModelError
from mmsearch.testing import TINY_CONFIG
from mmsearch.towers.config import DualEncoderConfig


def changed(path, value):
    values = json.loads(json.dumps(TINY_CONFIG))
    *parents, last = path.split(".")
    inner = values
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[last] = value
    return values


def test_a_config_survives_json():
    """from_json(to_json(c)) == c, through text."""
    config = DualEncoderConfig.from_json(TINY_CONFIG)
    assert DualEncoderConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("dim", 0),
        ("dim", 10**9),
        ("dim", "8"),
        ("dim", True),
        ("max_tokens", 10**6),
        ("max_tokens", 65),
        ("text", []),
        ("text.kind", "gpt"),
        ("text.backbone", 3),
        ("text.backbone.num_hidden_layers", 10**9),
        ("text.backbone.vocab_size", 10**12),
        ("text.backbone.hidden_size", 17),
        ("text.backbone.hidden_act", "no_such"),
        ("text.projection.kind", "magic"),
        ("text.projection.hidden", -1),
        ("text.projection.dropout", 1.5),
        ("text.projection.unknown", 1),
        ("image.backbone", 5),
        ("image.backbone", "x" * 1000),
        ("image.backbone", "plain_cnn:9999999"),
        ("image.backbone", "plain_cnn:8,8,8,8,8,8,8,8"),
        ("image.pooling", "sum"),
        ("image.anchors", 3),
        ("image.anchors.classes", 10**12),
        ("image.anchors.peak", 1.1),
        ("image.anchors.peak", True),
        ("image.anchors.sharpness", 0.5),
        ("preprocessing.size", 100_000),
        ("preprocessing.fit", "stretch"),
        ("preprocessing.interpolation", "magic"),
        ("preprocessing.mean", [1, 2]),
        ("preprocessing.std", [0, 1, 1]),
        ("preprocessing.mean", [float("nan")] * 3),
        ("preprocessing.unknown", 1),
    ],
)
def test_an_absurd_setting_is_one_model_error(path, value):
    """Too many, too few, of another type, unknown: nothing is built, nothing is allocated."""
    from mmsearch.towers import build_dual_encoder

    with pytest.raises(ModelError) as caught:
        build_dual_encoder(changed(path, value))
    assert "\n" not in str(caught.value)


def test_anchors_with_a_peak_are_read_back_and_without_one_are_written_as_before():
    """A model's identity is made of this: one that has no peak keeps its own."""
    plain = DualEncoderConfig.from_json(changed("image.anchors", {"classes": 5})).to_json()
    assert plain["image"]["anchors"] == {"classes": 5, "scale": 1.0}
    sharp = DualEncoderConfig.from_json(changed("image.anchors", {"classes": 5, "sharpness": 8.0}))
    assert DualEncoderConfig.from_json(sharp.to_json()) == sharp
    peaked = {"classes": 5, "scale": 1.0, "peak": 0.4, "sharpness": 3.0}
    assert DualEncoderConfig.from_json(changed("image.anchors", peaked)).to_json()["image"]["anchors"] == peaked


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
TEXT_PATHS = [
    "text",
    "text.kind",
    "text.backbone",
    "text.backbone.hidden_size",
    "text.projection",
    "text.projection.norm",
]
IMAGE_PATHS = ["image", "image.backbone", "image.pooling", "image.anchors", "image.anchors.scale"]
OTHER_PATHS = ["dim", "max_tokens", "preprocessing", "preprocessing.size", "preprocessing.mean", "preprocessing.fit"]
paths = st.sampled_from([*TEXT_PATHS, *IMAGE_PATHS, *OTHER_PATHS])


@settings(max_examples=200, deadline=None)
@given(path=paths, value=json_values)
def test_any_json_is_a_config_or_an_error_of_ours(path, value):
    """No TypeError, no KeyError, whatever stands in the file."""
    with contextlib.suppress(MmsearchError):
        DualEncoderConfig.from_json(changed(path, value))
