"""Pictures and text for Peeper, without a base class of transformers."""

import numpy as np
import torch
from PIL import Image


class PeeperPictures:
    """Makes arrays with numpy, as image processors did before there was a common base class."""

    def __init__(self, side=56):
        self.side = side

    def preprocess(self, images, return_tensors=None):
        images = images if isinstance(images, (list, tuple)) else [images]
        made = []
        for image in images:
            small = image.convert("RGB").resize((self.side, self.side), Image.Resampling.BICUBIC)
            made.append(np.asarray(small, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1)
        stack = np.stack(made)
        return {"pictures": torch.from_numpy(stack) if return_tensors == "pt" else stack}

    def __call__(self, images, **kwargs):
        return self.preprocess(images, **kwargs)


class PeeperProcessor:
    """Tokenizer and pictures in one call."""

    def __init__(self, image_processor, tokenizer, tokens_per_picture=16):
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.tokens_per_picture = tokens_per_picture

    def __call__(self, images, text):
        made = self.image_processor(images)
        text = text.replace("<image>", "<image>" * self.tokens_per_picture)
        tokens = self.tokenizer(text, return_tensors="pt")
        return {
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "pictures": torch.from_numpy(made["pictures"]),
        }
