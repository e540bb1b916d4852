"""Served models: explain a model that runs behind an engine with an OpenAI-compatible API, without its weights.

::

    server = probe.connect("http://gpu:8000")
    trace = server.ask("photo.jpg", "What is on the table?", out="runs/served")
    replay = probe.replay(trace, server)
    heat = probe.explain(replay, method="rise")

All that RISE, occlusion, greedy search, token selection, deletion and insertion need of a model is
``log_probs(mask)``: the log-probabilities of a given answer under a masked image. An engine that returns them for a
given answer gives exactly that, on as many machines as it runs on. Gradients, attention and activations it does not
give.

Mechanism, from the bottom: ``transport`` sends requests, waits and tries again; ``roads`` are the requests that engines
understand, with the checks of each reply; ``journal`` keeps what was answered; ``forcing`` puts the three together for
one answer; ``checks`` asks for what shows that the numbers are true; ``measuring`` finds out what a server can do;
``server`` is what a user holds, and ``replays`` what methods hold.
"""

from lvlm_probe.serving.journal import FILE as JOURNAL
from lvlm_probe.serving.messages import image_token_positions
from lvlm_probe.serving.replays import ServedReplay
from lvlm_probe.serving.server import Server, connect

__all__ = ["JOURNAL", "ServedReplay", "Server", "connect", "image_token_positions"]
