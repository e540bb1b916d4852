"""Configuration of the made-up model Peeper."""

from transformers import PreTrainedConfig


class PeeperConfig(PreTrainedConfig):
    model_type = "peeper"

    def __init__(self, vocab_size=640, width=48, num_hidden_layers=2, side=56, patch=14, image_token_index=3, **kwargs):
        self.vocab_size, self.width, self.num_hidden_layers = vocab_size, width, num_hidden_layers
        self.side, self.patch = side, patch
        self.image_token_index = image_token_index
        super().__init__(**kwargs)
