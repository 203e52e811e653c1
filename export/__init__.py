"""From a diffusers folder to an ONNX bundle, verified. Reads weights, never trains them, and serves
nothing.
"""
