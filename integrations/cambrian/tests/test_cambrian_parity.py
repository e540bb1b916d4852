"""The native model against numbers of the original classes, through the converter; and that each detail counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cambrian_tiny import Case, converted
from lvlm_probe_cambrian import CambrianConfig, CambrianForConditionalGeneration, keys, modeling, sampler
from lvlm_probe_cambrian.towers import tower_features
from torch.nn import functional as F

LOGITS, GRADIENT = 3e-5, 1e-4
LLAMA, PHI = "cambrian_tiny", "cambrian_phi3_tiny"
CASES = [(LLAMA, "square"), (LLAMA, "wide"), (LLAMA, "near"), (LLAMA, "tall"), (PHI, "near")]


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {stem: converted(stem, tmp_path_factory.mktemp(stem)) for stem in (LLAMA, PHI)}


def load(folder: Path, attention: str = "sdpa", **settings: Any) -> Any:
    config = CambrianConfig.from_pretrained(folder)
    for path, value in settings.items():
        part, _, name = path.rpartition("__")
        setattr(getattr(config, part) if part else config, name, value)
    return CambrianForConditionalGeneration.from_pretrained(folder, config=config, attn_implementation=attention).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("stem", "name"), CASES)
def test_logits_gradients_and_answers_are_those_of_the_original(
    native: dict[str, Path], stem: str, name: str, attention: str
) -> None:
    model, case = load(native[stem], attention), Case(stem, name)
    logits, gradient = case.errors(model)
    assert logits <= LOGITS
    assert gradient <= GRADIENT
    prompt = case.ids(model, answer=False)
    said = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        image_sizes=case.of["image_sizes"],
        **case.pixels(),
        max_new_tokens=6,
        do_sample=False,
    )
    # The release that made the data puts a spurious first token in front when it generates from embeddings.
    assert said[0, prompt.shape[1] :].tolist() == case.of["generated"][0, 1:].tolist()


@pytest.mark.parametrize("tower", range(4))
def test_every_tower_gives_the_features_of_the_original(native: dict[str, Path], tower: int) -> None:
    model, case = load(native[LLAMA]), Case(LLAMA, "near")
    with torch.no_grad():
        found = tower_features(
            model.model.vision_towers[tower],
            case.of[f"image{tower}"],
            grid=model.config.tower_grids[tower],
            clip_layer=model.config.clip_layer,
        )
    assert (found - case.of[f"tower_feat{tower}"]).abs().max() <= 2e-5


# ------------------------------------------------------------------------------------------------- negative controls


def _no_padding_mask(patch: pytest.MonkeyPatch, _folder: Path) -> Callable[[], Any] | None:
    patch.setattr(sampler, "valid_cells", lambda side, _size: torch.ones(side, side, dtype=torch.bool))
    return None


def _another_position(patch: pytest.MonkeyPatch, _folder: Path) -> None:
    placed = modeling.CambrianModel._placed

    def shifted(self: Any, *args: Any) -> Any:
        embeds, state = placed(self, *args)
        return embeds, sampler.SamplerState(state.positions + 1, state.read)

    patch.setattr(modeling.CambrianModel, "_placed", shifted)


def _no_aggregator_in_the_decoder(patch: pytest.MonkeyPatch, _folder: Path) -> None:
    patch.setattr(sampler.SamplerState, "update", lambda _self, _sampler, hidden: hidden)


@pytest.mark.parametrize(
    ("change", "name", "at_least"),
    [
        (_no_padding_mask, "near", 0.1),
        (_no_padding_mask, "tall", 0.1),
        (_another_position, "square", 0.1),
        (_no_aggregator_in_the_decoder, "square", 0.1),
    ],
)
def test_what_is_left_out_is_noticed(
    native: dict[str, Path], monkeypatch: pytest.MonkeyPatch, change: Any, name: str, at_least: float
) -> None:
    model, case = load(native[LLAMA]), Case(LLAMA, name)
    change(monkeypatch, native[LLAMA])
    logits, gradient = case.errors(model)
    assert logits > at_least
    assert gradient > GRADIENT


@pytest.mark.parametrize(
    "setting",
    [{"vision_config_0__hidden_act": "gelu_pytorch_tanh"}, {"vision_config_3__layer_norm_eps": 1e-6}],
    ids=["GELU by tanh in SigLIP", "epsilon of ConvNeXt-L in its norms"],
)
def test_a_setting_that_is_off_is_noticed(native: dict[str, Path], setting: dict[str, Any]) -> None:
    logits, gradient = Case(LLAMA, "near").errors(load(native[LLAMA], **setting))
    assert logits > 2 * LOGITS
    assert gradient > GRADIENT


def test_positions_interpolated_by_size_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_size(table: torch.Tensor, side: int) -> torch.Tensor:
        own = round((table.shape[1] - 1) ** 0.5)
        patches = table[:, 1:].unflatten(1, (own, own)).permute(0, 3, 1, 2)
        resized = F.interpolate(patches, size=(side, side), mode="bicubic", align_corners=False)
        return torch.cat([table[:, :1], resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)

    monkeypatch.setattr(keys, "interpolated_positions", by_size)
    logits, gradient = Case(LLAMA, "near").errors(load(converted(LLAMA, tmp_path)))
    assert logits > 100 * LOGITS
    assert gradient > GRADIENT


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums in one order on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
