"""Parity and cost of masks through image processors: the table in docs/figures.md.

    .venv/bin/python tests/benchmarks/bench_images.py --out images-pil.json
    .venv-tv/bin/python tests/benchmarks/bench_images.py --backend torchvision --out images-torchvision.json

Per processor, on one picture: the fast path against the real processor in 1/255 levels on a random mask, end points bit
for bit, the cosine between the traced gradient and exact autograd (torchvision backend, white cotangent), the time of
the trace, and milliseconds per composite, forward and backward, for a batch of masks.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch  # noqa: E402
import torchvision_shim  # noqa: E402, F401
from image_processors import FAMILIES, build, photograph  # noqa: E402
from straight_through import exact_inputs  # noqa: E402

from lvlm_probe.images import ImagePath  # noqa: E402
from lvlm_probe.images.parity import versions  # noqa: E402


def best(action: Any, repeats: int = 3) -> float:
    """Seconds of the fastest of a few runs: the one least disturbed."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return min(times)


def measure(family: str, backend: str, size: tuple[int, int], masks: int) -> dict[str, Any]:
    processor, structure = build(family, backend)
    image = photograph(*size)
    path = ImagePath.from_processor(processor, [image], structure=structure)
    started = time.perf_counter()
    report = path.report
    traced = time.perf_counter() - started
    ends = all(
        torch.equal(path.apply(torch.ones(1, 9, 9))[key], path.inputs[key])
        and torch.equal(path.apply(torch.zeros(1, 9, 9))[key], path.baseline_inputs[key])
        for key in path.pixel_keys
    )
    generator = torch.Generator().manual_seed(0)
    keys = path.pixel_keys
    cosine = None
    if backend == "torchvision":
        mask = torch.rand(14, 14, generator=generator).requires_grad_()
        exact, fast = exact_inputs(processor, structure, image, path.baseline_images[0], mask), path.apply(mask[None])
        white = [torch.randn(exact[key].shape, generator=generator) for key in keys]
        (truth,) = torch.autograd.grad([exact[k] for k in keys], mask, white)
        (ours,) = torch.autograd.grad([fast[k] for k in keys], mask, white)
        cosine = float(torch.cosine_similarity(truth.flatten(), ours.flatten(), dim=0))
    batch = torch.rand(masks, 32, 32, generator=generator).requires_grad_()
    path.apply(batch)
    forward = best(lambda: path.apply(batch))
    out = path.apply(batch)
    cotangents = [torch.ones_like(out[key]) for key in keys]
    backward = best(lambda: torch.autograd.grad([out[k] for k in keys], batch, cotangents, retain_graph=True))
    return {
        "family": family,
        "backend": backend,
        "processor": report.processor,
        "size": list(size),
        "pixel_inputs": {key: list(path.inputs[key].shape) for key in keys},
        "mean_levels": report.mean_error,
        "max_levels": report.max_error,
        "end_points_bit_equal": ends,
        "gradient_cosine": cosine,
        "trace_seconds": traced,
        "forward_ms": forward / masks * 1e3,
        "backward_ms": backward / masks * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["pil", "torchvision"], default="pil")
    parser.add_argument("--size", type=int, nargs=2, default=(1500, 1000), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--masks", type=int, default=16)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        "| processor | backend | mean levels | max levels | ends equal | gradient cosine | trace s | fwd ms | bwd ms |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    for family in arguments.families:
        row = measure(family, arguments.backend, tuple(arguments.size), arguments.masks)
        rows.append(row)
        cosine = "" if row["gradient_cosine"] is None else f"{row['gradient_cosine']:.5f}"
        print(
            f"| {family} | {row['backend']} | {row['mean_levels']:.2f} | {row['max_levels']:.1f} | "
            f"{'yes' if row['end_points_bit_equal'] else 'NO'} | {cosine} | {row['trace_seconds']:.1f} | "
            f"{row['forward_ms']:.1f} | {row['backward_ms']:.1f} |",
            flush=True,
        )
    if arguments.out:
        machine = f"{platform.machine()}, {arguments.threads} thread(s)"
        figures = {"machine": machine, "versions": versions(), "masks": arguments.masks, "rows": rows}
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
