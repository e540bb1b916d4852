"""The pretended accelerator keeps a device's rules: without that the tests beside this one would find nothing."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from pretend import Card, OnDevice


def test_tensors_of_two_devices_do_not_meet() -> None:
    with Card(count=2):
        near, far = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1")
        for other in (torch.ones(3), far):
            with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
                near + other
        assert (near + torch.tensor(1.0)).cpu().tolist() == [2, 2, 2]  # one number of the CPU may
        with pytest.raises(RuntimeError, match="indices should be"):
            torch.ones(3)[torch.tensor([0], device="cuda:0")]
        with pytest.raises(TypeError, match="numpy"):
            near.numpy()


def test_random_numbers_come_from_a_generator_of_the_device() -> None:
    with Card():
        place = torch.zeros(3, device="cuda")
        with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
            place.normal_(generator=torch.Generator())
        place.normal_(generator=torch.Generator("cuda").manual_seed(3))
        assert torch.equal(place.cpu(), torch.zeros(3).normal_(generator=torch.Generator().manual_seed(3)))


def test_what_waits_to_be_conjugated_is() -> None:
    """The gradient of a product of complex numbers, with which rotary embeddings turn (Llama 4)."""
    slopes = []
    for place in ("cpu", "cuda"):
        with Card():
            leaf = torch.tensor([[1.0, 2.0], [3.0, -1.0]], device=place).requires_grad_(True)
            turned = torch.view_as_complex(leaf) * torch.view_as_complex(torch.tensor([0.6, 0.8], device=place))
            (slope,) = torch.autograd.grad(torch.view_as_real(turned)[:, 0].sum(), leaf)
            slopes.append(slope.cpu())
    assert torch.equal(slopes[0], slopes[1])
    assert torch.allclose(slopes[0], torch.tensor([0.6, -0.8]).expand(2, 2))  # of Re (x + iy)(0.6 + 0.8i)


def test_whole_numbers_are_counted_in_bins() -> None:
    with Card():
        counts = torch.histc(torch.tensor([0, 2, 2, 3], device="cuda", dtype=torch.int32), bins=3, min=0, max=2)
        assert counts.dtype == torch.int32 and counts.cpu().tolist() == [1, 0, 2]


def test_waits_are_counted() -> None:
    with Card() as card:
        values = torch.arange(4.0).to("cuda")
        with card.counting() as waits:
            values.sum().item()
            bool(values.isfinite().all())
            values[values > 1]
            values.cpu()
            values + 1  # not one
        assert sorted(kind for kind, _, _ in waits.elements()) == [
            "device to host", "shape from values", "value read out", "value read out",
        ]  # fmt: skip


def test_a_copy_that_does_not_wait_arrives_with_its_event() -> None:
    with Card():
        values = torch.arange(3.0).to("cuda")
        host = torch.empty(3, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        assert host.isnan().all()
        event.synchronize()
        assert host.tolist() == [0, 1, 2]


def test_memory_is_counted_and_runs_out() -> None:
    with Card(memory=4000) as card:
        first = torch.zeros(500, device="cuda")
        view = first[:10]
        assert card.used == [2000]
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            torch.zeros(600, device="cuda")
        del first
        assert card.used == [2000]  # the view holds it
        del view
        assert card.used == [0] and card.peak == [2000]


@pytest.mark.parametrize("seconds", [1e-6, 1.0])
def test_what_the_devices_thread_still_holds_is_not_in_use(seconds: float) -> None:
    """A thread keeps the interpreter's lock for so long while another wants it: any time on a busy machine."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        with Card():
            weight = torch.ones(8, 8, device="cuda")
            for _ in range(5):
                leaf = torch.ones(1000, 8, device="cuda", requires_grad=True)
                torch.autograd.grad((leaf @ weight).sin().sum(), leaf)
                del leaf
                torch.cuda.synchronize()
                assert torch.cuda.memory_allocated() == 256
    finally:
        sys.setswitchinterval(before)


def test_a_tensor_that_is_dropped_within_the_count_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector may run between any two steps, and finalizers with it."""
    with Card() as card:
        kept = [torch.zeros(10, device="cuda"), torch.zeros(20, device="cuda")]

        class Sizes(dict[int, int]):
            def pop(self, *key: int) -> int:
                size = super().pop(*key)
                kept.clear()
                return size

        monkeypatch.setattr(card, "sizes", Sizes(card.sizes))
        del kept[0]
        assert card.used == [0]


def test_double_precision_may_be_missing() -> None:
    with Card(float64=False):
        with pytest.raises(TypeError, match="float64"):
            torch.ones(2, device="cuda").double()
        assert torch.ones(2, device="cuda").cpu().double().dtype == torch.float64


def test_backward_runs_in_a_thread_of_the_device() -> None:
    with Card():
        seen: list[int] = []
        leaf = torch.ones(2, device="cuda", requires_grad=True)
        doubled = leaf * 2
        doubled.register_hook(lambda gradient: seen.append(threading.get_ident()))
        doubled.sum().backward()
        assert seen != [threading.get_ident()]
        assert isinstance(leaf.grad, OnDevice) and leaf.grad.cpu().tolist() == [2, 2]
