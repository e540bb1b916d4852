"""Videos: which frames made a vision-language model say these words, and where in them.

    replay = probe.replay(trace, model, processor)         # of a recorded answer about a video
    heat = probe.video.explain(replay)                     # values (t, row, col)
    heat.save("map.gif")
    score = probe.evaluate(heat, replay)
    shares = probe.video.which_frames(replay)              # Shapley value of each stretch of time
    print(probe.video.order(replay))                       # does the answer need motion, or the order of frames?

A clip is a run of a prompt's images (``replay.clips``): ``replay.log_probs(mask, image=replay.clips[0])`` takes masks
``(batch, t, row, col)``.
"""

from lvlm_probe.video.explaining import clip_methods, explain
from lvlm_probe.video.frames import FrameShares, Order, order, which_frames
from lvlm_probe.video.heatmap import ClipHeatmap

__all__ = ["ClipHeatmap", "FrameShares", "Order", "clip_methods", "explain", "order", "which_frames"]
