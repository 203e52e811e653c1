"""Engines of TensorRT beside a bundle: what identifies one, who may have made it, and how it is found again.

Reads and writes the folder `engines/` of a bundle. Builds nothing and runs nothing.
"""
