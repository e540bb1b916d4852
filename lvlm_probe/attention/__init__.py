"""The attention row tap: softmax rows of answer queries × image keys, without changing the model's output.

How it works. Every attention layer of transformers looks its function up by name, at each call::

    attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)

One function is registered for the process, and the tap gives its name to the decoder's attention modules only: on
each of them ``config`` becomes a thin view of the same config object that differs in ``_attn_implementation`` alone.
The registered function first calls whatever the untouched config asks for (sdpa, eager) with the very same arguments
and returns its result untouched; then, where a tap is armed by this very caller, it computes the wanted rows on the
side. Several taps may redirect the same modules; the last one out restores them.

No config is ever written. So masks are built exactly as before (``create_causal_mask`` reads the text model's config,
which still says "sdpa"), vision towers are not involved, ``set_attn_implementation`` in mid-air simply takes effect,
and a copy or a pickle of a tapped model is an untapped one.

Rows: under eager they are cut out of the weights the layer returns; under sdpa they are computed in float32 as
``softmax(softcap(q·kᵀ·scaling) + bias + mask)``, for the wanted rows only. The full query × key map is never formed.
"""

from __future__ import annotations

from lvlm_probe.attention.layers import TapLayer
from lvlm_probe.attention.rows import attention_rows
from lvlm_probe.attention.tap import Rows, RowTap

__all__ = ["RowTap", "Rows", "TapLayer", "attention_rows"]
