"""A Hugging Face Space: the app on the embedded model, or on the models that the Space's settings name.

Variables of the Space:  LVLM_PROBE_MODELS  hub ids with commas between them; none: the embedded model
                         LVLM_PROBE_TOKENS  length of an answer at most, tokens (default 128)
"""

from __future__ import annotations

import os

import lvlm_probe as probe
from lvlm_probe.app import Limits, Service, application

named = [one.strip() for one in os.environ.get("LVLM_PROBE_MODELS", "").split(",") if one.strip()]
models = {one.rpartition("/")[2]: probe.load(one) for one in named} or {"demo": probe.demo.load()}
service = Service(models, limits=Limits(answer=int(os.environ.get("LVLM_PROBE_TOKENS", "128"))))
app = application(service)

if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app, host="0.0.0.0", port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")))
