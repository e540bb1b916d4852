"""Writes ``golden-<version>.h5``, the file that every later version must read, and its expected values.

    python tests/data/make_golden.py

Run once for each minor version of the format, before it is released; the files are kept for ever, never made again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from trace_samples import sample_capture

from lvlm_probe.trace import open_trace, write
from lvlm_probe.trace.records import FIELDS
from lvlm_probe.trace.schema import FORMAT_VERSION

HERE = Path(__file__).parent


def plain(value: Any) -> Any:
    """A value of a field as JSON."""
    return value.tolist() if isinstance(value, np.ndarray) else value.to_dict()


def main() -> None:
    import torch

    capture = sample_capture(2, seed=10, tokens=11, images=2, clips=True)
    capture.rows[1].model_kwargs = {
        "pixel_values": torch.linspace(-2, 3e30, 24).reshape(2, 3, 4).bfloat16(),
        "image_grid_thw": torch.tensor([[1, 2, 3], [1, 4, 4]]),
    }
    capture.rows[1].status = "stopped"
    capture.rows[1].tokens[0] = "Thé 图\0"
    target = HERE / f"golden-{FORMAT_VERSION}.h5"
    if target.exists():
        raise SystemExit(f"{target} exists; a golden file is never made again")
    write(capture, HERE).rename(target)
    expected = []
    for index, row in enumerate(capture.rows):
        trace = open_trace(target, index)
        expected.append(
            {
                "trace_id": row.trace_id,
                "status": row.status,
                "prompt": row.prompt,
                "question": row.question,
                "pieces": row.tokens,
                "special": np.asarray(row.special).tolist(),
                "input_ids": row.input_ids.tolist(),
                "token_ids": row.token_ids.tolist(),
                "log_probs": row.log_probs.astype(float).tolist(),
                "baseline_log_probs": row.baseline_log_probs.astype(float).tolist(),
                "patch_box": row.patch_box.astype(float).tolist(),
                "image_positions": row.image_positions.tolist(),
                "image_index": row.image_index.tolist(),
                "attention": row.points["decoder.attention"].values.astype(float).tolist(),
                "model_kwargs": {
                    name: {
                        "dtype": str(torch.as_tensor(value).dtype),
                        "values": torch.as_tensor(value).double().tolist(),
                    }
                    for name, value in row.model_kwargs.items()
                },
                "image_sums": [int(np.asarray(image, np.int64).sum()) for image in trace.images],
                "meta": row.meta,
                "baseline": row.baseline,
                "later": {name: getattr(row, name) for name, field in FIELDS.items() if field.since != "1.0"},
            }
        )
    found = {"model": capture.model, "created": capture.created, "rows": expected}
    text = json.dumps(found, ensure_ascii=False, default=plain)
    target.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
