"""What a teacher-forced pass is given and gives back: batch norms, lists, position masks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lvlm_probe.models.inputs import list_inputs
from lvlm_probe.replaying.teacher_forcing import TeacherForcing


class _Tower(torch.nn.Module):
    """A feature map, normalised at the very end and flattened into tokens, as timm's FastViT towers are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        self.project = torch.nn.Linear(8, 16)
        self.embedding = torch.nn.Embedding(16, 16)
        self.head = torch.nn.Linear(16, 16)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embedding

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor,
        shapes: list[list[int]] | None = None,
        sizes: list[int] | torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> SimpleNamespace:
        assert shapes is None or isinstance(shapes, list)
        features = self.project(self.norm(self.convolution(pixel_values)).flatten(2).permute(0, 2, 1))
        return SimpleNamespace(logits=self.head(self.embedding(input_ids) * features.tanh().mean(1, keepdim=True)))


def test_gradient_through_a_batch_norm_equals_finite_differences() -> None:
    model = _Tower().double().eval()
    forcing = TeacherForcing(model, input_ids=torch.tensor([1, 2]), token_ids=torch.tensor([3, 4, 5]))
    pixels, way = torch.randn(2, 1, 3, 2, 2, generator=torch.Generator().manual_seed(1)).double()
    leaf = pixels.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(forcing.log_probs({"pixel_values": leaf}, batch=1).sum(), leaf)
    with torch.no_grad():
        high, low = (forcing.log_probs({"pixel_values": pixels + h * way}, batch=1).sum() for h in (1e-5, -1e-5))
    assert torch.isclose((gradient * way).sum(), (high - low) / 2e-5, rtol=1e-5)
    assert not model.norm._forward_hooks  # torch alone gets it wrong on the CPU where the gradient arrives permuted


@pytest.mark.quick
def test_what_a_model_takes_as_a_list_is_handed_on_as_one() -> None:
    model = _Tower()
    assert list_inputs(model) == {"shapes"}  # sizes may be a tensor too
    forcing = TeacherForcing(model, input_ids=torch.tensor([1]), token_ids=torch.tensor([3]))
    inputs = {"pixel_values": torch.zeros(1, 3, 2, 2), "shapes": torch.tensor([[2, 2]])}
    assert forcing.log_probs(inputs, batch=1).shape == (1, 1)


def test_no_position_of_the_answer_is_the_pictures() -> None:
    seen = {}

    class Listening(_Tower):
        def forward(self, image_embeds_position_mask, token_type_ids, use_cache, **inputs):
            seen.update(mask=image_embeds_position_mask, kinds=token_type_ids)
            return super().forward(**inputs)

    ends_in_a_picture = {
        "image_embeds_position_mask": torch.tensor([[0, 1]]),
        "token_type_ids": torch.tensor([[0, 1]]),
    }
    forcing = TeacherForcing(
        Listening(),
        input_ids=torch.tensor([1, 2]),
        token_ids=torch.tensor([3, 4, 5]),
        sequence_inputs=ends_in_a_picture,
        answer_token_type=7,
    )
    forcing.log_probs({"pixel_values": torch.zeros(1, 3, 2, 2)}, batch=1)
    assert seen["mask"].tolist() == [[0, 1, 0, 0]]
    assert seen["kinds"].tolist() == [[0, 1, 7, 7]]
