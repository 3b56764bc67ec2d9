"""Loss, gradient and products of many model families; `hfdist bench coverage` makes the same a page."""

from __future__ import annotations

import dataclasses

import dense
import pytest
import torch

from hfdist.bench.coverage import measure, reference_product, to_markdown
from hfdist.bench.families import Family, families
from hfdist.curvature.params import ParameterVector

FAMILIES = families()
# Of every library what differs most from the rest; make soak takes all.
FAST = {
    "torch": {f.name for f in FAMILIES if f.source == "torch"},
    "torchvision": {
        "ResNet, basic blocks, training", "MobileNet v3", "EfficientNet v2, training", "ConvNeXt",
        "Swin", "ViT",
    },
    "timm": {"ViT", "EVA", "XCiT", "MetaFormer"},
    "transformers": {
        "BERT, masked tokens, training", "BERT, classes, its own loss", "GPT-2, its own loss",
        "BLOOM", "Llama, grouped queries", "Mixtral", "Mamba", "T5", "Whisper", "ViT", "Wav2Vec2",
    },
}  # fmt: skip


def name(family: Family) -> str:
    return f"{family.source}: {family.name}"


def check(family: Family) -> None:
    result = measure(family)
    assert result.is_right, result


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in FAST[f.source]], ids=name)
def test_family(family: Family) -> None:
    check(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name not in FAST[f.source]], ids=name)
def test_further_family(family: Family) -> None:
    check(family)


def test_every_library_is_there() -> None:
    found = {source: {f.name for f in FAMILIES if f.source == source} for source in FAST}
    for source, names in FAST.items():
        assert names, source
        assert names <= found[source], source


@pytest.mark.parametrize("wanted", ["perceptron", "graph attention", "GRU"])
def test_the_reference_is_the_explicit_matrix(wanted: str) -> None:
    (family,) = [f for f in FAMILIES if f.name == wanted]
    torch.manual_seed(0)
    model, batch = family.task().model(), family.batch()
    params = list(model.parameters())
    vector = ParameterVector(params)
    v = torch.randn(vector.numel, dtype=torch.float64)

    function = dense.Function(
        outputs=lambda: [model(batch[0])], loss=lambda z: (family.criterion(z[0], batch), 1.0)
    )
    got = reference_product(model(batch[0]), lambda z: family.criterion(z, batch), vector, v)
    torch.testing.assert_close(got, dense.ggn([function], params) @ v, rtol=1e-10, atol=1e-12)


def test_page_names_what_is_wrong_and_what_is_refused() -> None:
    (family,) = [f for f in FAMILIES if f.name == "perceptron"]
    right = measure(family)
    page = to_markdown(
        [
            right,
            dataclasses.replace(right, product_error=0.5),
            dataclasses.replace(
                right, engine="refused", refusal="TaskError: for a reason. Do this"
            ),
        ]
    )
    assert "3 families: 1 right, 1 refused, 1 wrong" in page
    assert "| perceptron (wrong) |" in page
    assert "| refused | TaskError: for a reason |  |" in page
