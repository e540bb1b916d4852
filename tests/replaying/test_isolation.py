"""The gradient of patch embeddings by one product is the convolution's own."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from lvlm_probe.hooks import HookSet, shadow_of
from lvlm_probe.replaying.isolation import patch_gradients

SHAPES = {
    "square": (torch.nn.Conv2d(3, 8, 4, stride=4), (2, 3, 12, 8)),
    "pixels beyond the last patch": (torch.nn.Conv2d(3, 8, 4, stride=4, bias=False), (3, 3, 15, 10)),
    "oblong": (torch.nn.Conv2d(2, 5, (2, 6), stride=(2, 6)), (1, 2, 8, 18)),
    "frames": (torch.nn.Conv3d(3, 7, (2, 4, 4), stride=(2, 4, 4), bias=False), (5, 3, 2, 4, 4)),
    "several frames": (torch.nn.Conv3d(3, 7, (2, 4, 3), stride=(2, 4, 3)), (2, 3, 5, 8, 7)),
}


def slope(module, pixels, weights):
    leaf = pixels.clone().requires_grad_(True)
    output = module(leaf)
    (gradient,) = torch.autograd.grad((output * weights).sum(), leaf)
    return output.detach(), gradient


@pytest.mark.parametrize("name", SHAPES)
def test_it_is_the_convolutions_own(name):
    module, shape = SHAPES[name]
    module = module.double().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(shape, generator=generator, dtype=torch.float64)
    weights = torch.randn(module(pixels).shape, generator=generator, dtype=torch.float64)
    # Permuted as it arrives from a tower that flattens its feature map into tokens.
    weights = weights.transpose(1, -1).contiguous().transpose(1, -1)
    output, expected = slope(module, pixels, weights)
    with patch_gradients(torch.nn.Sequential(module)):
        assert "forward" in vars(module)
        mine_output, mine = slope(module, pixels, weights)
        named = slope(lambda given: module(input=given), pixels, weights)
    assert torch.equal(mine_output, output)
    assert mine.shape == expected.shape
    assert torch.allclose(mine, expected, atol=1e-12, rtol=0)
    assert torch.equal(named[0], output) and torch.equal(named[1], mine)
    assert "forward" not in vars(module)


def test_a_shadow_of_ours_stays_below():
    module = torch.nn.Conv2d(3, 8, 4, stride=4).requires_grad_(False)
    with HookSet() as hooks:
        hooks.shadow(module, "forward", lambda original, given: 2 * original(given))
        with patch_gradients(module):
            output, _ = slope(module, torch.ones(1, 3, 8, 8), 1.0)
            taken = shadow_of(vars(module)["forward"])
            assert taken is not None and taken.had_own
    assert torch.equal(output, 2 * module(torch.ones(1, 3, 8, 8)))


@pytest.mark.parametrize("name", ["square", "frames"])
def test_under_autocast_it_is_the_convolutions_own(name):
    """Both round their products to bfloat16, in another order."""
    module, shape = SHAPES[name]
    module = module.float().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(shape, generator=generator)
    weights = torch.randn(module(pixels).shape, generator=generator)

    def cast(given):
        with torch.autocast("cpu", torch.bfloat16):
            return module(given)

    output, expected = slope(cast, pixels, weights)
    with patch_gradients(torch.nn.Sequential(module)):
        mine_output, mine = slope(cast, pixels, weights)
    assert torch.equal(mine_output, output) and output.dtype == torch.bfloat16
    assert mine.dtype == expected.dtype == torch.float32
    assert torch.allclose(mine, expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    "module",
    [
        torch.nn.Conv2d(3, 4, 3, stride=2),
        torch.nn.Conv2d(3, 4, 2, stride=2, padding=1),
        torch.nn.Conv2d(3, 4, 3, padding="same"),
        torch.nn.Conv2d(4, 4, 2, stride=2, groups=2),
        torch.nn.Conv2d(3, 4, 2, stride=2, dilation=2),
        torch.nn.ConvTranspose2d(3, 4, 2, stride=2),
    ],
    ids=repr,
)
def test_other_convolutions_are_left_alone(module):
    with patch_gradients(module.requires_grad_(False)):
        assert "forward" not in vars(module)


@pytest.mark.quick
def test_weights_that_learn_keep_their_gradient():
    module = torch.nn.Conv2d(3, 4, 2, stride=2)
    with patch_gradients(module):
        module(torch.ones(1, 3, 4, 4, requires_grad=True)).sum().backward()
    assert module.weight.grad is not None


def test_without_gradients_nothing_is_touched():
    module = torch.nn.Conv2d(3, 4, 2, stride=2).requires_grad_(False)
    with torch.no_grad(), patch_gradients(module):
        assert "forward" not in vars(module)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_model_has_one(name):
    """What transformers calls by positions or by names, whatever the version."""
    model, _ = tiny_models.build(name)
    with patch_gradients(model.requires_grad_(False)):
        found = [path for path, module in model.named_modules() if "forward" in vars(module)]
    assert len(found) == 1 and "patch_embed" in found[0]
