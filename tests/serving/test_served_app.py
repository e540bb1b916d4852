"""The app on a model behind a server: maps by masks, and a sentence for what a server cannot show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import lvlm_probe as probe
from lvlm_probe.app import Service
from lvlm_probe.errors import ProbeError


@pytest.fixture
def service(behind: Any) -> Any:
    with probe.connect(behind.url) as server:
        made = Service({"served": server})
        yield made
        made.close()


def test_what_a_server_can_show_and_what_it_cannot(service: Service, scene: Any) -> None:
    (trace,) = service.ask("served", scene.image, scene.question, service.new_visitor())
    assert trace.llr is not None
    assert service.methods("served") == ["rise", *sorted(set(service.methods("served")) - {"rise"})]
    assert not {"igos++", "attention", "gradcam"} & set(service.methods("served"))
    word = int(np.argmax([trace.llr[one.start : one.stop].sum() for one in trace.words]))
    found = service.explain("served", trace, word, "occlusion")
    assert found.read().values is not None
    region = np.ones((8, 8), dtype=bool)
    said, _ = service.say_again("served", trace, region, "keep")
    assert f"With nothing but this 100% of the image it says “{trace.answer}”." == said
    for look in (lambda: service.lens("served", trace), lambda: service.attention("served", trace, word, None, None)):
        with pytest.raises(ProbeError, match=r"runs on a server, which .* serve the model itself, --model"):
            look()
