"""The app behind ``lvlm-probe serve``: ask about an image in a browser, and see which part of it made each word.

``service.py`` is what the app does, without its looks: models that are loaded once, requests that take turns, visitors
who are kept apart, limits. ``page.py`` puts it on a Gradio page, and ``page_limits.py`` around that page what a browser
and a request may do. Gradio is optional (``pip install 'lvlm-probe[app]'``) and imported by the page alone.

::

    from lvlm_probe.app import Service, serve

    model, processor = probe.load("path/to/model")
    serve(Service({"my model": (model, processor)}), port=7860)
"""

from __future__ import annotations

from lvlm_probe.app.page import application, serve
from lvlm_probe.app.service import Limits, Service

__all__ = ["Limits", "Service", "application", "serve"]
