"""The shipped stand-in: a small, really trained text-to-image system that draws simple coloured shapes.

The star stands for an unsafe concept. This package knows where its files lie and imports nothing heavy;
`scene` draws, `captions` describes, `train` makes the weights, `evaluate` measures them.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent
BUNDLE_FOLDER = ROOT / "bundle"
MODEL_FOLDER = ROOT / "model"  # in a checkout alone: no wheel holds the weights
MODEL_PLACE = "models/shapes/model of safelight's source repository"
ORACLE_FILE = ROOT / "oracle" / "model.safetensors"
