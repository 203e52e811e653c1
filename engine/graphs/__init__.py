"""The GPU's way through the networks: static buffers, bodies that are captured once, and replays.

All but the capture itself runs on the processor too, where a body is simply called. What is shared with the
other backends is the stage and its five verbs; what is gained beside it is a detection, and a step of the
sampler, as one launch.
"""
